"""What the documents promise: their Python runs, and they name every solver and grid that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastsample as fs
from fastsample import adaptive
from fastsample.solvers import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's example solver must not stay registered for other tests."""
    fs.solvers.names()
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_run(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    # README's first example is about the reader's own network
    scope: dict[str, object] = {"net": lambda x, t, **conditions: torch.zeros_like(x)}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)


def test_the_worked_example_is_the_family_it_belongs_to() -> None:
    page = (ROOT / "docs" / "new-solver.md").read_text(encoding="utf-8")
    exec(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0], {})
    settings = {"steps": 7, "grid": "karras", "end": "sigma_min", "prediction": "v"}
    mine = fs.solvers.build("my_ab2", fs.VP.linear(), **settings)
    known = fs.solvers.build("exp_adams", fs.VP.linear(), order=2, **settings)
    torch.testing.assert_close(mine.numbers, known.numbers, rtol=1e-9, atol=1e-9)


def test_every_name_is_documented() -> None:
    page = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    names = [*fs.solvers.names(), *fs.grids.names(), *adaptive.names()]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
