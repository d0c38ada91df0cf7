"""The Python in the documentation runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpd_cli
from documentation import Block, blocks

# Files of their own, which other tests run: tests/cli/test_own_code.py, tests/cli/test_cli.py, and
# tests/docs/test_tutorial.py.
FILES = ("# mine.py\n", "# make_photos.py\n", "# classify.py\n")
SNIPPETS = [block for block in blocks("python") if not block.text.startswith(FILES)]


def student() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(features, nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.page)
def test_snippet(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sent: list[str] = []
    given: dict[str, Any] = {"student": student(), "images": torch.rand(2, 3, 224, 224)}
    if "huggingface_hub" in block.text:
        api = pytest.importorskip("huggingface_hub").HfApi
        monkeypatch.setattr(api, "create_repo", lambda self, name, **_: sent.append(name))
        monkeypatch.setattr(api, "upload_folder", lambda self, repo_id, **_: sent.append(repo_id))
    rules = dict(gpd_cli.RULES)
    try:
        exec(compile(block.text, block.page, "exec"), given)
    finally:
        gpd_cli.RULES.clear()
        gpd_cli.RULES.update(rules)
    if "huggingface_hub" in block.text:
        assert sent == ["USER/NAME", "USER/NAME"]
    if "pair.extract()" in block.text:
        with torch.no_grad():
            assert torch.equal(given["plain"](given["images"]), given["student"](given["images"]))
    if "class PairwiseGate" in block.text:
        _check_rule(given["PairwiseGate"])


def _check_rule(gate: type[nn.Module]) -> None:
    network = nn.Sequential(nn.Linear(6, 8), gate(8), nn.Linear(8, 3))
    pair = gpd_cli.expand(network, ratio=2, branches=1, sample=torch.rand(2, 6))
    assert pair.teacher[1].up.out_features == 32 and pair.teacher[1].down.in_features == 16
