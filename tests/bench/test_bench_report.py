"""Conclusions and the report: what is said follows from the numbers, and the page works in a browser."""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsample.bench.errors import UserError
from fastsample.bench.report import headline_text, number, render_run, with_error
from fastsample.bench.results import Point, Results, compare, headline, leaders
from fastsample.bench.run import bench
from fastsample.conf import BenchConfig
from fastsample.metrics import FrechetEstimate, Gaussian, GroupedMoments, estimate

METRIC, SPLIT, D = "fd-test-200", "train", 4


def fd(shift: float, noise_seed: int, n: int = 200) -> FrechetEstimate:
    moments = GroupedMoments(D)
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(noise_seed), dtype=torch.float64)
    moments.update(noise + shift, range(n))
    return estimate(moments, Gaussian(torch.zeros(D).double(), torch.eye(D).double()))


def point(solver: str, nfe: int, shift: float, seeds: tuple[int, ...] = (0,), seconds: float = 1.0) -> Point:
    cells = []
    for seed in seeds:
        result = {
            "nfe": nfe,
            "rmse": shift,
            "seconds_per_sample": seconds * nfe,
            "metrics": {METRIC: {SPLIT: fd(shift, seed).to_dict()}},
        }
        cells.append({"seed": seed, "result": result})
    return Point(solver, None, nfe, tuple(cells))


def results(*points: Point, references: tuple[dict[str, Any], ...] = ()) -> Results:
    metrics = {METRIC: {"splits": [SPLIT], "higher": False}}
    manifest: dict[str, Any] = {"metrics": metrics, "splits": {SPLIT: {}}, "config": {"baseline": "ddim"}}
    for cell in references:
        cell.update(solver="exact", steps=100)
    return Results(manifest, points, references, 0, ())


def test_leaders_need_two_standard_errors_of_the_paired_difference() -> None:
    near, nearer, far = point("a", 8, 0.31), point("b", 8, 0.30), point("c", 8, 0.6)
    # unpaired, the intervals of a and b overlap widely; paired, b is better
    a, b = near.distance(METRIC, SPLIT), nearer.distance(METRIC, SPLIT)
    assert a.value - 2 * a.se < b.value
    (best,) = leaders([near, nearer, far], METRIC, SPLIT)["8"]
    assert best is nearer
    other_noise = point("d", 8, 0.31, seeds=(1,))
    assert compare(other_noise, nearer, METRIC, SPLIT) is None  # nothing shared: nothing is claimed
    tie = leaders([point("a", 8, 0.3), point("b", 8, 0.3), far], METRIC, SPLIT)["8"]
    assert [p.solver for p in tie] == ["a", "b"]
    # ahead, but within two standard errors of the difference: other samples under the same indices
    (cell,) = point("e", 8, 0.31, seeds=(1,)).cells
    unsure = Point("e", None, 8, ({**cell, "seed": 0},))
    difference = compare(unsure, nearer, METRIC, SPLIT)
    assert difference is not None
    assert 0 < abs(difference.value) < 2 * difference.se
    assert [p.solver for p in leaders([nearer, unsure, far], METRIC, SPLIT)["8"]] == ["b", "e"]
    assert leaders([near, point("b", 9, 0.3)], METRIC, SPLIT) == {}


def test_averages_over_seeds() -> None:
    p = point("a", 8, 0.3, seeds=(0, 1, 2))
    singles = [point("a", 8, 0.3, seeds=(s,)).distance(METRIC, SPLIT) for s in range(3)]
    mean = p.distance(METRIC, SPLIT)
    assert mean.value == pytest.approx(sum(s.value for s in singles) / 3)
    assert mean.se == pytest.approx(sum(s.se**2 for s in singles) ** 0.5 / 3)


def test_the_headline_is_the_cheapest_match() -> None:
    ddim = [point("ddim", 10, 0.9), point("ddim", 50, 0.5)]
    found = headline(
        results(*ddim, point("x", 6, 0.8), point("x", 8, 0.5), point("y", 10, 0.3)), METRIC, SPLIT
    )
    assert (found["kind"], found["solver"], found["nfe"], found["baseline_nfe"]) == ("fewer", "x", 8, 50)
    assert found["speedup"] == pytest.approx(50 / 8)
    data = {"headline": found, "points": []}
    assert headline_text(data)[0] == "x does in 8 evaluations what ddim takes 50 for"
    assert "6.2 times faster" in headline_text(data)[1]


def test_the_headline_admits_that_nothing_matches() -> None:
    found = headline(results(point("ddim", 50, 0.3), point("x", 20, 0.5)), METRIC, SPLIT)
    assert found["kind"] == "none"
    assert "Nothing here matches ddim at 50" in headline_text({"headline": found, "points": []})[0]
    # barely within the margin, but not with its error
    noisy = headline(results(point("ddim", 50, 0.3), point("x", 20, 0.313, seeds=(0,))), METRIC, SPLIT)
    assert noisy["kind"] == "none"
    assert headline(results(point("x", 20, 0.5)), METRIC, SPLIT)["kind"] == "no baseline"
    itself = headline(results(point("ddim", 50, 0.3), point("ddim", 20, 0.3)), METRIC, SPLIT)
    assert headline_text({"headline": itself, "points": []})[0] == "ddim needs only 20 of its 50 evaluations"


def test_the_headline_speaks_of_the_converged_solution() -> None:
    reference = point("exact", 100, 0.5)
    points = (point("ddim", 4, 0.9), point("x", 4, 0.6), point("ddim", 50, 0.2), point("x", 50, 0.5))
    found = headline(results(*points, references=reference.cells), METRIC, SPLIT)
    assert found["kind"] == "none"  # ddim at 50 is better than the model itself: nothing matches that
    assert (found["converged"]["match"]["solver"], found["converged"]["match"]["nfe"]) == ("ddim", 50)
    assert found["closest"] == {"solver": "x", "wins": 1, "of": 2}
    text = headline_text({"headline": found, "points": []})[1]
    assert "ddim reaches the distance of the model's own converged solution" in text
    assert "in 50 evaluations. x stays closest to that solution at 1 of 2 numbers of evaluations." in text


