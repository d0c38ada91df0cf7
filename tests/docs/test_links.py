"""Links outside of docs/ lead somewhere (`make docs` checks those of its pages)."""

import re

import pytest

from documentation import ROOT

FILES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"")


@pytest.mark.parametrize("name", FILES)
def test_links(name: str) -> None:
    path = ROOT / name
    for match in LINK.finditer(path.read_text()):
        target = match[1] or match[2]
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_readme_fits_a_front_page_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 160
    guides = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert [name for name in sorted(guides) if f"docs/{name}" not in text] == []
