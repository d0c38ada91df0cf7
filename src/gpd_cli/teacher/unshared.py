"""Student and dynamic teacher trained together, each with weights of its own: no sharing."""

from __future__ import annotations

from torch import Tensor, nn

from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.plan import WidthPlan


class Unshared(Pair):
    """A pair whose student owns weights of its own; it learns from the teacher through the loss.

    Both networks start as the same function. This is what the method is without its shared weights:
    mutual training with a wider network, of which only the student sees the other's logits.

    Args:
        teacher: as for `Pair`.
        student: the narrow network, which this pair takes over with its parameters.
        plan: as for `Pair`.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, plan: WidthPlan) -> None:
        owners = [dict(module._parameters) for module in student.modules()]
        super().__init__(teacher, student, plan)
        for module, parameters in zip(student.modules(), owners, strict=True):
            module._parameters.update(parameters)

    @classmethod
    def of(cls, pair: Pair) -> Unshared:
        """Give the student of a pair a copy of its weights; the pair is taken over.

        Args:
            pair: student and dynamic teacher that share their weights.
        """
        unshared = cls(pair.teacher, pair.extract(), pair.plan)
        unshared.certificate = pair.certificate
        return unshared

    def _weight(self, name: str) -> Tensor:
        return self.narrow.get_parameter(name)
