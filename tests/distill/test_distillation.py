"""How methods meet the networks of a run: features, widths, assistants, labels."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods import AT, CATKD, CRD, KD, Batch, FitNets, Method, SimKD
from gpd_cli.distill.methods.kd import kd_loss
from gpd_cli.distill.methods.reviewkd import ReviewKD
from gpd_cli.distill.methods.simkd import mean_of_copies
from gpd_cli.distill.static_teacher import StaticTeacherSettings
from gpd_cli.errors import GpdError, MethodError, ModelError
from gpd_cli.files import save_tensors
from gpd_cli.models import ReusedClassifier
from gpd_cli.teacher.networks import with_teacher
from gpd_cli.training.module import GapPreservingDistillation

STUDENT = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
TEACHER = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [6, 6, 12, 12]}
IMAGES, CLASSES = 4, 10
ZERO = torch.zeros(())


class Hints(Method):
    """A method of a user's own, with trained parts and everything it can ask for."""

    needs = frozenset({"stages", "embedding"})

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        self.same_stages(network, teacher)
        pairs = zip(network.stages, teacher.stages, strict=True)
        self.fit = nn.ModuleList(nn.Conv2d(a.channels, b.channels, 1) for a, b in pairs)
        self.project = nn.Linear(network.embedding, teacher.embedding)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        assert network.embedding is not None and teacher.embedding is not None
        assert network.weight is not None
        assert network.weight.shape == (CLASSES, network.embedding.shape[1])
        loss = (self.project(network.embedding) - teacher.embedding).square().mean()
        for fit, ours, theirs in zip(self.fit, network.stages, teacher.stages, strict=True):
            loss = loss + (fit(ours) - theirs).square().mean()
        return self.scale * loss


class OneLabel(Method):
    one_label = True

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return network.logits.sum()


def static_weights(folder: Path, seed: int = 0, **args: Any) -> Path:
    torch.manual_seed(seed)
    network = timm.create_model("resnet18", num_classes=CLASSES, **{**TEACHER, **args})
    path = folder / f"teacher{seed}.safetensors"
    save_tensors(path, network.state_dict())
    return path


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., GapPreservingDistillation]:
    path = static_weights(tmp_path)

    def module(**options: Any) -> GapPreservingDistillation:
        torch.manual_seed(0)
        settings = {
            "student": "resnet18",
            "student_args": STUDENT,
            "num_classes": CLASSES,
            "branches": 1,
            "static_teacher": StaticTeacherSettings("resnet18", str(path), TEACHER),
        }
        return GapPreservingDistillation(**{**settings, **options})

    return module


