"""`gpd report`: what is read of runs, what is computed, and the page as a browser shows it."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from gpd_cli.__main__ import main
from gpd_cli.commands.closing import closing_lines
from gpd_cli.report.markdown import write_markdown
from gpd_cli.report.picture import draw
from gpd_cli.report.predictions import class_accuracies, predict, worst_confusions
from gpd_cli.report.run import (
    ReportError,
    Run,
    differing_settings,
    flat_settings,
    read_run,
    read_runs,
    run_names,
)
from gpd_cli.report.summary import caption
from processes import in_processes
from runs import ALONE, PAIRED, arguments, fit, last_logged, noise_images, run_folder

LOG = """\
epoch,step,lr,images_per_second,train/student_top1,val/student_top1,val/gap
0,9,0.1,100,,,
0,15,,,,40.0,5.0
0,15,,,30.0,,
1,19,0.05,200,,,
1,31,,,,60.0,3.0
1,31,,,50.0,,
2,47,,,,60.0,1.0
"""


def write_run(folder: Path, log: str = LOG, config: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(log)
    (folder / "config.yaml").write_text(config)
    return folder


# Reading


def test_rows_of_an_epoch_are_brought_together(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "runs/a/version_0"))
    assert run.name == "a/version_0"
    assert run.epochs[1] == {"val/student_top1": 40, "val/gap": 5, "train/student_top1": 30}
    assert run.curve("train/student_top1") == ([1, 2], [30, 50])
    assert [row["lr"] for row in run.steps] == [0.1, 0.05]
    assert run.best_epoch == 2  # the first of two, whose weights best.ckpt has


def test_of_several_validations_of_an_epoch_the_best_counts(tmp_path: Path) -> None:
    """That is the one whose weights best.ckpt has: of equal ones, the first."""
    log = """\
