"""What every static-teacher method is: a comparison of a trained network with a frozen one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from gpd_cli.distill.features import Outputs, Places
from gpd_cli.errors import MethodError

Need = Literal["stages", "pooled", "embedding", "indices"]


@dataclass(frozen=True)
class Batch:
    """What is known of a batch besides its images.

    Args:
        labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.
        indices: the images' numbers in the training split, ``[B]``, for methods that need them.
    """

    labels: Tensor
    indices: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """One class per image, ``[B]``: of soft labels the largest."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(dim=1)


class Method(nn.Module):
    """A distillation loss between a trained network and a static teacher.

    One instance serves the student and another one the dynamic teacher, each with trained parts
    (connectors) of its own, made in `build` for the widths of its network. A method of one's own
    is a subclass with a `forward`, chosen by its class path; its settings are the arguments of its
    constructor, with type hints, which the command line checks them by.

    Attributes:
        needs: what has to be caught besides logits: ``stages`` (feature maps), ``pooled`` (as the
            only stage the map whose mean over its positions is the embedding; none where there is
            no such map), ``embedding`` (with the classifier's weight), ``indices`` (of the images
            in the training split; the method then has an attribute ``num_images``, a setting that
            says how many there are).
        one_label: whether the method is defined for one class per image only, and refuses mixed
            images (mixup, CutMix).
        same_everywhere: names of buffers that all processes keep equal by themselves, and that
            therefore are not sent around in every step.
        student_preactivation: whether stages of the trained network, student or dynamic teacher,
            are caught before their activation.
        static_preactivation: whether those of the static teacher are.
        reuses_classifier: whether the student has to end in the static teacher's classifier.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    one_label: ClassVar[bool] = False
    reuses_classifier: ClassVar[bool] = False
    same_everywhere: ClassVar[frozenset[str]] = frozenset()
    student_preactivation: bool = False
    static_preactivation: bool = False

    def build(self, network: Places, teacher: Places) -> None:
        """Make the trained parts; the default has none.

        Args:
            network: widths of the trained network's features.
            teacher: widths of the static teacher's.

        Raises:
            MethodError: when the method does not suit the two networks.
        """

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The loss, a scalar and a mean over the batch, in float32 or better.

        Logits and embeddings come in float32 or better, feature maps in the type they were
        computed in (bfloat16 under mixed precision).

        Args:
            network: what the trained network computed, with graph.
            teacher: what the static teacher computed, without graph.
            batch: labels, and indices if needed.
        """
        raise NotImplementedError

    def same_stages(self, network: Places, teacher: Places) -> None:
        """Check that both networks have the same number of stages, one or more.

        Raises:
            MethodError: when they have not.
        """
        ours, theirs = len(network.stages), len(teacher.stages)
        if ours != theirs or not ours:
            raise MethodError(
                f"{type(self).__name__} compares networks stage by stage, but the trained network "
                f"has {ours} and the static teacher {theirs}; name as many modules in "
                "--model.stages as in --model.static_teacher.stages."
            )


def check_weight(weight: float) -> None:
    """Check the weight of a loss.

    Raises:
        MethodError: when it is less than 0, or no number.
    """
    if not 0 <= weight < math.inf:
        raise MethodError(f"The weight of a loss must be 0 or more, not {weight}.")


def check_temperature(temperature: float) -> None:
    """Check a temperature.

    Raises:
        MethodError: when it is not more than 0, or no number.
    """
    if not 0 < temperature < math.inf:
        raise MethodError(f"The temperature must be more than 0, not {temperature}.")
