"""Distillation from static teachers: methods, feature hooks and weighted losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureHooks, FeatureInfo, Outputs, at_size, find_features
from gpd_cli.distill.methods import Batch, Method
from gpd_cli.distill.methods.base import FEATURES
from gpd_cli.distill.objective import warmed_up
from gpd_cli.distill.precision import in_float32
from gpd_cli.distill.reused_classifier import check_reused
from gpd_cli.distill.static_teacher import StaticTeacher
from gpd_cli.errors import MethodError
from gpd_cli.models import check_images
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair


class Distillation(nn.Module):
    """The losses of the trained networks against the static teachers.

    There is one `Method` for each trained network (student, dynamic teacher) and each static
    teacher, and feature hooks on all networks. The loss of a trained network is the mean over the
    static teachers; with teacher assistants among them this is densely guided distillation (Son et
    al., ICCV 2021).

    Args:
        network: the network that is trained, which gets hooks where the method needs features.
        teachers: the static teachers, one or more.
        method: function without arguments that makes a method; it is called once for each trained
            network and static teacher.
        shape: image shape that the network was made for, ``(C, H, W)``.
        stages: names of the modules whose outputs are the student's stages; found by default.
        weight: weight of the losses.
        warmup_epochs: number of epochs over which the weight rises to its value, by an equal step
            in each.

    Raises:
        MethodError: when the method does not suit the networks, or has no loss.
    """

    def __init__(
        self,
        network: Pair | Alone,
        teachers: Sequence[StaticTeacher],
        *,
        method: Callable[[], Method],
        shape: tuple[int, int, int],
        stages: Sequence[str] | None = None,
        weight: float = 1.0,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        self._weight, self._warmup = weight, warmup_epochs
        self.teachers = list(teachers)
        kind = _checked(method())
        self.needs, self._one_label, self._name = kind.needs, kind.one_label, type(kind).__name__
        self._num_images = getattr(kind, "num_images", None)
        if kind.reuses_classifier:
            check_reused(network, self.teachers, self._name)
        trained = _trained(network)
        # The outline, since the student's own module in the pair has weights only while it runs.
        before = kind.student_preactivation
        infos = {"student": self._feature_info(network.outline(), shape, stages, before)}
        if isinstance(network, Pair):
            like = infos["student"]
            infos["teacher"] = self._feature_info(network.teacher, shape, None, before, like)
        before = kind.static_preactivation
        theirs = [self._feature_info(t.network, t.shape, t.stages, before) for t in self.teachers]
        self._shape, self._infos = shape, (infos["student"], theirs)
        self.methods = nn.ModuleDict()
        for name in trained:
            made = [method() for _ in theirs]
            for one, there in zip(made, theirs, strict=True):
                one.build(infos[name], there)
            self.methods[name] = nn.ModuleList(made)
        self._hooks = {name: FeatureHooks(module, infos[name]) for name, module in trained.items()}
        self._teacher_hooks = [
            FeatureHooks(t.network, p) for t, p in zip(self.teachers, theirs, strict=True)
        ]

    def forward(
        self, logits: Mapping[str, Tensor], images: Tensor, batch: Batch, epoch: int = 0
    ) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss; to be called right after the networks have run.

        Args:
            logits: the logits of ``student`` and (if any) dynamic ``teacher``, ``[B, C]``, from the
                run on these images, whose features the hooks have kept.
            images: a batch, ``[B, C, H, W]``.
            batch: labels, and indices if the method needs them.
            epoch: number of finished epochs.

        Returns:
            Scalars by name: ``student_static``, and ``teacher_static`` with a dynamic teacher.
        """
        if self._one_label and batch.labels.ndim > 1:
            raise MethodError(
                f"{self._name} needs one class per image, which mixing does not leave; set "
                "--data.mixup 0 --data.cutmix 0."
            )
        ours = {name: _in_float32(self._hooks[name].take(value)) for name, value in logits.items()}
        theirs = [
            _in_float32(hooks.take(teacher(images)))
            for teacher, hooks in zip(self.teachers, self._teacher_hooks, strict=True)
        ]
        weight = self._weight * warmed_up(epoch, self._warmup)
        terms = {}
        for name, outputs in ours.items():
            methods = self._methods(name)
            losses = [m(outputs, t, batch) for m, t in zip(methods, theirs, strict=True)]
            terms[f"{name}_static"] = weight * torch.stack(losses).mean()
        return terms

    def prepare(
        self, data: Any, network: Pair | Alone, shape: tuple[int, int, int] | None = None
    ) -> None:
        """Check that data and static teachers suit the method.

        For a method that needs image indices, this also lets the data module return them.

        Args:
            data: the data module.
            network: the network that is trained.
            shape: image shape of the data, ``(C, H, W)``, if known.

        Raises:
            MethodError: when the method needs image indices and the data cannot give them, when the
                number of training images is not the one in the method's settings, or when images of
                this size lead to feature maps that are too small for the method.
            ModelError: when a network does not take images of this size.
        """
        if shape is not None:
            self._check_size(network, shape)
        if "indices" not in self.needs:
            return
        if not (hasattr(data, "with_indices") and hasattr(data, "num_train")):
            raise MethodError(
                f"{self._name} needs the index of every training image; train with gpd's data "
                "module (ImageData), or with one that has the attributes with_indices (whether "
                "batches have indices) and num_train (the number of training images)."
            )
        data.with_indices = True
        if self._num_images != data.num_train:
            raise MethodError(
                f"{self._name} keeps a memory of every training image; set "
                f"--model.method.num_images {data.num_train}, the number of training images."
            )

    def _check_size(self, network: Pair | Alone, shape: tuple[int, int, int]) -> None:
        """Check that networks and method suit the data's images.

        Networks and methods were made for the image size of each network, which may differ.
        """
        student, theirs = self._infos
        if shape != self._shape:
            outline = network.outline()
            check_images(outline, shape, "--model.student_args")
            student = at_size(outline, student, shape) if student.stages else student
        for teacher, info, method in zip(
            self.teachers, theirs, self._methods("student"), strict=True
        ):
            if shape != teacher.shape:
                is_first = teacher is self.teachers[0]
                option = "--model.static_teacher.args" if is_first else "args in --model.assistants"
                check_images(teacher.network, shape, option)
                info = at_size(teacher.network, info, shape) if info.stages else info
            method.check_maps(student, info)

    def same_everywhere(self) -> list[str]:
        """Names of the buffers that are equal in all processes without broadcasts by DDP."""
        return self._names(lambda method: method.same_everywhere)

    def stays_finite(self) -> list[str]:
        """Names of the buffers that never take in a NaN, and so need not be restored after one."""
        return self._names(lambda method: method.stays_finite)

    @property
    def takes_stages(self) -> bool:
        """Whether the method compares networks by outputs of their stages."""
        return bool(self.needs & {"stages", "pooled"})

    def _names(self, chosen: Callable[[Method], frozenset[str]]) -> list[str]:
        return [
            f"methods.{name}.{k}.{buffer}"
            for name in self.methods
            for k, method in enumerate(self._methods(name))
            for buffer in chosen(method)
        ]

    def _methods(self, name: str) -> list[Method]:
        methods = self.methods[name]
        assert isinstance(methods, nn.ModuleList)
        return [m for m in methods if isinstance(m, Method)]

    def _feature_info(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        names: Sequence[str] | None,
        preactivation: bool,
        like: FeatureInfo | None = None,
    ) -> FeatureInfo:
        if not self.needs & FEATURES:
            return FeatureInfo()
        pooled = "pooled" in self.needs
        if not self.takes_stages:
            names, like = [], None
        found = find_features(
            network, shape, names=names, like=like, pooled=pooled, preactivation=preactivation
        )
        if "embedding" not in self.needs:
            found = replace(found, classifier=None)
        return found


def _checked(method: Method) -> Method:
    """Return a method after the check that it has a loss.

    Raises:
        MethodError: when the method's class has no `forward` of its own.
    """
    if type(method).forward is Method.forward:
        raise MethodError(
            f"{type(method).__name__} does not define forward; write a method forward that "
            "computes the loss."
        )
    return method


def _trained(network: Pair | Alone) -> dict[str, nn.Module]:
    """The trained modules by name: ``student``, and ``teacher`` with a dynamic teacher."""
    if isinstance(network, Pair):
        return {"student": network.narrow, "teacher": network.teacher}
    return {"student": network.network}


def _in_float32(outputs: Outputs) -> Outputs:
    """Convert outputs, except feature maps, to float32 or better.

    Losses need more than half precision; methods convert feature maps themselves.
    """

    def converted(value: Tensor | None) -> Tensor | None:
        return None if value is None else in_float32(value)

    return replace(
        outputs,
        logits=in_float32(outputs.logits),
        embedding=converted(outputs.embedding),
        weight=converted(outputs.weight),
        bias=converted(outputs.bias),
    )