def run(
    module: GapPreservingDistillation, labels: Tensor | None = None, side: int = 32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The logits and the static terms for a batch."""
    torch.manual_seed(1)
    images = torch.randn(IMAGES, 1, side, side)
    student, teacher = module(images)
    logits = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    assert module.distillation is not None
    batch = Batch(torch.arange(IMAGES) if labels is None else labels)
    return logits, module.distillation(logits, images, batch)


@pytest.mark.parametrize("ratio", [1, 2])
def test_own_method(make: Callable[..., GapPreservingDistillation], ratio: int) -> None:
    module = make(method=partial(Hints, scale=2.0), ratio=ratio, static_weight=0.5).train()
    _, terms = run(module)
    assert list(terms) == ["student_static", "teacher_static"][:ratio]
    assert module.distillation is not None
    sum(terms.values(), torch.zeros(())).backward()
    for name, parameter in module.named_parameters():
        # Every trained part takes part, and so does what lies before the last features.
        if name.startswith("distillation.") or name.split(".")[2] == "conv1":
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    once = make(method=Hints, ratio=ratio).train()
    _, plain = run(once)
    assert terms["student_static"].item() == pytest.approx(plain["student_static"].item())


def test_dynamic_teacher_has_trained_parts_of_its_own_width(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    module = make(method=Hints, ratio=2)
    widths = {
        name: parameter.shape[1]
        for name, parameter in module.named_parameters()
        if name.endswith("project.weight")
    }
    assert widths == {
        "distillation.methods.student.0.project.weight": 8,
        "distillation.methods.teacher.0.project.weight": 16,
    }


@pytest.mark.parametrize(
    ("settings", "student", "static"),
    [
        ({}, False, True),
        ({"student_preactivation": True}, True, True),
        ({"static_preactivation": False}, False, False),
    ],
)
def test_maps_of_either_side_are_taken_before_or_after_their_activation(
    make: Callable[..., GapPreservingDistillation],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, bool],
    student: bool,
    static: bool,
) -> None:
    module = make(method=partial(ReviewKD, **settings)).eval()
    seen: list[tuple[Outputs, Outputs]] = []
    monkeypatch.setattr(ReviewKD, "forward", lambda _, *given: seen.append(given[:2]) or ZERO)
    run(module)
    assert len(seen) == 2  # student and dynamic teacher
    for ours, theirs in seen:
        assert {bool(maps.min() < 0) for maps in ours.stages} == {student}
        assert {bool(maps.min() < 0) for maps in theirs.stages} == {static}


def test_stages_can_be_named(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    def static(stages: list[str]) -> StaticTeacherSettings:
        return StaticTeacherSettings("resnet18", str(static_weights(tmp_path)), TEACHER, stages)

    module = make(
        method=Hints,
        stages=["layer1", "layer4"],
        static_teacher=static(stages=["layer2", "layer4"]),
    )
    with pytest.raises(RuntimeError):  # maps of different size: this method compares none
        run(module)
    with pytest.raises(MethodError, match="layer9"):
        make(method=Hints, stages=["layer9"])
    with pytest.raises(MethodError, match=r"--model\.stages"):
        make(method=Hints, stages=["layer1"])


def test_static_term_is_the_mean_over_teacher_and_assistants(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    second = static_weights(tmp_path, 1, channels=[8, 8, 8, 8])
    args = {**TEACHER, "channels": [8, 8, 8, 8]}
    assistant = StaticTeacherSettings("resnet18", str(second), args)
    module = make(ratio=1, assistants=[assistant])
    logits, terms = run(module)
    assert module.distillation is not None
    torch.manual_seed(1)
    images = torch.randn(IMAGES, 1, 32, 32)
    losses = [kd_loss(logits["student"], t(images)).item() for t in module.distillation.teachers]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert terms["student_static"].item() == pytest.approx(sum(losses) / 2)


@pytest.mark.parametrize("told", [{"name": "resnet18"}, {"weights": "w.pth"}])
def test_assistants_have_a_name_and_weights(
    make: Callable[..., GapPreservingDistillation], told: dict[str, str]
) -> None:
    with pytest.raises(ModelError, match="name and weights"):
        make(assistants=[StaticTeacherSettings(**told)])


def test_an_assistant_that_does_not_fit_is_called_one(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    weights = static_weights(tmp_path, 1, in_chans=3)
    coloured = StaticTeacherSettings("resnet18", str(weights), {**TEACHER, "in_chans": 3})
    with pytest.raises(ModelError, match="The assistant resnet18 takes images of 3 channels"):
        make(assistants=[coloured])


def test_assistants_have_stages_of_their_own(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    def described(seed: int, stage: str) -> StaticTeacherSettings:
        weights = str(static_weights(tmp_path, seed))
        return StaticTeacherSettings("resnet18", weights, TEACHER, [stage])

    options = {"stages": ["layer2"], "static_teacher": described(0, "layer4"), "method": FitNets}
    module = make(assistants=[described(1, "layer3")], **options)
    assert [teacher.stages for teacher in module.distillation.teachers] == [["layer4"], ["layer3"]]
    with pytest.raises(MethodError, match="layer9"):
        make(assistants=[described(1, "layer9")], **options)


class Fixed(nn.Module):
    """A network for images of 16 pixels, which does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def test_a_static_teacher_that_does_not_state_its_images_is_told_how_to(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    path = tmp_path / "fixed.safetensors"
    save_tensors(path, Fixed().state_dict())
    settings = StaticTeacherSettings(f"{__name__}.Fixed", str(path))
    with pytest.raises(ModelError, match=r"state the shape in its class, such as by pretrained_cf"):
        make(static_teacher=settings)


def test_an_assistant_that_does_not_take_the_images_is_told_with_its_option(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    args["in_chans"] = 1
    path = tmp_path / "vit.safetensors"
    network = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **args)
    save_tensors(path, network.state_dict())
    assistant = StaticTeacherSettings("vit_tiny_patch16_224", str(path), args)
    module = make(assistants=[assistant])
    assert module.distillation is not None
    with pytest.raises(ModelError, match=r"VisionTransformer cannot.*args in --model\.assistants"):
        module.distillation.prepare(None, module.network, (1, 64, 64))


def test_data_without_a_number_of_images_is_told_what_it_lacks(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    module = make(method=partial(CRD, num_images=8))
    assert module.distillation is not None
    with pytest.raises(MethodError, match=r"with_indices .* and num_train"):
        module.distillation.prepare(SimpleNamespace(with_indices=False), module.network)
    data = SimpleNamespace(with_indices=False, num_train=8)
    module.distillation.prepare(data, module.network)
    assert data.with_indices


@pytest.mark.slow
def test_simkd_needs_a_student_that_ends_in_the_static_teachers_classifier(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    for ratio in (1, 2):
        with pytest.raises(ModelError, match="simkd/NAME"):
            make(method=SimKD, ratio=ratio)
    width = TEACHER["channels"][-1]
    student = {"student": "simkd/resnet18", "student_args": {**STUDENT, "features": width}}
    module = make(method=SimKD, **student)
    assert module.distillation is not None
    weight = module.distillation.teachers[0].network.fc.weight
    reused = module.network.extract()
    assert torch.equal(reused.classifier.weight, weight)
    for trained in (module, make(method=SimKD, shared=False, **student)):
        named = trained.named_parameters()
        assert [n for n, p in named if "classifier" in n and p.requires_grad] == []
    images = torch.randn(64, 1, 32, 32)
    plain = make(
        method=SimKD,
        student="simkd/resnet18",
        student_args={**student["student_args"], "relu": False},
    ).network.extract()
    assert reused.projector(reused.body(images)).min() == 0
    assert plain.projector(plain.body(images)).min() < 0
    with pytest.raises(ModelError, match="features"):
        make(method=SimKD, student="simkd/resnet18", student_args={**STUDENT, "features": 0})


def test_simkd_has_no_assistants_whose_features_are_for_other_classifiers(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    student = {"student_args": {**STUDENT, "features": TEACHER["channels"][-1]}}
    assistant = StaticTeacherSettings("resnet18", str(static_weights(tmp_path, 1)), TEACHER)
    with pytest.raises(MethodError, match=r"leave out --model\.assistants"):
        make(method=SimKD, student="simkd/resnet18", assistants=[assistant], **student)


def test_what_a_student_wants_without_weight_decay_is_so_behind_a_reused_classifier() -> None:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    body = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size)
    student = ReusedClassifier(body, 8, CLASSES)
    pair = with_teacher(student, (3, 16, 16), ratio=2, branches=1)
    names = student.no_weight_decay()
    assert pair.teacher.no_weight_decay() == names
    tokens = {"body.pos_embed", "body.cls_token"}
    assert tokens == names & {name for name, _ in pair.teacher.named_parameters()}
    plain = ReusedClassifier(nn.Sequential(nn.Linear(4, 2)), 8, CLASSES)
    assert plain.no_weight_decay() == set()


@pytest.mark.parametrize("ratio", [2, 3])
def test_a_reused_classifier_sees_the_mean_of_the_copies_that_simkd_compares(
    make: Callable[..., GapPreservingDistillation], ratio: int
) -> None:
    width = TEACHER["channels"][-1]
    student = {"student": "simkd/resnet18", "student_args": {**STUDENT, "features": width}}
    module = make(method=SimKD, ratio=ratio, **student)
    assert module.distillation is not None
    wide = torch.randn(IMAGES, ratio * width)
    teachers = module.distillation.teachers[0].network
    with torch.no_grad():
        logits = module.network.teacher.classifier(wide)
        torch.testing.assert_close(logits, teachers.fc(mean_of_copies(wide, width)))
        # All else has its noise: rows of copies differ.
        first, second = module.network.teacher.projector[0].weight[:2]
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "stages"), [(CATKD, None), (AT, ["layer4"])], ids=["catkd", "at"]
)
def test_images_that_leave_a_method_nothing_to_learn_are_refused(
    make: Callable[..., GapPreservingDistillation],
    tmp_path: Path,
    method: type[Method],
    stages: list[str] | None,
) -> None:
    path = static_weights(tmp_path)
    static = StaticTeacherSettings("resnet18", str(path), TEACHER, stages)
    module = make(method=method, static_teacher=static, stages=stages).train()
    distillation = module.distillation
    assert distillation is not None

    def steepest(side: int) -> float:
        module.zero_grad()
        _, terms = run(module, side=side)
        sum(terms.values(), ZERO).backward()
        return max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None)

    # In images of 32 x 32 the last map has a single position; the networks were made for 224.
    assert steepest(32) < 1e-4 * steepest(64)
    distillation.prepare(None, module.network, (1, 64, 64))
    with pytest.raises(MethodError, match=r"at this image size .* a single position.*image_size"):
        distillation.prepare(None, module.network, (1, 32, 32))


def test_images_may_be_too_small_for_one_stage_of_several(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    module = make(method=AT)
    assert module.distillation is not None
    module.distillation.prepare(None, module.network, (1, 32, 32))


def test_images_too_small_for_the_static_teachers_map_alone_are_refused(
    make: Callable[..., GapPreservingDistillation], tmp_path: Path
) -> None:
    args = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "output_stride": 8}
    module = make(method=CATKD, student_args=args)
    assert module.distillation is not None
    with pytest.raises(MethodError, match=r"the map of the static teacher has a single position"):
        module.distillation.prepare(None, module.network, (1, 32, 32))


def test_assistants_need_a_teacher(make: Callable[..., GapPreservingDistillation]) -> None:
    with pytest.raises(ModelError, match=r"--model\.static_teacher\.name NAME"):
        make(
            static_teacher=StaticTeacherSettings(),
            assistants=[StaticTeacherSettings("resnet18", "w.pth")],
        )


def test_method_for_one_label_refuses_mixed_ones(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    module = make(method=OneLabel, ratio=1)
    run(module)
    with pytest.raises(MethodError, match=r"OneLabel.*--data\.mixup 0"):
        run(module, torch.full((IMAGES, CLASSES), 1 / CLASSES))


def test_a_method_without_loss_is_refused(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    class WithoutLoss(Method):
        pass

    with pytest.raises(MethodError, match="WithoutLoss does not define forward"):
        make(method=WithoutLoss)


def test_settings_are_kept_as_plain_values(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    kept = make(method=partial(KD, temperature=2.0)).hparams
    path, settings = kept["method"].values()
    assert path == "gpd_cli.distill.methods.kd.KD"
    assert settings == {"temperature": 2.0, "standardize": False}
    assert kept["static_teacher"]["args"] == TEACHER
    stream = BytesIO()
    torch.save(dict(kept), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True) == kept


def test_half_precision_logits_reach_the_method_in_float32(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    seen = []

    class Spy(Method):
        def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            seen.extend([network.logits.dtype, teacher.logits.dtype])
            return network.logits.sum()

    module = make(ratio=1)
    assert module.distillation is not None
    module.distillation.methods["student"] = nn.ModuleList([Spy()])
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = run(module)
    assert logits["student"].dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]


def test_static_weight_rises_over_the_warm_up(
    make: Callable[..., GapPreservingDistillation],
) -> None:
    module = make(ratio=1, static_warmup_epochs=4)
    assert module.distillation is not None
    images, batch = torch.randn(IMAGES, 1, 32, 32), Batch(torch.arange(IMAGES))
    logits, _ = module.eval()(images)
    terms = [
        module.distillation({"student": logits}, images, batch, epoch=epoch)["student_static"]
        for epoch in (0, 1, 3, 9)
    ]
    expected = kd_loss(logits, module.distillation.teachers[0](images))
    shares = [float((term / expected).detach()) for term in terms]
    assert shares == pytest.approx([0.25, 0.5, 1.0, 1.0])
    with pytest.raises(GpdError, match="static_warmup_epochs must be 0 or more"):
        make(static_warmup_epochs=-1)
