"""The LightningModule: student and dynamic teacher trained together on shared weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gpd_cli.branches import BranchInit, branch_names
from gpd_cli.data import ImageData, ImageSpec
from gpd_cli.distill.distillation import Distillation
from gpd_cli.distill.methods import KD, Batch, Method
from gpd_cli.distill.objective import Objective
from gpd_cli.distill.reused_classifier import adopt_classifier, freeze_classifier
from gpd_cli.distill.static_teacher import (
    StaticTeacherSettings,
    check_logits,
    load_static_teachers,
)
from gpd_cli.distributed.world import broadcast_from_first
from gpd_cli.errors import DataError, DivergenceError
from gpd_cli.models import (
    ModelSpec,
    check_images,
    input_shape,
    wants_published,
    with_versions,
)
from gpd_cli.teacher.checkpoint import TRAINED, exported_state
from gpd_cli.teacher.description import check_same_network, describe_run
from gpd_cli.teacher.expansion import DEFAULT_NOISE
from gpd_cli.teacher.layer_patterns import layer_patterns
from gpd_cli.teacher.networks import Alone, summary, with_teacher
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.amx import has_amx, keep_in_float32
from gpd_cli.training.averages import (
    closing_remark,
    find_averager,
    follow_weights,
    has_begun,
    leave_out_update,
    prepare_loading,
    prepare_training,
    update_of_epoch,
)
from gpd_cli.training.broken_numbers import (
    FACTOR,
    OnNan,
    are_lost,
    handle_left_out_step,
    reduced,
    remedy,
)
from gpd_cli.training.callbacks import Last
from gpd_cli.training.checks import (
    check_callbacks,
    check_counts,
    check_same_classes,
    check_same_parts,
    check_start,
    check_taught,
)
from gpd_cli.training.epoch_length import (
    ENTRY,
    EpochLength,
)
from gpd_cli.training.evaluation import EvaluatedModule, no_images
from gpd_cli.training.memory import apply_grad_checkpointing, apply_recompute_student
from gpd_cli.training.metrics import RunningAccuracy
from gpd_cli.training.optimization import configure
from gpd_cli.training.optimizers import OptimizerSettings, suitable_storage
from gpd_cli.training.progress import GapProgressBar
from gpd_cli.training.reduction import average_merged_kernels
from gpd_cli.training.remarks import images_unlike_those_of_weights, remarks
from gpd_cli.training.resuming import (
    ScheduleClock,
    check_same_optimizer,
    check_time_left,
    check_unfinished,
    group_settings,
    keep_settings,
    reopen_epoch,
)
from gpd_cli.training.settings import default_settings, method_name, plain_settings
from gpd_cli.training.speed import Speed
from gpd_cli.training.static_scores import score_static_teachers
from gpd_cli.training.updates import (
    ends_with_batch,
    is_last_update,
    scale_of_gradients,
    scale_of_loss,
    updates_done,
    updates_in_epoch,
)
from gpd_cli.training.watch import BatchCheck, StepLeftOut, StepWatch, are_finite
from gpd_cli.widening.tensors import Storage


class GapPreservingDistillation(EvaluatedModule):
    """Train a student jointly with a dynamic teacher grown out of it (Guo et al., ICLR 2025).

    With ``ratio`` 1 and ``branches`` 1 there is no dynamic teacher, and this is plain training.

    Args:
        student: the network to train: a timm model (resnet18), a torchvision classification model
            (torchvision/resnet18), a model of this package (cifar_resnet20), or the import path of
            a class or function that builds a network (mine.Net).
        student_weights: path of a timm or torchvision state dict (.pth, .pt, .safetensors) that the
            student starts from, for fine-tuning; if num_classes differs from the number of classes
            in the file, the classifier is initialized anew; by default the student starts from
            scratch.
        student_args: further keyword arguments of the student's constructor; with pretrained true
            the student starts from the weights that timm or torchvision publishes.
        num_classes: number of classes; by default the number that the student is built with.
        ratio: how many times as wide the dynamic teacher is; ratio 1 with branches 1 is the student
            alone.
        branches: how many of the paper's six branches each layer has, counting the main kernel (1
            is the main kernel alone); or names of branches or of published blocks (dbb), of which
            each layer gets those that fit it.
        noise: standard deviation of the zero-sum noise that lets the copies of a channel diverge,
            relative to the standard deviation of each weight; the noise changes no output.
        storage: the scale at which shared weights are stored: mixed, student or teacher; teacher is
            what the code of the paper's authors does, where the student moves ratio^2 times as fast
            under SGD; by default mixed for SGD, and student for optimizers whose steps do not
            depend on the size of the gradient.
        exclude: layers whose output channels are not widened: a pattern of layer names (layer4.*),
            or a list of patterns.
        width_multiple: the teacher's widths are rounded up to a multiple of this number, such as 8
            for tensor cores.
        branch_layers: which layers get branches: all means all that can have them; 3x3_stride1 is
            the paper's choice; or a pattern of layer names (layer4.*), or a list of patterns.
        branch_init: initial values of the branches: zero leaves every kernel unchanged; orepa is
            the initialization of OREPA, for training from scratch; gpd is the initialization of the
            paper's authors, with which both networks start as the function of the merged branches
            and not with the student's own weights.
        branch_width: number of inner channels of the 1x1_kxk branch, as a multiple of the number in
            the paper; 0.25 makes a step much cheaper where batches or images are small.
        shared: whether student and dynamic teacher share their weights; with false each network
            trains weights of its own, which shows what sharing is worth.
        shared_norms: whether the two share the weights of their norms, too; with false the student
            has norms of its own, which are a small part of its weights.
        static_teacher: a frozen network to distil from; by default none.
        assistants: teacher assistants: further frozen networks to distil from; the static losses
            are means over all frozen networks.
        method: how to distil from the static teacher: the name of a method's class, or the import
            path of your own class.
        stages: modules of the student whose outputs the method compares, from shallow to deep; by
            default the ends of the student's stages.
        static_weight: weight of the static teacher's losses.
        static_warmup_epochs: number of epochs over which static_weight rises linearly, epoch by
            epoch (20 is usual for DKD and ReviewKD on CIFAR-100).
        ce_weight: weight of the cross-entropy with the labels, for student and dynamic teacher.
        gap_weight: lambda, the weight of the gap loss, by which the student learns from the dynamic
            teacher.
        gap_smoothing: weight of the uniform distribution in the targets of the gap loss.
        gap_temperature: temperature of the gap loss.
        gap_warmup_epochs: number of epochs over which lambda rises linearly, epoch by epoch.
        label_smoothing: smoothing of the labels in the cross-entropy terms.
        on_nan: what happens after more than nan_steps steps in a row whose loss or gradients are
            NaN or infinite: stop ends the run; reduce_lr goes back to the weights of last.ckpt and
            halves the learning rate.
        nan_steps: how many steps in a row with NaN or infinite loss or gradients are left out,
            before on_nan applies.
        optimizer: optimizer and schedule.
        channels_last: keep kernels and images in channels-last memory format, the one that tensor
            cores work on.
        recompute_student: keep no activations of the student, and run the student a second time in
            the backward pass; a step takes a little longer, and keeps the activations of the wide
            network only.
        grad_checkpointing: keep few activations of either network, and run their blocks a second
            time in the backward pass (timm's set_grad_checkpointing).
        compile: compile the networks with torch.compile; true, or the name of a backend.
    """

    def __init__(
        self,
        student: str,
        student_weights: str | None = None,
        student_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        ratio: float = 2.0,
        branches: int | str | list[str] = 1,
        noise: float = DEFAULT_NOISE,
        storage: Storage | None = None,
        exclude: list[str] | str | None = None,
        width_multiple: int = 1,
        branch_layers: list[str] | str = "all",
        branch_init: BranchInit = "zero",
        branch_width: float = 1.0,
        shared: bool = True,
        shared_norms: bool = True,
        static_teacher: StaticTeacherSettings = StaticTeacherSettings(),  # noqa: B008 - frozen
        assistants: list[StaticTeacherSettings] | None = None,
        method: Callable[[], Method] = KD,
        stages: list[str] | None = None,
        static_weight: float = 1.0,
        static_warmup_epochs: int = 0,
        ce_weight: float = 1.0,
        gap_weight: float = 3.0,
        gap_smoothing: float = 0.1,
        gap_temperature: float = 1.0,
        gap_warmup_epochs: int = 0,
        label_smoothing: float = 0.0,
        on_nan: OnNan = "stop",
        nan_steps: int = 3,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 - frozen
        channels_last: bool = False,
        recompute_student: bool = False,
        grad_checkpointing: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # Plain values only, since checkpoints are loaded with weights_only=True.
        self.hparams.update(plain_settings(self.hparams))
        self.settings = optimizer
        names = branch_names(branches, branch_init)
        check_start(student_weights or wants_published(student, student_args), names, branch_init)
        spec = ModelSpec(student, num_classes, student_args or {})
        network = spec.build(student_weights)
        shape = input_shape(network, spec.name, spec.model_args)
        self.spec = spec.resolve(network)
        assert self.spec.num_classes is not None
        self.num_classes = self.spec.num_classes
        self.image_shape = shape
        self.storage: Storage = storage or suitable_storage(optimizer.opt)
        teachers = load_static_teachers(static_teacher, assistants, self.num_classes, shape[0])
        kept = adopt_classifier(network, teachers)
        if grad_checkpointing:
            apply_grad_checkpointing(
                network, self.spec.name, method() if teachers else None, bool(compile)
            )
        self.network = with_teacher(
            network,
            shape,
            ratio=ratio,
            branches=branches,
            noise=noise,
            without_noise=kept,
            storage=self.storage,
            exclude=exclude,
            width_multiple=width_multiple,
            branch_layers=branch_layers,
            branch_init=branch_init,
            branch_width=branch_width,
            shared=shared,
            shared_norms=shared_norms,
            generator=torch.Generator().manual_seed(torch.initial_seed() % 2**63),
        )
        if isinstance(self.network, Alone):
            self.network.runs_again = grad_checkpointing
        freeze_classifier(self.network, teachers)
        check_counts(static_warmup_epochs=static_warmup_epochs, nan_steps=nan_steps)
        check_taught(ce_weight, static_weight, bool(teachers))
        self.distillation = None
        if teachers:
            self.distillation = Distillation(
                self.network,
                teachers,
                method=method,
                shape=shape,
                stages=stages,
                weight=static_weight,
                warmup_epochs=static_warmup_epochs,
            )
        if recompute_student:
            apply_recompute_student(self.network)
        self.objective = Objective(
            gap_weight=gap_weight,
            gap_smoothing=gap_smoothing,
            gap_temperature=gap_temperature,
            gap_warmup_epochs=gap_warmup_epochs,
            ce_weight=ce_weight,
            label_smoothing=label_smoothing,
        )
        self.make_scores(self.num_classes)
        self._speed = Speed(channels_last, compile)
        self._losses = self.objective.losses
        self.live = RunningAccuracy()
        self._watch = StepWatch(self.network, nan_steps, self.distillation)
        self._rate_factor = 1.0  # factor of the schedule's learning rate, lowered by `reduce_lr`
        self._static_scores: dict[str, float] = {}
        self._clock = ScheduleClock()
        self._resumed: dict[str, Any] | None = None
        self._group_settings: list[dict[str, Any]] = []
        self._images = torch.empty(0)  # the images of the latest batch
        # Names of parameters whose gradients the pair itself averages over the processes.
        self._averaged: list[str] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of student and dynamic teacher (None without one), ``[B, C]`` each."""
        student, teacher = self.network(images)
        return student, teacher

    def setup(self, stage: str) -> None:
        """Check before the first step that the data fits the networks, and refuse it otherwise.

        Raises:
            DataError: when the numbers of classes or image channels differ.
            MethodError: when the data lacks what the distillation method needs.
            ModelError: when a network does not take images of the data's size.
            TrainingError: when there is more than one average of the weights, or a callback that a
                run cannot follow, see `check_callbacks`.
        """
        find_averager(self.trainer)
        if stage == "fit":
            check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        # The module may have been through an earlier `fit`, whose state is dropped here.
        self._clock, self._resumed, self._static_scores = ScheduleClock(), None, {}
        data = self._data()
        classes = getattr(data, "num_classes", None)
        if classes is not None and classes != self.num_classes:
            raise DataError(
                f"The data has {classes} classes but {self.spec.name} has {self.num_classes} "
                f"outputs; set --model.num_classes {classes}."
            )
        shape = getattr(data, "image_shape", None)
        if shape is not None and shape[0] != self.image_shape[0]:
            raise DataError(
                f"The images have {shape[0]} channels but {self.spec.name} takes "
                f"{self.image_shape[0]}; build it for {shape[0]} (timm: --model.student_args "
                f"'{{in_chans: {shape[0]}}}') or set --data.in_chans {self.image_shape[0]}."
            )
        if stage != "fit" and isinstance(data, ImageData):
            mean, std = data.preprocessing.statistics
            images = ImageSpec(mean=mean, std=std)  # the whole one would open the training images
            for remark in images_unlike_those_of_weights(self.hparams, self.network, None, images):
                rank_zero_info(remark)
        if stage == "fit" and self.distillation is not None:
            self.distillation.prepare(data, self.network, shape)
        if stage == "fit":
            self._divide_reduction()
            self._speed.set_memory_format(self.network, self.distillation)
        if shape is None or shape == self.image_shape:
            return
        check_images(self.network.outline(), shape, "--model.student_args")
        self.image_shape = shape

    def on_fit_start(self) -> None:
        """Put both networks into train mode, and prepare average, compilation and schedule.

        Lightning leaves every module in the mode that it is in.
        """
        self.train()
        if (averager := find_averager(self.trainer)) is not None:
            prepare_training(averager, self)
        # DistributedDataParallel broadcasts all other parameters.
        broadcast_from_first((self.get_parameter(name) for name in self._averaged), self.device)
        rank_zero_info(summary(self.spec.name, self.network))
        defaults = plain_settings(default_settings(GapPreservingDistillation))
        images = ImageSpec.of(self._data())
        for remark in remarks(self.hparams, defaults, self.network, self.distillation, images):
            rank_zero_info(remark)
        trainer = self.trainer
        if self.distillation is not None and not self._static_scores:
            teachers = self.distillation.teachers
            self._static_scores = score_static_teachers(trainer, self, teachers, self.num_classes)
        self._speed.prepare(self.network, self.distillation)
        self._losses = self._speed.compiled(self.objective.losses)
        if has_amx():
            keep_in_float32(self.network)
        if trainer.lr_scheduler_configs and trainer.max_steps == -1:
            self._clock.updates_per_epoch = updates_in_epoch(trainer)
        # At this point the optimizer exists, and has not loaded the checkpoint's state yet.
        self._group_settings = group_settings(trainer.optimizers[0])

    def on_train_start(self) -> None:
        """Resume with the run's own settings; save the start of a run that may return to it."""
        if self._resumed is not None:
            self._take_up(self._resumed)
        if self.hparams["on_nan"] == "reduce_lr":
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, Last):
                    callback.save_start(self.trainer)

    def _take_up(self, schedule: dict[str, Any]) -> None:
        """Continue with the run's own settings, at the checkpoint's position in the schedule.

        Args:
            schedule: the checkpoint's entry ``schedule``.
        """
        keep_settings(self.trainer.optimizers[0], self._group_settings)
        self._clock.resume(schedule, self.trainer.global_step, updates_done(self.trainer))
        self._rate_factor = schedule.get("rate_factor", 1.0)
        if not self.trainer.lr_scheduler_configs:
            self._reduce_rates(self._rate_factor)
        for config in self.trainer.lr_scheduler_configs:
            self.lr_scheduler_step(config.scheduler, None)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """One joint step: the losses of both networks, summed for a single backward pass."""
        images, labels, *indices = batch
        self._images = images = self._speed.arrange(images)
        self._watch.remember()
        student, teacher = self(images)
        terms = self.objective.weighted(self._losses(student, teacher, labels), self.current_epoch)
        logits = (
            {"student": student} if teacher is None else {"student": student, "teacher": teacher}
        )
        if self.distillation is not None:
            known = Batch(labels, *indices)
            terms |= self.distillation(logits, images, known, epoch=self.current_epoch)
        loss = torch.stack(list(terms.values())).sum()
        logits = {name: value.detach() for name, value in logits.items()}
        values = {name: term.detach() for name, term in terms.items()}
        outputs = list(logits.values())
        self._watch.begin(BatchCheck.of(values, images, outputs, self.current_epoch, batch_idx))
        self.log_batch("train", logits, values | {"total": loss.detach()}, labels)
        self._show(logits, labels)
        if ends_with_batch(self.trainer):
            # Logged here, so that callbacks find the scores at the epoch's end.
            self.log_scores("train")
        return loss * scale_of_loss(self.trainer, batch_idx)

    def _show(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """Update the running accuracies for the progress bar, if there is one.

        `GapProgressBar` reads the accuracies only when it redraws. For any other bar they are
        logged after each batch, for which Lightning waits until the device has computed them.
        """
        bar = self.trainer.progress_bar_callback
        if bar is None:
            return
        self.live.update(logits, labels)
        if not isinstance(bar, GapProgressBar):
            self.log_dict(self.live.shown(), prog_bar=True, logger=False)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the step out if NaN or infinite gradients would break the weights.

        Raises:
            ModelError: when NaN or infinite logits of a static teacher are the cause.
            StepLeftOut: when the step is left out and there is no gradient scaler. (With a scaler
                the gradients are removed, and the scaler skips the optimizer by itself.)
            DataError: when the run has to stop because of images with NaN or infinite pixels.
            DivergenceError: when too many steps in a row had to be left out for another reason, or
                the weights give no finite logits any more.
        """
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in weights if p.grad is not None]
        what = self._watch.judge(gradients, self._name_images)
        if what is None:
            batch: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            if (scale := scale_of_gradients(self.trainer, batch.ready - 1)) != 1:
                torch._foreach_mul_(gradients, scale)
            return
        self._check_static_teachers()
        self._watch.undo()
        with self.trainer.precision_plugin.forward_context():
            lost = self._watch.all_logits_broken and are_lost(self.network, self._images)
        on_nan, settings = self.hparams["on_nan"], self._group_settings
        if not handle_left_out_step(self._watch, self.trainer, self, what, on_nan, settings, lost):
            self._rate_factor = reduced(self._rate_factor, self.trainer)
            self._reduce_rates()
        if (averager := find_averager(self.trainer)) is not None:
            leave_out_update(averager, self.trainer)
        for weight in weights:
            weight.grad = None
        # A gradient scaler notices infinite gradients by itself, and then skips the optimizer.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise StepLeftOut

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the run at its limit of updates, so that the last weights are validated."""
        if is_last_update(self.trainer, self.trainer.global_step):
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Count the epoch's accuracies from zero."""
        self.train_scores.reset()
        self._watch.begin_epoch()

    def on_validation_start(self) -> None:
        """Stop if the weights are NaN or infinite; give all processes the same running statistics.

        An update of the weight average that is due at the end of the epoch is made here, before the
        validation that scores the average.
        """
        self._check_numbers()
        # Checkpoints have the running statistics of the first process; validation takes the same.
        broadcast_from_first(self.network.buffers(), self.device)
        if (averager := find_averager(self.trainer)) is not None:
            update_of_epoch(averager, self.trainer, self)
            averaged: Any = averager._average_model
            broadcast_from_first(averaged.module.network.buffers(), self.device)
        self._hold_back_average()

    def on_train_epoch_end(self) -> None:
        """Copy the trained weights into an average that has not begun.

        Lightning makes the average the module's weights when training ends.

        Raises:
            DataError: when the epoch had no batch, as that of an empty stream.
        """
        if not self.trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            raise no_images(self.trainer, "train")
        self._hold_back_average()

    def on_train_end(self) -> None:
        """Print a remark if the average never began, or still holds much of the initial weights."""
        averager = find_averager(self.trainer)
        if averager is not None and (remark := closing_remark(averager)):
            rank_zero_info(remark)

    def _hold_back_average(self) -> None:
        averager = find_averager(self.trainer)
        if averager is not None and not has_begun(averager):
            follow_weights(averager, self)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies and the gap, and the accuracies of the static teachers."""
        super().on_validation_epoch_end()
        values = {f"val/{name}": value for name, value in self._static_scores.items()}
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add architecture and width plan to the checkpoint, which is all that extraction needs.

        While the average of the weights has not begun, the checkpoint has the trained weights where
        the average would be.

        Raises:
            DivergenceError: when the weights are NaN or infinite; no checkpoint is written then.
        """
        self._check_numbers()
        checkpoint["gpd"] = self._description(ImageSpec.of(self._data()))
        checkpoint["class_names"] = self._class_names()
        checkpoint["static_scores"] = {"of": self._static_titles(), "values": self._static_scores}
        trainer = self.trainer
        checkpoint["run_length"] = {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
        }
        checkpoint[ENTRY] = EpochLength.of(trainer).state()
        checkpoint["schedule"] = self._clock.state(trainer.global_step, updates_done(trainer))
        checkpoint["schedule"]["rate_factor"] = self._rate_factor
        averager = find_averager(trainer)
        if averager is not None and not has_begun(averager):
            # The averaging callback has swapped the weights before this hook.
            checkpoint["state_dict"] = checkpoint.get(TRAINED, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that this run cannot resume, before the weights are loaded.

        If the checkpoint's run kept an average of the weights and this run does not, this run
        continues from the trained weights.

        Raises:
            DataError: when the classes of the data are numbered differently than in the checkpoint.
            TrainingError: when the checkpoint's run is finished, or its optimizer differs.
            WeightsError: when student, ratio, branches, storage or the trained parts of the
                distillation method differ.
        """
        check_same_network(checkpoint.get("gpd"), self._description())
        self._check_classes(checkpoint)
        if self.trainer.state.fn != TrainerFn.FITTING:
            checkpoint["state_dict"], _ = exported_state(checkpoint)
        state, prefix = checkpoint["state_dict"], "distillation."
        parts = {n.removeprefix(prefix): state[n] for n in state if n.startswith(prefix)}
        if self.trainer.state.fn == TrainerFn.FITTING:
            if (averager := find_averager(self.trainer)) is None:
                checkpoint["state_dict"] = checkpoint.get(TRAINED, state)
            else:
                prepare_loading(averager)
            before = checkpoint.get("hyper_parameters", {})
            check_same_parts(
                parts,
                self.distillation,
                method_name(before.get("method")),
                method_name(self.hparams["method"]),
            )
            reopen_epoch(checkpoint, checkpoint.get(ENTRY, {}).get("batches"))
            check_unfinished(checkpoint, self.trainer.max_epochs, self.trainer.max_steps)
            check_time_left(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
            check_same_optimizer(before.get("optimizer", {}), self.settings)
            # Schedules are functions of the settings and the number of updates.
            checkpoint["lr_schedulers"] = []
            self._resumed = checkpoint.get("schedule", {})
            scored = checkpoint.get("static_scores", {})
            if scored.get("of") == self._static_titles():
                self._static_scores = scored["values"]
        elif self.distillation is None:  # an evaluation does not need the trained parts
            for name in parts:
                del state[prefix + name]
        checkpoint["state_dict"] = with_versions(checkpoint["state_dict"], self)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from timm."""
        return configure(self.network, self.distillation, self.settings, self.trainer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then free the gradients, whose memory the next forward pass needs."""
        with suppress(StepLeftOut):
            super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad()
        self._images = torch.empty(0)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the learning rates by the number of updates, which timm's schedules depend on."""
        scheduler.step_update(self._clock.updates(self.trainer.global_step))
        self._reduce_rates(self._rate_factor)

    def _reduce_rates(self, factor: float = FACTOR) -> None:
        """Multiply the learning rates by a factor; a schedule overwrites them after each step."""
        if factor != 1:
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= factor

    def _check_numbers(self) -> None:
        """Stop the run before weights that are NaN or infinite are scored or saved.

        Steps that were left out have not changed the weights. Whether a series of them stops the
        run is decided in `on_before_optimizer_step`. If a step is about to be left out, the running
        statistics of its batches are left out here.

        Raises:
            ModelError: when the logits of a static teacher are NaN or infinite.
            DivergenceError: when weights are NaN or infinite.
        """
        self._check_static_teachers()
        self._watch.undo_broken_batches()
        if not are_finite(self.network):
            raise DivergenceError(
                f"The weights became NaN or infinite by step {self.trainer.global_step}; "
                f"{remedy(self.trainer, self.hparams['on_nan'])}"
            )

    def _check_static_teachers(self) -> None:
        """Raise an error if a static teacher's logits caused the last step to be left out.

        When the images themselves had NaN or infinite pixels, the teachers are not checked.
        """
        for teacher in [] if self.distillation is None else self.distillation.teachers:
            if self._watch.is_suspicious:
                check_logits([teacher], self.device)
            teacher.finite = None

    def _name_images(self, batch: int, places: Sequence[int]) -> list[str]:
        name = getattr(self._data(), "name_images", None)
        if name is None:
            return [f"image {place + 1} of the batch" for place in places]
        return list(name(batch, places))

    def _divide_reduction(self) -> None:
        """Name the tensors that DistributedDataParallel does not have to synchronize.

        These are tensors that are the same in all processes, and parameters of layers with branches
        whose gradients the pair averages itself.
        """
        ignored = []
        if self.distillation is not None:
            ignored = [f"distillation.{name}" for name in self.distillation.same_everywhere()]
        is_spread = isinstance(self.trainer.strategy, DDPStrategy) and self.trainer.world_size > 1
        if is_spread and isinstance(self.network, Pair):
            batches = self.trainer.accumulate_grad_batches
            names = average_merged_kernels(self.network, batches)
            self._averaged = [f"network.{name}" for name in names]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, ignored + self._averaged
        )

    def _data(self) -> Any:
        """The data module; None for a run without one."""
        return getattr(self.trainer, "datamodule", None)

    def _class_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers, if the data module knows them."""
        return getattr(self._data(), "class_names", None)

    def _check_classes(self, checkpoint: dict[str, Any]) -> None:
        names = self._class_names()
        if names is not None:
            spec = getattr(self._data(), "spec", None)
            is_folder = bool(getattr(spec, "is_folder", False))
            check_same_classes(checkpoint.get("class_names"), names, is_folder)

    def _static_titles(self) -> list[str]:
        return [] if self.distillation is None else [t.title for t in self.distillation.teachers]

    def _description(self, images: ImageSpec | None = None) -> dict[str, Any]:
        chosen = self.hparams
        return describe_run(
            self.network,
            self.spec,
            self.image_shape,
            branch_names(chosen["branches"], chosen["branch_init"]),
            layer_patterns(chosen["branch_layers"]),
            self.storage,
            chosen["branch_width"],
            images,
        )