epoch,step,train/student_top1,val/student_top1,val/gap
0,7,,70.0,5.0
0,15,,40.0,9.0
0,15,30.0,,
1,23,,60.0,3.0
1,31,,65.0,2.0
1,31,50.0,,
2,39,,50.0,1.0
2,47,,50.0,0.0
"""
    run = read_run(write_run(tmp_path / "runs/a/version_0", log))
    assert run.curve("val/student_top1") == ([1, 2, 3], [70, 65, 50])
    assert run.curve("val/gap") == ([1, 2, 3], [5, 2, 1])
    assert run.curve("train/student_top1") == ([1, 2], [30, 50])
    assert run.best_epoch == 1
    assert "1 of 3: student 70.00, gap 5.00" in closing_lines(run, 1)[0]


def test_run_that_started_from_a_checkpoint_has_the_epochs_before(tmp_path: Path) -> None:
    """Each run says which checkpoint it started from, by a path from the working directory."""
    write_run(tmp_path / "runs/a/version_0")
    second = "epoch,step,lr,val/student_top1\n1,20,0.5,\n1,31,,45.0\n2,47,,44.0\n"
    checkpoint = "ckpt_path: runs/a/version_{}/checkpoints/last.ckpt"
    write_run(tmp_path / "runs/a/version_1", second, checkpoint.format(0))
    third = "epoch,step,lr,val/student_top1\n3,50,0.1,\n3,63,,43.0\n"
    run = read_run(write_run(tmp_path / "runs/a/version_2", third, checkpoint.format(1)))
    assert run.curve("val/student_top1") == ([1, 2, 3, 4], [40, 45, 44, 43])
    assert run.curve("train/student_top1") == ([1], [30])
    assert [(row["step"], row["lr"]) for row in run.steps] == [
        (9, 0.1),
        (19, 0.05),
        (20, 0.5),
        (50, 0.1),
    ]
    assert (run.first, run.best_epoch, run.own_epochs) == (4, 4, [4])  # as best.ckpt is its own
    assert "2 epochs" in "".join(closing_lines(read_run(tmp_path / "runs/a/version_1"), 1))
    assert not run.lacking

    shutil.rmtree(tmp_path / "runs/a/version_0")
    run = read_run(tmp_path / "runs/a/version_2")
    assert run.curve("val/student_top1") == ([2, 3, 4], [45, 44, 43])
    assert (
        "epochs before 2, of runs/a/version_0/checkpoints/last.ckpt, was not found" in run.lacking
    )


def test_a_run_started_from_its_own_neighbours_not_from_those_of_the_present_folder(
    tmp_path: Path,
) -> None:
    """Runs that lie elsewhere, or were moved there, have neighbours of the same names."""
    started = "ckpt_path: runs/a/version_0/checkpoints/last.ckpt"
    for name, accuracy in (("there", "40.0"), ("here", "99.0")):
        write_run(tmp_path / name / "runs/a/version_0", LOG.replace("40.0", accuracy))
    second = "epoch,step,val/student_top1\n1,31,45.0\n"
    write_run(tmp_path / "there/runs/a/version_1", second, started)
    with chdir(tmp_path / "here"):
        run = read_run(tmp_path / "there/runs/a/version_1")
    assert run.curve("val/student_top1") == ([1, 2], [40, 45])


def test_runs_that_started_from_each_other_end_somewhere(tmp_path: Path) -> None:
    """A folder may be written anew by a run that started from one that had started from it."""
    for version, other, epoch in ((0, 1, 2), (1, 0, 1)):
        write_run(
            tmp_path / f"runs/a/version_{version}",
            f"epoch,step,val/student_top1\n{epoch},31,4{epoch}.0\n",
            f"ckpt_path: runs/a/version_{other}/checkpoints/last.ckpt",
        )
    run = read_run(tmp_path / "runs/a/version_0")
    assert run.curve("val/student_top1") == ([2, 3], [41, 42])
    assert "epochs before 2" in run.lacking


def test_settings_are_read_in_any_locale(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("data: {root: Größe}", encoding="utf-8")
    code = "from pathlib import Path; from gpd_cli.report.run import read_run; "
    code += "print(ascii(read_run(Path('run')).settings))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (done,) = in_processes(tmp_path, [sys.executable, "-c", code], [plain])
    assert done.stdout.strip() == ascii({"data.root": "Größe"}), done.stderr


def test_duration_of_a_run_that_went_on_is_told_from_its_length(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    (took,) = [line for line in closing_lines(run, 3, went_on=True) if line.startswith("took")]
    assert (
        took.split(maxsplit=1)[1]
        == f"3 s since the run was resumed; {len(run.epochs)} epochs in all"
    )


def test_runs_are_named_from_where_their_paths_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "runs/a/version_0", tmp_path / "runs/b/version_0"]
    assert run_names(paths) == ["a/version_0", "b/version_0"]


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert len(read_runs([folder, folder / ".." / "a"])) == 1


def test_settings_that_differ(tmp_path: Path) -> None:
    first = "model: {ratio: 2, optimizer: {lr: 0.1}}\ntrainer: {logger: {name: a}, devices: 1}"
    second = "model: {ratio: 1, optimizer: {lr: 0.1}}\ntrainer: {logger: {name: b}, devices: 1}"
    write_run(tmp_path / "a", config=first)
    write_run(tmp_path / "b", config=f"{second}\nextra: 1")
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    assert differing_settings(runs) == {"model.ratio": [2, 1], "extra": [None, 1]}


def test_settings_have_the_names_of_options() -> None:
    config = {"model": {"method": {"class_path": "mine.KD", "init_args": {"t": 4}}, "args": {}}}
    assert flat_settings(config) == {
        "model.method": "mine.KD",
        "model.method.t": 4,
        "model.args": {},
    }


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (None, "no metrics.csv"),
        ("epoch,step\n", "no complete epoch"),
        ("epoch,val/gap\n0,much\n", "cannot be read"),
    ],
)
def test_what_is_no_run(tmp_path: Path, log: str | None, said: str) -> None:
    if log is not None:
        write_run(tmp_path / "run", log)
    with pytest.raises(ReportError, match=said):
        read_run(tmp_path / "run")


def test_folder_above_runs_names_them(tmp_path: Path) -> None:
    write_run(tmp_path / "digits/version_0")
    for folder in (tmp_path, tmp_path / "digits"):
        with pytest.raises(ReportError, match="digits/version_0"):
            read_run(folder)


# Computing


def test_accuracy_of_each_class() -> None:
    labels, chosen = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 1, 2])
    percent, counts = class_accuracies(labels, chosen, 3)
    assert percent[0] == pytest.approx(200 / 3)
    assert percent[1].isnan()
    assert percent[2] == 100
    assert counts.tolist() == [3, 0, 1]


def test_pairs_that_are_confused_most_come_first() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    chosen = torch.tensor([1, 1, 0, 0, 1, 2])
    pairs = [(p.label, p.chosen, p.count) for p in worst_confusions(labels, chosen)]
    assert pairs == [(0, 1, 2), (1, 0, 1)]
    assert worst_confusions(labels, chosen)[0].share == pytest.approx(2 / 3)


# Runs of fit

WHOLE = ["--trainer.limit_val_batches", "1.0", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a joint run and a student alone."""
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("runs")
    assert fit(folder, *PAIRED, *WHOLE, epochs=2) == 0
    assert fit(folder, *ALONE, *WHOLE, epochs=2) == 0
    return folder


