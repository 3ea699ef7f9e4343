"""Two runs against each other, several on one axis, and the report for a pull request."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastsample.bench.compare import changes
from fastsample.bench.errors import UserError
from fastsample.bench.report import render_runs
from fastsample.bench.results import collect
from fastsample.bench.run import bench
from fastsample.cli import main
from fastsample.conf import BenchConfig

Settings = Callable[..., BenchConfig]


@pytest.fixture
def runs(settings: Settings, tmp_path: Path) -> tuple[Path, Path]:
    """The same solver by name, on its own grid and on a much worse one."""
    a, b = tmp_path / "a", tmp_path / "b"
    bench(settings(solvers=[{"name": "ddim", "label": "s"}], nfe=[4], out=str(a)))
    bench(settings(solvers=[{"name": "ddim", "label": "s", "grid": "karras"}], nfe=[4], out=str(b)))
    return a, b


def test_a_change_is_seen_in_its_direction(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs
    forth, back = (changes(collect(x), collect(y)) for x, y in ((a, b), (b, a)))
    assert len(forth) == 2  # train and held-out
    for one, other in zip(forth, back, strict=True):
        assert {one.verdict, other.verdict} == {"better", "worse"}
        assert one.difference.value == pytest.approx(-other.difference.value, rel=1e-6)
        assert one.difference.value == pytest.approx(one.after - one.before, rel=1e-6)
    worse, better = (
        (a, b) if forth[0].verdict == "worse" else (b, a),
        (b, a) if forth[0].verdict == "worse" else (a, b),
    )
    main(["compare", f"a={worse[0]}", f"b={worse[1]}"])  # no gate: says so and passes
    with pytest.raises(SystemExit) as stopped:
        main(["compare", f"a={worse[0]}", f"b={worse[1]}", "gate=true"])
    assert stopped.value.code == 1
    main(["compare", f"a={better[0]}", f"b={better[1]}", "gate=true"])
    assert "0 worse" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_is_the_same_as_itself(runs: tuple[Path, Path]) -> None:
    assert {c.verdict for c in changes(collect(runs[0]), collect(runs[0]))} == {"same"}


def test_what_cannot_be_compared(runs: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    a, _ = runs
    other = tmp_path / "other"
    bench(settings(solvers=["ddim"], nfe=[8], metrics=[], train=None, heldout=None, out=str(other)))
    with pytest.raises(UserError, match="their metrics differ"):
        changes(collect(a), collect(other))
    with pytest.raises(UserError, match="no metric to compare"):
        changes(collect(other), collect(other))
    with pytest.raises(UserError, match=r"cannot share an axis: their metrics differ"):
        render_runs([a, other], tmp_path / "merged")
    elsewhere = tmp_path / "elsewhere"
    bench(settings(solvers=["dpmpp_2m"], nfe=[8], out=str(elsewhere)))
    with pytest.raises(UserError, match="share no solver"):
        changes(collect(a), collect(elsewhere))
    assert not (tmp_path / "merged").exists()


def test_runs_on_one_axis(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs
    main(["report", f"runs=[{a},{b}]", f"out={tmp_path / 'merged'}"])
    data = json.loads((tmp_path / "merged" / "results.json").read_text())
    own = {folder: json.loads((folder / "results.json").read_text())["points"][0] for folder in runs}
    assert {p["label"]: p["rmse"] for p in data["points"]} == {"a: s": own[a]["rmse"], "b: s": own[b]["rmse"]}
    page = (tmp_path / "merged" / "report.html").read_text()
    assert '"a: s"' in page
    assert '"b: s"' in page
    with (tmp_path / "merged" / "results.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["a: s", "b: s"]


def test_the_report_for_a_pull_request(runs: tuple[Path, Path]) -> None:
    text = (runs[0] / "report.md").read_text()
    point = json.loads((runs[0] / "results.json").read_text())["points"][0]
    metric, by = next(iter(point["metrics"].items()))
    assert text.startswith("## ")
    assert f"{metric} to the train images" in text
    row = next(line for line in text.splitlines() if line.startswith("| s |"))
    assert float(row.split("|")[2].split()[0]) == pytest.approx(by["train"]["value"], abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a=x"], "b= is missing"),
        (["compare", "a=nowhere", "b=nowhere"], "no run.json there"),
        (["compare", "gat=true"], "did you mean 'gate'"),
        (["report", "runs=[]"], "give at least one run folder"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
