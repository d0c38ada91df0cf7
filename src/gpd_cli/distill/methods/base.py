"""The base class of distillation methods, which compare a trained network with a static teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.errors import MethodError

Need = Literal["stages", "pooled", "embedding", "indices"]
FEATURES: frozenset[Need] = frozenset({"stages", "pooled", "embedding"})
"""Those needs of methods that feature hooks have to read inside the networks."""


@dataclass(frozen=True)
class Batch:
    """Labels and indices of a batch.

    Args:
        labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.
        indices: positions of the images in the training split, ``[B]``, for methods that need them.
    """

    labels: Tensor
    indices: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """One class per image, ``[B]``; for soft labels the class with the largest weight."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(dim=1)


class Method(nn.Module):
    """A distillation loss between a trained network and a static teacher.

    One instance serves the student and another the dynamic teacher. Each instance has its own
    trained parts (connectors), which `build` makes for the network's widths. To add a method, write
    a subclass with a `forward`, and choose it by its class path. Its settings are the arguments of
    its constructor, which the command line checks by their type hints.

    Attributes:
        needs: what the loss needs besides logits: ``stages`` (feature maps), ``pooled`` (the map
            whose mean over positions is the embedding, as the only stage; no stage without such a
            map), ``embedding`` (with the classifier's weight), ``indices`` (of the images in the
            training split; the method then has a setting ``num_images``, their number).
        one_label: whether the method is defined for one class per image only, and refuses mixed
            images (mixup, CutMix).
        same_everywhere: names of buffers that all processes keep equal by themselves, and that
            DDP therefore does not broadcast.
        stays_finite: names of buffers that the method keeps free of NaN and infinite numbers. All
            other buffers are copied before each step, and restored if the step is left out because
            of such numbers; a large memory belongs here, so that it is not copied.
        student_preactivation: whether stages of the trained network, student or dynamic teacher,
            are taken before their activation.
        static_preactivation: whether stages of the static teacher are taken before their
            activation.
        reuses_classifier: whether the student has to end in the static teacher's classifier.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    one_label: ClassVar[bool] = False
    reuses_classifier: ClassVar[bool] = False
    same_everywhere: ClassVar[frozenset[str]] = frozenset()
    stays_finite: ClassVar[frozenset[str]] = frozenset()
    student_preactivation: bool = False
    static_preactivation: bool = False

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Make the trained parts; a method without any need not override this.

        Args:
            network: stages and classifier of the trained network, with their widths.
            teacher: stages and classifier of the static teacher, with their widths.

        Raises:
            MethodError: when the method does not suit the two networks.
        """

    def check_maps(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check the sizes of the feature maps for images of the data's size; by default do nothing.

        The sizes that `build` gets are those for images that each network was made for.

        Args:
            network: stages and classifier of the trained network, for images of the data's size.
            teacher: stages and classifier of the static teacher, for images of the data's size.

        Raises:
            MethodError: when the method would learn nothing from maps of these sizes.
        """

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the loss, a mean over the batch.

        Logits and embeddings are in float32 or better; feature maps have the dtype of the network's
        activations (bfloat16 under mixed precision).

        Args:
            network: outputs of the trained network, with graph.
            teacher: outputs of the static teacher, without graph.
            batch: labels, and indices if needed.

        Returns:
            A scalar, in float32 or better.
        """
        raise NotImplementedError

    def same_stages(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that both networks have the same number of stages, one or more.

        Args:
            network: stages and classifier of the trained network.
            teacher: stages and classifier of the static teacher.

        Raises:
            MethodError: when the numbers differ or are 0.
        """
        ours, theirs = len(network.stages), len(teacher.stages)
        if ours != theirs or not ours:
            raise MethodError(
                f"{type(self).__name__} compares networks stage by stage, but the trained network "
                f"has {ours} stages and the static teacher {theirs}; name as many modules in "
                "--model.stages as in --model.static_teacher.stages."
            )


def check_weight(weight: float) -> None:
    """Check that the weight of a loss is a finite number, 0 or more.

    Raises:
        MethodError: when the weight is less than 0, infinite or NaN.
    """
    if not 0 <= weight < math.inf:
        raise MethodError(f"The weight of a loss must be 0 or more and finite, not {weight}.")


def check_temperature(temperature: float) -> None:
    """Check that a temperature is a finite number above 0.

    Raises:
        MethodError: when the temperature is 0 or less, infinite or NaN.
    """
    if not 0 < temperature < math.inf:
        raise MethodError(f"The temperature must be above 0 and finite, not {temperature}.")
