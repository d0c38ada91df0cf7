"""WebDataset shards as people have them: other endings, missing labels, damaged images."""

import io
import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gpd_cli.__main__ import main
from gpd_cli.data import ImageData
from gpd_cli.data.sources import LabelError, UnreadableImageError
from gpd_cli.errors import DataError
from shard_files import Files, write_shard

pytest.importorskip("webdataset")


def image(number: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def plain(count: int, ending: str = "png", kind: str = "png") -> list[Files]:
    return [{ending: image(n, kind), "cls": b"%d" % (n % 2)} for n in range(count)]


def data(folder: Path, **options: Any) -> ImageData:
    settings: dict[str, Any] = {"classes": 2, "num_workers": 0, "batch_size": 4, "image_size": 8}
    settings |= {"mean": [0.0] * 3, "std": [1 / 255] * 3, "no_aug": True, "crop_pct": 1.0}
    settings |= {"train_split": "x-0.tar|6", "val_split": "x-0.tar", "test_split": "x-0.tar"}
    return ImageData("wds/x", root=str(folder), **(settings | options))


def served(loader: Any) -> list[tuple[int, int]]:
    """The number of each image, by its brightness, and its label."""
    return [
        (round(picture[0].mean().item() / 20), label.item())
        for pictures, labels in loader
        for picture, label in zip(pictures, labels, strict=True)
    ]


def test_jpeg_is_an_ending_of_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar", plain(6, "jpeg", "jpeg"))
    assert served(data(tmp_path).test_dataloader()) == [(n, n % 2) for n in range(6)]


@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_samples_without_an_image_name_the_option(tmp_path: Path, loader: str) -> None:
    write_shard(tmp_path / "x-0.tar", plain(6, "picture"))
    with pytest.raises(DataError, match=r"'00\d' in .*x-0\.tar has no image .*--data\.input_key"):
        served(getattr(data(tmp_path), loader)())
    assert len(served(getattr(data(tmp_path, input_key="picture"), loader)())) >= 6


def test_every_image_is_scored_or_an_error(tmp_path: Path) -> None:
    samples = plain(6)
    samples[3]["png"] = b"no image"
    write_shard(tmp_path / "x-0.tar", samples)
    with pytest.raises(UnreadableImageError, match=r"The image '003' in .*x-0\.tar cannot be read"):
        served(data(tmp_path).test_dataloader())
    trained = {number for number, _ in served(data(tmp_path).train_dataloader())}
    assert trained == {0, 1, 2, 4, 5}  # a warning says that the damaged image is left out


def test_a_shard_that_is_cut_off_is_an_error_in_evaluation(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar", plain(6))
    # The second image has a header of 512 bytes from byte 2048 on; it is cut within its pixels.
    whole = (tmp_path / "x-0.tar").read_bytes()
    (tmp_path / "x-0.tar").write_bytes(whole[:2570])
    with pytest.raises(UnreadableImageError, match="cannot be read"):
        served(data(tmp_path).test_dataloader())


@pytest.mark.parametrize("missing", ["negative", "no file"])
def test_images_without_label_are_predicted_and_not_scored(tmp_path: Path, missing: str) -> None:
    samples = [{"png": image(n), "json": json.dumps({"kind": n % 2}).encode()} for n in range(4)]
    if missing == "negative":
        samples[1]["json"] = json.dumps({"kind": -1}).encode()
    else:
        del samples[1]["json"]
    write_shard(tmp_path / "x-0.tar", samples)
    read = data(tmp_path, target_key="kind")
    read.setup("predict")
    assert served(read.predict_dataloader()) == [(0, 0), (1, -1), (2, 0), (3, 1)]
    with pytest.raises(LabelError, match="has no label"):
        served(data(tmp_path, target_key="kind").test_dataloader())


@pytest.mark.parametrize(
    ("files", "key", "said"),
    [
        (
            {"json": b'{"kind": 1}'},
            None,
            r"no label in \.cls \(it has: png, json\).*--data\.target_key",
        ),
        ({"cls": b"1"}, "kind", r"no label in \.json under 'kind' \(it has: png, cls\)"),
        ({"json": b'{"other": 1}'}, "kind", r"no label in \.json under 'kind'"),
        ({"cls": b"dog"}, None, r"no label in \.cls"),
        ({"json": b'{"kind": "dog"}'}, "kind", r"has the label 'dog', which is not a class number"),
    ],
)
def test_labels_that_cannot_be_used_are_told_with_the_option(
    tmp_path: Path, files: Files, key: str | None, said: str
) -> None:
    write_shard(tmp_path / "x-0.tar", [{"png": image(n), **files} for n in range(2)])
    with pytest.raises(LabelError, match=said):
        served(data(tmp_path, target_key=key).test_dataloader())
    read = data(tmp_path, target_key=key)
    read.setup("predict")
    assert served(read.predict_dataloader()) == [(0, -1), (1, -1)]


@pytest.mark.parametrize("label", [1, "1", 1.0])
def test_a_label_may_lie_deeper_in_its_file(tmp_path: Path, label: float | str) -> None:
    fields = json.dumps({"object": {"kind": label}}).encode()
    write_shard(tmp_path / "x-0.tar", [{"png": image(3), "json": fields}])
    assert served(data(tmp_path, target_key="object/kind").test_dataloader()) == [(3, 1)]


CONFIG = """
model:
  student: resnet18
  student_args: {layers: [1, 1, 1, 1], channels: [4, 4, 4, 4], num_classes: 2}
  ratio: 1
data:
  dataset: wds/x
  root: .
  classes: 2
  image_size: 16
  batch_size: 3
  num_workers: 0
trainer: {accelerator: cpu, max_epochs: 2, enable_progress_bar: false}
"""


def test_a_stream_without_images_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accuracy would be 0 %, and a run of no steps would end as if it had trained."""
    write_shard(tmp_path / "x-0.tar", plain(6))
    write_shard(tmp_path / "empty-0.tar", [])
    (tmp_path / "c.yaml").write_text(CONFIG)
    full, empty = "x-0.tar|6", "empty-0.tar|6"
    with chdir(tmp_path):

        def fit(train: str, val: str) -> int:
            splits = ["--data.train_split", train, "--data.val_split", val]
            return main(["fit", "-c", "c.yaml", *splits])

        assert fit(empty, full) == 1
        assert "no image in the split of --data.train_split" in capsys.readouterr().err
        assert fit(full, empty) == 1
        assert "no image in the split of --data.val_split" in capsys.readouterr().err
        assert fit(full, full) == 0
        (last,) = Path("runs").rglob("last.ckpt")
        assert main(["test", f"--ckpt_path={last}", f"--data.test_split={empty}"]) == 1
        assert "no image in the split of --data.test_split" in capsys.readouterr().err