def test_numbers() -> None:
    assert [number(v) for v in (None, 0, 1234.5, 0.012345, 1e-7, 99999.4)] == [
        "–",
        "0",
        "1234",
        "0.0123",
        "1.00e-07",
        "99999",
    ]
    assert with_error(3.14159, 0.0123) == "3.142 ± 0.025"
    assert with_error(314.159, 12.3) == "314 ± 25"
    assert with_error(1.0, 0.0) == "1.000 ± 0.000"


# -- files


@pytest.fixture
def run(settings: Callable[..., BenchConfig]) -> Path:
    return bench(settings(images=4, metrics=["swd", "psnr"]), command="fastsample bench out='<b>&'").parent


def test_csv_and_json_agree(run: Path) -> None:
    data = json.loads((run / "results.json").read_text())
    assert data["schema"] == "fastsample.results/2"
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data["points"]) == 4
    for row, entry in zip(rows, data["points"], strict=True):
        assert row["solver"] == entry["solver"]
        assert float(row["rmse"]) == entry["rmse"]
        assert float(row["swd-400_heldout_se"]) == entry["metrics"]["swd-400"]["heldout"]["se"]


def test_the_report_is_one_file_without_a_link_to_anything(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert not re.search(
        r"""(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""",
        page.replace("src: `data:", ""),
    )
    assert "default-src 'none'" in page
    assert "fastsample bench out=&#39;&lt;b&gt;&amp;&#39;" in page
    assert page.count('"images": [') == 5


def test_an_unfinished_run_says_so(run: Path) -> None:
    files = sorted((run / "cells").glob("d*.json"))
    files[0].unlink()
    files[1].write_text("{")
    page = render_run(run).read_text()
    assert "The run is not finished: 2 cells are missing" in page
    assert f"{files[1].name}: unreadable" in page
    for file in (run / "cells").glob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match="no cell is finished yet"):
        render_run(run)
    (run / "run.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError, match="its schema is 'other'"):
        render_run(run)


# -- in a browser

_PROBE = """
<script>
addEventListener("load", () => {
  const count = s => document.querySelectorAll(s).length;
  const result = {errors: window.failures, width: document.documentElement.scrollWidth, window: innerWidth};
  result.marks = count("#chart-nfe .mark");
  result.bars = count("#chart-nfe .error");
  result.charts = count(".chart svg");
  result.rows = count("#table tbody tr");
  result.pictures = [...document.images].filter(i => i.complete && i.naturalWidth === 8).length;
  const before = document.querySelector("#chart-nfe path.mark").getAttribute("d");
  document.querySelectorAll("#split-choice button")[1].click();
  result.moved = document.querySelector("#chart-nfe path.mark").getAttribute("d") !== before;
  const metric = document.querySelectorAll("#metric-choice button")[1];
  metric.click();
  result.metric = [metric.textContent, document.getElementById("direction").textContent];
  result.splits = count("#split-choice button");
  result.scores = count("#chart-nfe .error");
  result.scoreTick = document.querySelector("#chart-nfe text").textContent;
  document.querySelectorAll("#metric-choice button")[0].click();
  result.splitsAgain = count("#split-choice button");
  document.querySelector("#legend button").click();
  result.marksLeft = count("#chart-nfe .mark");
  result.rowsLeft = count("#samples .row[data-label]");
  document.querySelectorAll("th button")[0].click();
  document.querySelectorAll("th button")[0].click();
  result.sorted = document.querySelector("th").getAttribute("aria-sort");
  result.first = document.querySelector("#table tbody td").textContent;
  const slider = document.getElementById("budget");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  result.budget = document.getElementById("budget-value").textContent;
  const svg = document.querySelector("#chart-nfe svg"), mark = svg.querySelector(".mark");
  const {x, y} = mark.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: x + 3, clientY: y + 3}));
  const tooltip = document.getElementById("tooltip");
  result.tooltip = tooltip.hidden ? null : tooltip.textContent;
  result.requests = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify(result);
  document.body.append(pre);
});
</script>
"""


@pytest.mark.parametrize("width", [1280, 500])
def test_the_report_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = (run / "report.html").read_text()
    guard = "<script>window.failures = []; addEventListener('error', e => failures.push(e.message));</script>"
    page = page.replace("<head>", f"<head>{guard}", 1).replace("</body>", f"{_PROBE}</body>", 1)
    file = tmp_path / "probed.html"
    file.write_text(page)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    flags += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [browser, *flags, "--virtual-time-budget=3000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    result = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "CONSOLE" not in done.stderr
    assert result["errors"] == []
    assert result["requests"] == 0
    assert result["width"] <= result["window"]  # nothing sticks out sideways
    assert (result["marks"], result["bars"], result["charts"], result["rows"]) == (4, 4, 4, 5)
    assert result["pictures"] == 3 * 4
    assert result["moved"]
    assert result["metric"] == ["psnr-400", "Higher"]
    assert (result["splits"], result["scores"], result["splitsAgain"]) == (0, 4, 2)
    assert 20 < float(result["scoreTick"]) < 30  # decibels on a linear axis
    assert (result["marksLeft"], result["rowsLeft"]) == (2, 1)
    assert (result["sorted"], result["first"]) == ("descending", "dpmpp_2m")
    assert result["budget"] == "4"
    assert "dpmpp_2m" in result["tooltip"]
    assert "evaluations" in result["tooltip"]
