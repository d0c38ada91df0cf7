"""Student and dynamic teacher trained together, each with weights of its own."""

from __future__ import annotations

from torch import Tensor, nn

from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.plan import WidthPlan


class Unshared(Pair):
    """A pair without shared weights: the student learns from the teacher through the loss only.

    The student owns its weights, and is distilled on the logits of a wider network that is trained
    along with it. Both networks start as the same function.

    Args:
        teacher: the wide network.
        student: the narrow network, which this pair takes over with its parameters.
        plan: the student's width plan.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, plan: WidthPlan) -> None:
        owners = [dict(module._parameters) for module in student.modules()]
        super().__init__(teacher, student, plan)
        for module, parameters in zip(student.modules(), owners, strict=True):
            module._parameters.update(parameters)

    @classmethod
    def of(cls, pair: Pair) -> Unshared:
        """Copy a pair's shared weights into the student, so that the two no longer share any.

        Args:
            pair: student and dynamic teacher that share their weights; not to be used afterwards.
        """
        unshared = cls(pair.teacher, pair.extract(), pair.plan)
        unshared.certificate = pair.certificate
        return unshared

    def _weights_of_step(self) -> dict[str, Tensor]:
        self._merge_kernels()
        return self._weights()

    def _weight(self, name: str, merged: bool = True) -> Tensor:
        return self.narrow.get_parameter(name)