def report(folder: Path, *arguments: str) -> int:
    with chdir(folder):
        return main(["report", *arguments])


FIRST, SECOND = "runs/gpd/version_0", "runs/gpd/version_1"


def test_a_report_and_an_evaluation_find_the_data_from_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data was named by a path relative to the folder where the run was started."""
    noise_images(tmp_path, "ab", 40, 16)
    data = ["--data.dataset", "folder", "--data.root", "images", "--data.in_chans", "1"]
    assert fit(tmp_path, *ALONE, *data, "--model.num_classes", "2") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert report(elsewhere, f"../{FIRST}", "--output", "r.html") == 0
    assert "left out" not in capsys.readouterr().out
    with chdir(elsewhere):
        checkpoint = f"../{FIRST}/checkpoints/last.ckpt"
        assert main(["validate", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu"]) == 0


@pytest.mark.slow
def test_a_text_of_another_origin_is_not_replaced(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, page = tmp_path / "notes.md", tmp_path / "notes.html"
    notes.write_text("by hand")
    arguments = [FIRST, "--split", "none", "--output", str(page)]
    assert report(runs, *arguments) == 1
    assert f"would replace {notes}" in capsys.readouterr().err
    assert notes.read_text() == "by hand"
    notes.unlink()
    assert report(runs, *arguments) == report(runs, *arguments) == 0
    notes.write_text("by hand")  # beside a page
    assert report(runs, *arguments) == 1
    assert notes.read_text() == "by hand"


def test_fit_writes_a_page_of_its_own(runs: Path) -> None:
    page = (run_folder(runs) / "report.html").read_text()
    assert "gpd report runs/gpd/version_0" in page  # what it leaves out, and how to get it
    assert page.count('class="plotly-graph-div"') >= 6


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    assert report(runs, FIRST, SECOND, "--output", "both.html") == 0
    return runs / "both.html"


def test_report_compares_runs(page: Path) -> None:
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text, markdown = page.read_text(), page.with_suffix(".md").read_text()
    assert "| model.ratio | 2.0 | 1.0 |" in markdown
    assert "both.png" in markdown
    assert re.search(r"<td>model.branches</td><td>3</td><td>1</td>", text)
    assert "model.num_classes" not in text  # which is the same in both
    for title in ("Accuracy by class", "confuses most often", "disagree on"):
        assert title in text
    with chdir(page.parent):
        found = predict(run_folder(page.parent) / "checkpoints/best.ckpt", "validation")
    said = f"Student {found.accuracy('student'):.2f} %, dynamic teacher"
    assert said in text
    assert said in markdown


def test_page_is_complete_in_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"(?!data:)", text)
    assert text.count("plotly.js v") == 1


def test_predictions_are_those_that_were_logged(runs: Path) -> None:
    best = run_folder(runs) / "checkpoints/best.ckpt"
    with chdir(runs):
        found = predict(best, "validation")
    run = read_run(run_folder(runs))
    for network in ("student", "teacher"):
        accuracy = 100 * (found.chosen[network] == found.labels).float().mean()
        logged = run.epochs[run.best_epoch or 0][f"val/{network}_top1"]
        assert float(accuracy) == pytest.approx(logged, abs=1e-3)
    shown = found.pictures
    assert len(shown) == min(12, found.disagreements) > 0
    assert [p.confidence for p in shown] == sorted((p.confidence for p in shown), reverse=True)
    for picture in shown:
        assert picture.label == found.labels[picture.number]
        for network, guess in picture.guesses.items():
            assert guess.label == found.chosen[network][picture.number]
        assert picture.pixels.shape == (1, 16, 16)
        assert 0 <= float(picture.pixels.min()) < float(picture.pixels.max()) <= 1


def test_classes_are_matched_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that changed since training do not shift the labels."""
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    noise_images(tmp_path, "abc", 48, 16)
    for split in ("val", "test"):
        shutil.copytree("images/train", f"images/{split}")
    folder = ["--data.dataset", "folder", "--data.root", "images", "--data.in_chans", "1"]
    workers = ["--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]
    assert fit(tmp_path, *ALONE, *folder, *workers, "--model.num_classes", "3") == 0
    best = run_folder(tmp_path) / "checkpoints/best.ckpt"
    before = predict(best, "test")
    shutil.rmtree("images/test/a")
    shutil.rmtree("images/train")
    after = predict(best, "test")
    assert after.class_names == before.class_names == ["a", "b", "c"]
    of_others = before.labels != 0
    assert torch.equal(after.labels, before.labels[of_others])
    assert torch.equal(after.chosen["student"], before.chosen["student"][of_others])

    Path("images/test/b").rename("images/test/z")
    assert report(tmp_path, FIRST, "--split", "test") == 0
    assert "classes that the training images do not have: 'z'" in capsys.readouterr().out
    assert "Accuracy by class" not in (run_folder(tmp_path) / "report.md").read_text()


def test_pictures_are_as_they_were_before_normalization(runs: Path) -> None:
    from gpd_cli.data import ImageData

    with chdir(runs):
        found = predict(run_folder(runs) / "checkpoints/best.ckpt", "test")
    data = ImageData(image_size=16, mean=[0.0], std=[1.0])
    data.setup("test")
    images = torch.cat([images for images, _ in data.test_dataloader()])
    for picture in found.pictures:
        torch.testing.assert_close(picture.pixels, images[picture.number], atol=1e-5, rtol=0)


def test_missing_data_leaves_classes_and_pictures_out(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpd_cli.errors import DataError

    def gone(*_: object) -> None:
        raise DataError("The folder photos is gone; set --data.root.")

    monkeypatch.setattr("gpd_cli.commands.report.predict", gone)
    assert report(runs, FIRST, "--output", "without.html") == 0
    sentence = "are left out: The folder photos is gone; set --data.root."
    assert sentence in capsys.readouterr().out
    text = (runs / "without.html").read_text()
    assert sentence in text
    assert "Accuracy by class" not in text


def test_names_are_no_markup(runs: Path) -> None:
    from gpd_cli.report.page import write_page

    run = read_run(run_folder(runs), "<script>alert(1)</script>")
    write_page([run, run], {}, [], runs / "names.html")
    assert "<script>alert" not in (runs / "names.html").read_text()


def test_names_are_drawn_and_written_as_they_are(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matplotlib takes dollars for formulas and hides names with an underscore in front."""
    figures: list[Figure] = []

    class Seen(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr("gpd_cli.report.picture.Figure", Seen)
    names = ["_old", r"$\frac{x$", "a$_$x", os.fsdecode(b"caf\xe9"), "<i>|*b*__c__"]
    found = [read_run(run_folder(runs), name) for name in names]
    (runs / "names").mkdir(exist_ok=True)
    draw(found, runs / "names" / "all of (them).png")
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    drawn = [text.get_text().strip() for text in legend.get_texts()]
    assert len(drawn) == 2 * len(names)
    assert drawn[0] == "_old: student"
    write_markdown(found, {}, runs / "names" / "all of (them).md", "all of (them).png")
    text = (runs / "names" / "all of (them).md").read_text()
    assert "(all%20of%20%28them%29.png)" in text
    assert r"| \<i\>\|\*b\*\_\_c\_\_ |" in text
    assert r"| a$\_$x |" in text


FEW_NAMES = """\
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    class_names = ["zero", "one"]

    def train_dataloader(self):
        images = TensorDataset(torch.rand(40, 1, 16, 16), torch.arange(40) % 10)
        return DataLoader(images, batch_size=20)

    val_dataloader = predict_dataloader = train_dataloader
"""


def test_classes_that_own_data_does_not_name_have_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of one's own need not know how many classes the network has."""
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("few_names.py").write_text(FEW_NAMES)
    options = [option for option in arguments(*ALONE) if not option.startswith("--data")]
    assert main([*[o for o in options if o not in ("16", "32")], "--data", "few_names.Data"]) == 0
    best = run_folder(tmp_path) / "checkpoints/best.ckpt"
    assert report(tmp_path, FIRST) == 0
    assert predict(best, "validation").class_names[:3] == ["zero", "one", "2"]
    assert main(["predict", "--ckpt_path", str(best), "--trainer.accelerator", "cpu"]) == 0
    labels = {line.split(",")[1] for line in Path("predictions.csv").read_text().splitlines()[1:]}
    assert labels == {"zero", "one", *map(str, range(2, 10))}


def test_names_that_are_no_text_are_escaped(runs: Path) -> None:
    """Names of folders are bytes, and so those of classes."""
    from gpd_cli.report.page import write_page

    with chdir(runs):
        found = predict(run_folder(runs) / "checkpoints/best.ckpt", "validation")
    names = [os.fsdecode(b"caf\xe9"), "pâté", *found.class_names[2:]]
    # All of the first class are taken for the second.
    chosen = {name: torch.where(found.labels == 0, 1, found.labels) for name in found.chosen}
    odd = {FIRST: replace(found, class_names=names, chosen=chosen)}
    run = read_run(run_folder(runs), FIRST)
    write_page([run], odd, [f"There is no {names[0]}."], runs / "odd.html")
    write_markdown([run], odd, runs / "odd.md", "odd.png")
    for name in ("odd.html", "odd.md"):
        text = (runs / name).read_text(encoding="utf-8")
        assert "caf\\udce9" in text
        assert "pâté" in text


def test_without_plotly_fit_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpd_cli.commands.report.find_spec", lambda name: None)
    assert fit(tmp_path, *ALONE) == 0
    output = capsys.readouterr().out
    assert "pip install 'gpd-cli[report]', then gpd report runs/gpd/version_0" in output
    assert not (run_folder(tmp_path) / "report.html").exists()
    assert last_logged(tmp_path, "val/student_top1") >= 0
    assert report(tmp_path, FIRST) == 1
    assert "gpd-cli[report]" in capsys.readouterr().err


def test_the_caption_says_which_images_were_scored() -> None:
    def run(*epochs: str) -> Run:
        scores = {n: {f"{stage}/student_top1": 50.0} for n, stage in enumerate(epochs, 1)}
        return Run("r", Path(), scores, [])

    scored, not_scored = run("val", "val"), run("train", "train")
    assert "on validation images in the epoch that is best" in caption([scored])
    assert "validation images" not in caption([not_scored])
    assert "on training images in the last epoch" in caption([not_scored])
    both = caption([scored, not_scored])
    assert "on validation images" in both
    assert "on training images in the last epoch of a run without validation" in both


@pytest.mark.parametrize(("channels", "size"), [(1, 80), (2, 8), (2, 80), (3, 80), (4, 80)])
def test_images_of_any_number_of_channels_are_shown(channels: int, size: int) -> None:
    pytest.importorskip("plotly")
    from gpd_cli.report.page import data_uri

    pixels = torch.rand(channels, size, size)
    kind, _, encoded = data_uri(pixels).partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.mode == ("L" if channels < 3 else "RGB")
    assert kind == ("data:image/png" if size == 8 else "data:image/jpeg")


# The browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOOK = """
<iframe id="page" style="border:0;width:{width}px;height:2000px" srcdoc="{source}"></iframe>
<pre id="seen"></pre>
<script>
addEventListener("load", () => setTimeout(() => {{
  const page = document.getElementById("page").contentDocument;
  const plots = [...page.querySelectorAll(".plotly-graph-div")];
  document.getElementById("seen").textContent = JSON.stringify({{
    plots: plots.length,
    drawn: plots.filter((plot) => plot.querySelectorAll(".scatterlayer .trace").length).length,
    tooWide: plots.filter((plot) =>
      plot.querySelector(".main-svg").getBoundingClientRect().width > plot.clientWidth + 1).length,
    pictures: [...page.querySelectorAll("figure img")].filter((i) => i.naturalWidth > 0).length,
    width: page.documentElement.scrollWidth,
  }});
}}, 500));
</script>
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(page: Path, width: int, tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"there is no browser here ({', '.join(BROWSERS)})")
    frame = tmp_path / "frame.html"
    frame.write_text(LOOK.format(width=width, source=html.escape(page.read_text())))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,2000"]
    done = subprocess.run(
        [
            *(browser, *options, f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=20000", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["plots"] == seen["drawn"] >= 10
    assert seen["tooWide"] == 0
    assert seen["pictures"] > 0
    assert seen["width"] <= width
