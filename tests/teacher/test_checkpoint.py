import copy
import pickle
from contextlib import chdir
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpd_cli.__main__ import main
from gpd_cli.branches import AUTHORS_BRANCHES
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.extract import extract_command
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.checkpoint import load_networks, read_run
from gpd_cli.teacher.description import Description, check_same_network
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair

TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}


def student() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10, **TINY)


def trained(folder: Path, *options: str) -> Path:
    """A checkpoint of `gpd fit`."""
    with chdir(folder):
        code = main(
            [
                *("fit", "--model.student", "resnet18", "--model.num_classes", "10"),
                *("--model.student_args", str(TINY), "--model.optimizer.lr", "0.01"),
                *("--data.image_size", "16", "--data.batch_size", "32"),
                *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
                *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
                *options,
            ]
        )
    assert code == 0
    return folder / "runs" / "gpd" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("pair"), "--model.branches", "6")


AS_THE_AUTHORS = [
    *("--model.storage", "teacher", "--model.branches", "gpd", "--model.branch_init", "gpd"),
    *("--model.branch_layers", "3x3_stride1"),
]


@pytest.fixture(scope="module")
def authors_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("authors"), *AS_THE_AUTHORS)


@pytest.fixture(scope="module")
def alone_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["--model.ratio", "1", "--model.branches", "1"]
    return trained(tmp_path_factory.mktemp("alone"), *options)


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("expanded") / "wide.safetensors"
    expand_command(
        path, student="resnet18", student_args=TINY, num_classes=10, branches=["1x1", "frequency"]
    )
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 1, 16, 16)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# Reading


def test_run_is_read_with_weights_only(pair_run: Path) -> None:
    content = torch.load(pair_run, weights_only=True)
    assert content["gpd"]["student"]["name"] == "resnet18"
    assert content["gpd"]["plan"] is not None


def test_run_rebuilds_the_pair_that_was_trained(pair_run: Path, images: Tensor) -> None:
    network, description = load_networks(pair_run)
    assert isinstance(network, Pair)
    assert not any(module.training for module in network.modules())
    state = torch.load(pair_run, weights_only=True)["state_dict"]
    own = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    assert_same(dict(network.state_dict()), own)
    assert description.spec.model_args == TINY
    assert description.shape == (1, 16, 16)
    assert len(description.branches) == 5
    logits, wide = network(images)
    assert logits.shape == wide.shape == (3, 10)


def test_run_with_the_authors_settings_rebuilds_them(authors_run: Path) -> None:
    network, description = load_networks(authors_run)
    assert isinstance(network, Pair)
    assert description.storage == "teacher"
    assert description.branch_layers == ("3x3_stride1",)
    assert description.branches == AUTHORS_BRANCHES
    blocks = [name for name, _ in network.named_modules() if name.endswith(".branches")]
    assert len(blocks) == 5  # of 9: a stem and three strided layers have none
    older = description.to_dict()
    del older["branch_layers"]
    assert Description.from_dict(older).branch_layers == ("all",)


def test_a_run_of_an_earlier_version_is_read_and_goes_on(pair_run: Path, tmp_path: Path) -> None:
    content = torch.load(pair_run, weights_only=True)
    now, entry = copy.deepcopy(content["gpd"]), content["gpd"]
    del entry["branch_width"], entry["branch_layers"], entry["shared"]
    del entry["plan"]["runs_again"]
    entry["plan"]["narrow"] = ["layer1", "layer2"]  # without reasons
    for tensor in entry["plan"]["tensors"].values():
        del tensor["share"]
    older = tmp_path / "older.ckpt"
    torch.save(content, older)
    network, description = load_networks(older)
    assert description.plan is not None
    assert description.plan.kept_narrow == {"layer1": "", "layer2": ""}
    assert {plan.extra_divisor for _, plan in description.plan} == {1}
    assert description.branch_width == 1
    assert_same(dict(network.state_dict()), dict(load_networks(pair_run)[0].state_dict()))
    check_same_network(entry, now)
    next(iter(entry["plan"]["tensors"].values()))["fan_in"] = 0
    with pytest.raises(WeightsError, match="other channels are widened"):
        check_same_network(entry, now)


