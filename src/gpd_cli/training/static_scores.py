"""Validation accuracy of the static teachers, measured once when a run begins.

A static teacher that was trained with another class order or other preprocessing teaches nonsense,
and the losses do not reveal this. So the user is warned if the accuracy is no better than chance,
or would be far better under another class order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from gpd_cli.distill.static_teacher import StaticTeacher, check_logits
from gpd_cli.distributed.world import world_size
from gpd_cli.training.class_order import (
    MAX_CLASSES,
    ClassOrder,
    count_by_halves,
    find_class_order,
)
from gpd_cli.training.metrics import Scores

_DEVIATIONS = 2  # accuracies at most this many standard deviations above chance count as chance
_SHOWN = 4  # most renumbered classes that a warning lists


def names_of(teachers: Sequence[StaticTeacher]) -> list[str]:
    """Names of static teachers in the log: static, assistant_1, assistant_2, ..."""
    return ["static", *(f"assistant_{k}" for k in range(1, len(teachers)))][: len(teachers)]


def score_static_teachers(
    trainer: Trainer,
    module: LightningModule,
    teachers: Sequence[StaticTeacher],
    num_classes: int,
) -> dict[str, float]:
    """Measure the accuracies of static teachers on the validation images, and print them.

    All processes have to call this function together. The state of the random generators does not
    change.

    Args:
        trainer: the run's trainer.
        module: the run's module, whose hooks prepare the batches.
        teachers: the static teacher, followed by the assistants.
        num_classes: number of classes.

    Returns:
        Accuracies in percent by name (``static_top1``, ``assistant_1_top1``, and the same for
        top-5); empty if there are no validation images.

    Raises:
        ModelError: when the logits of a static teacher are not finite.
    """
    names = names_of(teachers)
    scores = Scores(names, num_classes).to(module.device)
    counts = torch.zeros(num_classes, dtype=torch.long, device=module.device)
    labelled: list[Tensor] = []
    predicted: dict[str, list[Tensor]] = {name: [] for name in names}
    with isolate_rng(), torch.no_grad():
        for images, labels in _validation_batches(trainer, module):
            logits = {}
            for name, teacher in zip(names, teachers, strict=True):
                with trainer.precision_plugin.val_step_context():
                    logits[name] = teacher(images)
            scores.update(logits, labels)
            classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
            counts += torch.bincount(classes, minlength=num_classes)
            labelled.append(classes)
            for name in names:
                predicted[name].append(logits[name].argmax(dim=1))
    check_logits(teachers, module.device)
    if world_size() > 1:
        dist.all_reduce(counts)
    if not counts.sum():
        return {}
    values = {name: float(value) for name, value in scores.compute().items()}
    for name, teacher in zip(names, teachers, strict=True):
        order = _class_order(labelled, predicted[name], counts)
        _tell(teacher, values[f"{name}_top1"], counts, order)
    return values


def is_chance(accuracy: float, counts: Tensor) -> bool:
    """Whether an accuracy is not significantly better than that of guessing.

    Args:
        accuracy: accuracy in percent.
        counts: number of images of each class, ``[C]``.

    Example:
        >>> is_chance(12.0, torch.full((10,), 10)), is_chance(20.0, torch.full((10,), 10))
        (True, False)
    """
    chance, images = 1 / len(counts), int(counts.sum())
    margin = _DEVIATIONS * math.sqrt(chance * (1 - chance) / images)
    return accuracy / 100 <= chance + margin


def _class_order(
    labels: Sequence[Tensor], predictions: Sequence[Tensor], counts: Tensor
) -> ClassOrder | None:
    """Look for a better order of a teacher's classes, on the images of all processes.

    Args:
        labels: labels of this process's images, ``[B]`` per batch.
        predictions: the teacher's predicted classes for these images, ``[B]`` per batch.
        counts: number of images of each class over all processes, ``[C]``.

    Returns:
        The better order; None if there is none, or if there are too many classes to look for one.
    """
    if len(counts) > MAX_CLASSES:
        return None
    none = counts.new_zeros(0)  # lets torch.cat work in a process without images
    pairs = count_by_halves(
        torch.cat([none, *labels]), torch.cat([none, *predictions]), len(counts)
    )
    if world_size() > 1:
        dist.all_reduce(pairs)
    return find_class_order(pairs)


def _tell(
    teacher: StaticTeacher, accuracy: float, counts: Tensor, order: ClassOrder | None
) -> None:
    text = f"{teacher.title}: {accuracy:.2f}% of {int(counts.sum()):,} validation images right"
    if order is not None:
        pairs = [f"its {output} is {label} here" for output, label in order.classes.items()]
        shown = ", ".join(pairs[:_SHOWN]) + (", ..." if len(pairs) > _SHOWN else "")
        rank_zero_info(
            f"Warning: {text}, and about {order.accuracy:.0f}% with {len(pairs)} of its "
            f"{len(counts)} classes renumbered ({shown}); it was trained with another order of the "
            "classes, such as 0, 1, 10, 2 instead of 0, 1, 2, 10."
        )
        return
    if not is_chance(accuracy, counts):
        rank_zero_info(text)
        return
    chance = 100 / len(counts)
    rank_zero_info(
        f"Warning: {text}, which is no better than guessing ({chance:.2f}%); it was probably "
        "trained with another order of the classes, or on images that were prepared in another way "
        "(--data.mean, --data.std, --data.image_size)."
    )


def _validation_batches(
    trainer: Trainer, module: LightningModule
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of the validation data, prepared as for `validation_step`."""
    if not trainer.enable_validation:
        return
    trainer.validating = True  # data modules treat training batches differently
    try:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
        for number, (loader, limit) in enumerate(
            zip(loaders, trainer.num_val_batches, strict=True)
        ):
            for batch in islice(loader, None if limit == math.inf else int(limit)):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=number)
                images, labels, *_ = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
                yield images, labels
    finally:
        trainer.training = True