def test_the_width_of_the_product_branch_is_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    options = {"student_args": TINY, "num_classes": 10, "branches": ["1x1_kxk"]}
    expand_command(path, student="resnet18", branch_width=0.5, **options)
    network, description = load_networks(path)
    assert description.branch_width == 0.5
    shapes = {n: p.shape for n, p in network.named_parameters() if n.endswith("1x1_kxk.first")}
    assert shapes
    assert all(inner == max(1, fan // 2) for inner, fan, *_ in shapes.values())
    older = description.to_dict()
    del older["branch_width"]
    assert Description.from_dict(older).branch_width == 1


def test_a_run_with_the_authors_settings_goes_on(authors_run: Path, tmp_path: Path) -> None:
    options = ["--trainer.max_epochs", "2", "--ckpt_path", str(authors_run)]
    before, after = (
        torch.load(path, weights_only=True)
        for path in (authors_run, trained(tmp_path, *AS_THE_AUTHORS, *options))
    )
    assert after["global_step"] == 2 * before["global_step"] > 0
    assert after["gpd"] == before["gpd"]


@pytest.mark.parametrize(
    "other",
    [
        ["--model.branch_layers", "all"],
        ["--model.branches", "paper", "--model.branch_init", "zero"],
        ["--model.storage", "mixed"],
    ],
    ids=lambda other: other[1],
)
def test_a_run_does_not_go_on_with_other_settings_than_the_authors(
    other: list[str], authors_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*AS_THE_AUTHORS, *other, "--ckpt_path", str(authors_run)]
    with pytest.raises(AssertionError):
        trained(tmp_path, *options)
    assert "resume with the configuration" in capsys.readouterr().err


def test_run_of_a_student_alone_rebuilds_it(alone_run: Path) -> None:
    network, description = load_networks(alone_run)
    assert isinstance(network, Alone)
    assert description.plan is None


def test_expanded_file_rebuilds_a_pair_that_computes_one_function(
    expanded: Path, images: Tensor
) -> None:
    network, description = load_networks(expanded)
    assert isinstance(network, Pair)
    assert description.branches == ("1x1", "frequency")
    logits, wide = network.double()(images.double())
    # Stored in 32 bits, in which the noise adds up to zero only nearly.
    torch.testing.assert_close(logits, wide, rtol=1e-4, atol=1e-5)


def test_expanded_file_opens_with_safetensors_alone(expanded: Path) -> None:
    with safe_open(expanded, framework="pt") as file:
        assert "gpd" in file.metadata()
        assert len(list(file.keys())) > 10


# Extraction


@pytest.mark.parametrize("source", ["pair_run", "authors_run", "alone_run", "expanded"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_extracted_student_is_the_trained_one_bit_for_bit(
    source: str, suffix: str, tmp_path: Path, images: Tensor, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(source)
    output = tmp_path / f"student{suffix}"
    extract_command(checkpoint, output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    read = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)
    plain = student().eval()
    plain.load_state_dict(read, strict=True)
    with torch.no_grad():
        assert torch.equal(plain(images), load_networks(checkpoint)[0].student(images))


def test_extracted_teacher_is_the_trained_one(pair_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "teacher.safetensors"
    extract_command(pair_run, output, "teacher")
    network, _ = load_networks(pair_run)
    assert isinstance(network, Pair)
    assert_same(load_file(output), dict(merged_teacher(network).state_dict()))
    narrow = student().state_dict()
    assert load_file(output)["conv1.weight"].shape[0] == 2 * narrow["conv1.weight"].shape[0]


@pytest.mark.slow
def test_extracted_torchvision_student_loads_into_torchvision(
    tmp_path: Path, images: Tensor
) -> None:
    name = "torchvision/squeezenet1_1"
    expand_command(tmp_path / "wide.safetensors", student=name, num_classes=4, branches=1)
    extract_command(tmp_path / "wide.safetensors", tmp_path / "student.pth")
    plain = torchvision.models.squeezenet1_1(num_classes=4).eval()
    plain.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True))
    colour = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        trained = load_networks(tmp_path / "wide.safetensors")[0].student(colour)
        assert torch.equal(plain(colour), trained)


def test_expansion_gives_back_the_weights_that_went_in(tmp_path: Path) -> None:
    network = student()
    torch.save(network.state_dict(), tmp_path / "in.pth")
    expand_command(
        tmp_path / "wide.safetensors",
        student="resnet18",
        student_weights=str(tmp_path / "in.pth"),
        student_args=TINY,
        num_classes=10,
    )
    extract_command(tmp_path / "wide.safetensors", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), dict(network.state_dict()))


@pytest.mark.parametrize("which", ["student", pytest.param("teacher", marks=pytest.mark.slow)])
def test_exported_program_runs_on_any_batch_without_source(
    pair_run: Path, tmp_path: Path, which: str
) -> None:
    output = tmp_path / "network.pt2"
    extract_command(pair_run, output, which)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]
    program = torch.export.load(output).module()
    network, _ = load_networks(pair_run)
    for batch in (1, 5):
        images = torch.randn(batch, 1, 16, 16)
        with torch.no_grad():
            logits, wide = network(images)
            expected = logits if which == "student" else wide
            torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx_file_runs_on_any_batch(pair_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    output = tmp_path / "student.onnx"
    extract_command(pair_run, output)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    session = runtime.InferenceSession(str(output))
    network, _ = load_networks(pair_run)
    for batch in (1, 5):
        images = torch.randn(batch, 1, 16, 16)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = network.student(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_says_what_to_install(
    pair_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(GpdError, match=r"pip install 'gpd-cli\[onnx\]'"):
        extract_command(pair_run, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_extraction_replaces_an_older_file(pair_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "student.pth"
    output.write_text("old")
    extract_command(pair_run, output)
    assert isinstance(torch.load(output, weights_only=True), dict)


def test_extraction_leaves_the_checkpoint_as_it_is(pair_run: Path, tmp_path: Path) -> None:
    before = pair_run.read_bytes()
    extract_command(pair_run, tmp_path / "student.pth")
    assert pair_run.read_bytes() == before


# Refusals


def assert_refused(path: Path, output: Path, error: type[GpdError] = WeightsError) -> str:
    with pytest.raises(error) as caught:
        extract_command(path, output)
    assert not output.exists()
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])


class Harmful:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code from the file ran",))


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "text", "empty", "dict", "list", "state_dict", "truncated", "harmful"],
)
def test_foreign_and_damaged_runs_are_refused(
    kind: str, pair_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.ckpt"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("these are no weights")
    elif kind == "empty":
        path.touch()
    elif kind == "dict":
        torch.save({"epoch": 1}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "state_dict":
        torch.save(student().state_dict(), path)
    elif kind == "truncated":
        path.write_bytes(pair_run.read_bytes())
        damage(path)
    elif kind == "harmful":
        path.write_bytes(pickle.dumps(Harmful()))
    message = assert_refused(path, tmp_path / "student.pth")
    assert "foreign.ckpt" in message
    assert "code from the file ran" not in capsys.readouterr().out


def test_checkpoint_in_a_folder_is_pointed_to(tmp_path: Path) -> None:
    inside = tmp_path / "version_0" / "checkpoints" / "best.ckpt"
    inside.parent.mkdir(parents=True)
    inside.touch()
    for folder in (inside.parent, inside.parent.parent):
        for read in (read_run, load_networks):
            with pytest.raises(WeightsError, match=rf"is a folder; give .* {inside}"):
                read(folder)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "plain", "truncated", "no-json"])
def test_foreign_and_damaged_expanded_files_are_refused(
    kind: str, expanded: Path, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    if kind == "text":
        path.write_text("these are no weights")
    elif kind == "empty":
        path.touch()
    elif kind == "plain":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "truncated":
        path.write_bytes(expanded.read_bytes())
        damage(path)
    elif kind == "no-json":
        save_file({"weight": torch.zeros(2)}, path, {"gpd": "{"})
    assert "foreign.safetensors" in assert_refused(path, tmp_path / "student.pth")


@pytest.mark.parametrize("entry", ["{}", "[]", "3", '{"format": 1}', '{"format": 99}'])
def test_expanded_file_with_a_strange_description_is_refused(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"gpd": entry})
    assert "strange.safetensors" in assert_refused(path, tmp_path / "student.pth")


@pytest.mark.parametrize("entry", [None, [], {}, {"format": 1}, {"format": 99}])
def test_run_with_a_strange_description_is_refused(entry: object, tmp_path: Path) -> None:
    path = tmp_path / "strange.ckpt"
    torch.save({"gpd": entry, "state_dict": {}}, path)
    assert "strange.ckpt" in assert_refused(path, tmp_path / "student.pth")


def test_file_of_another_format_asks_for_the_version_that_wrote_it(
    pair_run: Path, tmp_path: Path
) -> None:
    content = torch.load(pair_run, weights_only=True)
    content["gpd"]["format"] = 2
    torch.save(content, tmp_path / "newer.ckpt")
    assert "format 2" in assert_refused(tmp_path / "newer.ckpt", tmp_path / "student.pth")


def test_run_with_a_missing_tensor_is_refused(pair_run: Path, tmp_path: Path) -> None:
    content = torch.load(pair_run, weights_only=True)
    del content["state_dict"][next(n for n in content["state_dict"] if n.startswith("network."))]
    torch.save(content, tmp_path / "partial.ckpt")
    message = assert_refused(tmp_path / "partial.ckpt", tmp_path / "student.pth")
    assert "resnet18" in message


def test_student_trained_alone_has_no_teacher(alone_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "teacher.pth"
    with pytest.raises(GpdError, match="was trained alone"):
        extract_command(alone_run, output, "teacher")
    assert not output.exists()


@pytest.mark.parametrize("name", ["student", "student.txt", "student.ckpt"])
def test_unknown_endings_are_refused(name: str, pair_run: Path, tmp_path: Path) -> None:
    message = assert_refused(pair_run, tmp_path / name, GpdError)
    assert name in message
    assert ".safetensors" in message


def test_expanded_output_has_to_be_safetensors(tmp_path: Path) -> None:
    with pytest.raises(GpdError, match=r"wide\.pth"):
        expand_command(tmp_path / "wide.pth", student="resnet18", student_args=TINY)
    assert not list(tmp_path.iterdir())
