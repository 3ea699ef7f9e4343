"""The harness: what a cell holds, that it is never done twice, and that errors come before work."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gaussian_model
import pytest
import torch

import fastsample as fs
from fastsample.bench import cells as cell_files
from fastsample.bench.errors import UserError
from fastsample.bench.model import counted, draw_labels
from fastsample.bench.run import _prepare, bench
from fastsample.conf import BenchConfig, ReferenceConfig
from fastsample.metrics import Gaussian, GroupedMoments, estimate, frechet_distance, rmse, to_uint8
from fastsample.metrics.frechet import RELIABLE_RATIO

Settings = Callable[..., BenchConfig]


def load(config: BenchConfig) -> dict:
    return json.loads((Path(config.out) / "results.json").read_text())


def points(config: BenchConfig) -> dict[tuple[str, int], dict]:
    return {(p["label"], p["steps"]): p for p in load(config)["points"]}


def test_a_cell_holds_what_an_independent_computation_gives(settings: Settings) -> None:
    config = settings()
    bench(config)
    row = points(config)["dpmpp_2m", 8]

    denoiser = gaussian_model.make_model()
    shape = (400, *gaussian_model.SHAPE)
    x = fs.Sampler(denoiser, "dpmpp_2m", 8)(shape=shape, seed=0)
    exact = fs.Sampler(denoiser, "dpmpp_2m", 40)(shape=shape, seed=0)
    assert (row["rmse"], row["rmse_median"]) == pytest.approx(rmse(x, exact), rel=1e-4)
    assert row["nfe"] == row["rows_per_sample"] == 8

    def blocks(images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4)
        return means.flatten(1).double() / 64

    def moments(images: torch.Tensor) -> GroupedMoments:
        result = GroupedMoments(16)
        result.update(blocks(images), range(len(images)))
        return result

    train = moments(to_uint8(denoiser.net.images(200, 7)))  # type: ignore[union-attr]
    expected = estimate(moments(to_uint8(x)), train.gaussian())
    found = row["metrics"]["fd-blocks-400"]["train"]
    assert (found["value"], found["se"]) == pytest.approx((expected.value, expected.se), rel=1e-3)
    assert found["reliable"]
    assert set(row["metrics"]["fd-blocks-400"]) == {"train", "heldout"}


def test_more_evaluations_come_closer_and_the_reference_is_the_closest(settings: Settings) -> None:
    config = settings()
    bench(config)
    found = points(config)
    for solver in ("ddim", "dpmpp_2m"):
        assert found[solver, 8]["rmse"] < found[solver, 4]["rmse"]
    reference = load(config)["reference"]
    assert reference["nfe"] == 40
    assert reference["rmse"] is None
    assert reference["half_steps_rmse"] < found["dpmpp_2m", 8]["rmse"]


def test_results_do_not_depend_on_the_batch_size(settings: Settings, tmp_path: Path) -> None:
    first, second = settings(out=str(tmp_path / "a")), settings(out=str(tmp_path / "b"), batch=77)
    bench(first)
    bench(second)
    for key, row in points(first).items():
        other = points(second)[key]
        assert row["rmse"] == pytest.approx(other["rmse"], rel=1e-5)
        values = [r["metrics"]["fd-blocks-400"]["train"]["value"] for r in (row, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_budgets_take_the_most_steps_within_and_counts_are_counted(settings: Settings) -> None:
    config = settings(solvers=["ddim", "heun", "pndm"], nfe=[4, 7])
    bench(config)
    counts = {key: row["nfe"] for key, row in points(config).items()}
    expected = {("ddim", 4): 4, ("ddim", 7): 7, ("heun", 2): 3, ("heun", 4): 7}
    assert counts == {**expected, ("pndm", 1): 1, ("pndm", 2): 5}
    assert load(config)["run"]["notes"] == []


def test_a_budget_that_no_plan_keeps_is_said(settings: Settings) -> None:
    heun = {"name": "heun", "end": "sigma_min"}
    config = settings(solvers=["ddim", heun], nfe=[1])
    report = bench(config).read_text()
    assert load(config)["run"]["notes"] == ["heun(end=sigma_min) has no plan with 1 or fewer evaluations"]
    assert "has no plan with 1 or fewer evaluations" in report
    with pytest.raises(UserError, match="no solver has a plan within these budgets"):
        bench(settings(solvers=[heun], nfe=[1]))


def test_explicit_steps_grids_seeds_and_options(settings: Settings) -> None:
    solvers = ["ddim", {"name": "ddim", "eta": 1.0}]
    config = settings(solvers=solvers, steps=[5], grids=["uniform", "karras"], seeds=[0, 3])
    bench(config)
    rows = load(config)["points"]
    assert {row["label"] for row in rows} == {
        f"{solver} on {grid}" for solver in ("ddim", "ddim(eta=1.0)") for grid in ("uniform", "karras")
    }
    for row in rows:
        assert row["seeds"] == [0, 3]
        assert row["nfe"] == 5
        assert row["stochastic"] == ("eta" in row["solver"])
        assert (row["rmse"] is None) == row["stochastic"]
        seeds = row["metrics"]["fd-blocks-400"]["train"]["seeds"]
        assert row["metrics"]["fd-blocks-400"]["train"]["value"] == pytest.approx(
            sum(e["value"] for e in seeds.values()) / 2
        )


def test_no_error_is_given_to_what_ends_at_another_noise_level(settings: Settings) -> None:
    solvers = ["ddim", {"name": "dpmpp_2m", "end": "sigma_min"}]
    config = settings(solvers=solvers, nfe=[4])
    bench(config)
    found = {label: row["rmse"] for (label, _), row in points(config).items()}
    assert found["ddim"] > 0
    assert found["dpmpp_2m(end=sigma_min)"] is None


def test_an_npz_of_moments_and_no_metric_at_all(settings: Settings, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "stats.npz", mu=np.zeros(16), sigma=np.eye(16))
    config = settings(train=str(tmp_path / "stats.npz"), heldout=None, nfe=[4])
    bench(config)
    row = points(config)["ddim", 4]
    assert row["metrics"]["fd-blocks-400"]["train"]["value"] > 1
    assert row["memorisation"] is None
    config = settings(metrics=[], train=None, heldout=None, nfe=[4], out=str(tmp_path / "plain"))
    assert bench(config).exists()
    assert load(config)["headline"] is None


def test_the_demonstration_is_what_it_promises(tmp_path: Path) -> None:
    job = _prepare(BenchConfig(out=str(tmp_path)))
    counts: dict[str, set[int]] = {}
    for planned in job.planned:
        counts.setdefault(planned.cell.solver, set()).add(planned.sampler.plan.nfe)
    assert len(counts) >= 8
    assert {"auto", "ddim"} <= counts.keys()
    assert all(min(found) <= 4 and 49 <= max(found) <= 50 for found in counts.values())
    assert [m.name for m in job.metrics] == ["fd-digits-1k"]
    assert all(job.config.n >= RELIABLE_RATIO * m.dim for m in job.metrics)
    assert list(job.splits) == ["train", "heldout"]


# -- resuming


def test_killed_and_started_again_redoes_nothing_finished(images: dict[str, str], tmp_path: Path) -> None:
    log, out = tmp_path / "calls", tmp_path / "run"
    command = [sys.executable, "-m", "fastsample.cli", "bench", "model._target_=gaussian_model.make_killed"]
    command += [f"model.log={log}", "solvers=[ddim,dpmpp_2m]", "nfe=[4,8]", "n=64", "batch=64", f"out={out}"]
    command += [
        "reference.solver=ddim",
        "reference.steps=16",
        "metrics=[fd-blocks]",
        f"train={images['train']}",
    ]
    where = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    # one row for the operations' count, warm-up 16, reference 16 and its check 8, ddim 4, dpmpp_2m 4; then it
    # dies in the third evaluation
    environment = {**os.environ, **where}
    killed = subprocess.run(command, env={**environment, "KILL_AT": "52"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (out / "cells").glob("*.json")}
    assert len(before) == 3
    assert len(log.read_text().splitlines()) == 52
    assert not (out / "report.html").exists()

    log.unlink()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "3 of 5 cells are finished already" in again.stderr
    after = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (out / "cells").glob("*.json")}
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    rows = [int(line) for line in log.read_text().splitlines()]
    # the operations' count, warm-up and two cells of 8 evaluations
    assert rows == [1] + [64] * (8 + 8 + 8)
    assert (out / "report.html").exists()
    assert not list(out.rglob(".*"))


def test_damaged_files_are_said_and_redone(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings()
    bench(config)
    whole = {f: f.read_bytes() for f in sorted((Path(config.out) / "cells").glob("*.json"))}
    ddim, dpmpp = (f for f in whole if "-0008steps" in f.name)
    ddim.write_bytes(whole[ddim][:-200])
    dpmpp.write_bytes(whole[dpmpp].replace(b'"rmse": 0.', b'"rmse": 9.'))
    (solution,) = (Path(config.out) / "solutions").glob("*.safetensors")
    solution.write_bytes(solution.read_bytes()[:-1] + b"\x00")
    statistics = next((Path(config.out) / "statistics").iterdir())
    statistics.write_bytes(b"x")
    capsys.readouterr()
    bench(config)
    said = capsys.readouterr().err
    assert f"{ddim.name}: unreadable" in said
    assert f"{dpmpp.name}: its checksum does not match" in said
    assert f"{solution.name}: its checksum does not match" in said
    assert "2 of 5 cells are finished already" in said
    for file in whole:
        assert cell_files.read_file(file)["result"]["nfe"] in (4, 8, 40)


def test_other_settings_do_not_take_old_cells(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    bench(settings())
    capsys.readouterr()
    for change in ({"n": 300}, {"images": 3}, {"end": None}, {"labels": None}):
        bench(settings(**change))
        assert "0 of 5 cells are finished already" in capsys.readouterr().err
    config = settings(nfe=[4, 8, 12])
    bench(config)
    assert "5 of 7 cells are finished already" in capsys.readouterr().err
    assert {row["n"] for row in load(config)["points"]} == {400}


def test_a_full_disk_keeps_what_is_finished(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real, writes = cell_files.write_atomically, []

    def full(path: Path, content: bytes) -> None:
        writes.append(path)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    config = settings()
    monkeypatch.setattr(cell_files, "write_atomically", full)
    with pytest.raises(UserError, match=r"No space left on device; the 2 cells finished so far are kept"):
        bench(config)
    monkeypatch.setattr(cell_files, "write_atomically", real)
    assert len(list((Path(config.out) / "cells").glob("*.json"))) == 2
    bench(config)
    assert load(config)["complete"]


def test_a_network_that_fails_keeps_what_is_finished(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(model={"_target_": "gaussian_model.make_nan"}, batch=400)
    monkeypatch.setattr(gaussian_model.NanNet, "calls", 0)
    monkeypatch.setattr(gaussian_model.NanNet, "fail_from", 40 + 40 + 20 + 4 + 2)  # in dpmpp_2m's first cell
    with pytest.raises(UserError, match=r"dpmpp_2m, 4 steps, seed 0: .*evaluation \d of 4.*the 2 cells"):
        bench(config)
    monkeypatch.setattr(gaussian_model.NanNet, "fail_from", 0)
    bench(config)
    assert "2 of 5 cells are finished already" in capsys.readouterr().err
    assert load(config)["complete"]


# -- progress


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_one_bar_for_the_whole_run_on_a_terminal(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    bench(settings(batch=50))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = [line for line in re.split(r"[\r\n]", text) if "cells" in line][-1]
    assert "5/5 cells" in last
    assert re.search(r"[\d.e+]+ images/s", last)
    assert re.search(r"\d:\d\d:\d\d +\d:\d\d:\d\d", last)  # elapsed, remaining
    assert "dpmpp_2m, 8 evaluations" in last


def test_logs_get_a_line_a_cell(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    bench(settings())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 5
    assert lines[1].startswith("reference dpmpp_2m: 40 evaluations, seed 0, ")


# -- errors before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solvers": ["unipcc"]}, "did you mean 'unipc'"),
        ({"solvers": ["ddim", "ddim"]}, "named twice"),
        ({"solvers": [3]}, "solver=3"),
        ({"solvers": [{"name": "ddim", "steps": 3}]}, "steps is no option"),
        ({"solvers": [{"name": "ddim", "etta": 1}]}, "no option 'etta'; did you mean 'eta'"),
        ({"grids": ["karas"]}, "did you mean 'karras'"),
        ({"metrics": ["fd-block"]}, "did you mean 'fd-blocks'"),
        ({"metrics": ["fd-blocks-2k"]}, "asks for 2000 samples but n=400"),
        ({"steps": [0]}, "0 is refused"),
        ({"nfe": [4, 0]}, "0 is refused"),
        ({"nfe": []}, "at least one is needed"),
        ({"n": 16}, "16 features, so at least 17 samples are needed, and 384"),
        ({"n": 0}, "n=0"),
        ({"train": None, "heldout": None}, "images to compare with are needed"),
        ({"train": "digits:trian"}, "did you mean 'digits:train'"),
        ({"train": "/no/such/folder"}, "no such folder"),
        ({"model": "digitz"}, "did you mean 'digits'"),
        ({"model": {"_target_": "gaussian_model.make_modle"}}, "make_modle"),
        ({"model": {"_target_": "gaussian_model.make_nonsense"}}, "returned a int; return a Denoiser"),
        ({"model": {"_target_": "gaussian_model.make_model", "width": 3}}, "width"),
        ({"model": 7}, "model=7"),
        ({"shape": [1, 16, 16]}, "the model's"),
        ({"labels": 3}, "no classes"),
        ({"labels": [1, 2]}, "auto, null or one label"),
        ({"device": "cuda:77"}, "cannot be used here"),
        ({"baseline": "ddmi"}, "did you mean 'ddim'"),
        ({"reference": ReferenceConfig(solver={"name": "ddim", "eta": 1.0})}, "draws noise"),
        ({"reference": ReferenceConfig(steps=0)}, "reference.steps=0"),
        ({"guidance": 2.0}, "needs null="),
        ({"model": "digits", "guidance": 2.0, "labels": None}, "needs the condition 'labels'"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings: Settings, change: dict, message: str) -> None:
    config = settings(**change)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        bench(config)
    assert not (Path(config.out) / "cells").exists()


@pytest.mark.parametrize(("scale", "shift", "found"), [(0.5, 0.5, "0"), (127.5, 127.5, "")])
def test_images_in_another_range_are_refused(
    settings: Settings, scale: float, shift: float, found: str
) -> None:
    model = {"_target_": "gaussian_model.make_bright", "scale": scale, "shift": shift}
    config = settings(model=model, n=40, metrics=[], train=None, heldout=None)
    with pytest.raises(
        UserError, match=rf"converged samples lie in \[{found}.*images in \[-1, 1\] are needed.*decode="
    ):
        bench(config)
    assert not list((Path(config.out) / "cells").glob("*.json"))


# -- parts


def test_counting_under_guidance() -> None:
    calls = []

    def net(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 0.1 * x + labels[:, None, None, None] * 0

    for batched in (True, False):
        guidance = fs.Guidance(2.0, null={"labels": 10}, batched=batched)
        denoiser, tally = counted(fs.wrap(net, fs.VP.linear(), guidance=guidance, sample_shape=(1, 2, 2)))
        calls.clear()
        fs.Sampler(denoiser, "ddim", 5)(n=7, batch_size=3, labels=torch.arange(7))
        assert tally.rows == sum(calls) == 2 * 5 * 7
        assert tally.evaluations == 5 * 7
        tally.reset()
        assert tally.rows == tally.evaluations == 0


def test_labels_depend_on_seed_and_index_alone() -> None:
    index = torch.arange(2000)
    labels = draw_labels("auto", 10, 0, index)
    assert labels is not None
    part = draw_labels("auto", 10, 0, index[900:950])
    assert torch.equal(part, labels[900:950])  # type: ignore[arg-type]
    assert not torch.equal(labels, draw_labels("auto", 10, 1, index))  # type: ignore[arg-type]
    for g in range(20):  # balanced in each jackknife group, each in an order of its own
        assert torch.bincount(labels[index % 20 == g]).tolist() == [10] * 10
    assert len({tuple(labels[index % 20 == g][:10].tolist()) for g in range(20)}) == 20
    assert len(labels[:200].reshape(10, 20).unique(dim=0)) == 10
    assert draw_labels("auto", None, 0, index) is None
    assert draw_labels(None, 10, 0, index) is None
    assert draw_labels([3, 5], 10, 0, index[:4]).tolist() == [3, 5, 3, 5]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="labels are 0 to 9"):
        draw_labels(10, 10, 0, index)
    with pytest.raises(ValueError, match="give auto, null, a label"):
        draw_labels("three", 10, 0, index)


def test_intervals_cover_with_balanced_labels_and_are_shorter_than_with_free_ones() -> None:
    """Features of ten classes; the truth is that of the whole mixture (120 repeats: 89 to 100% covered)."""
    d, n, repeats = 8, 400, 120
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, d, generator=generator, dtype=torch.float64)
    centred = means - means.mean(0)
    truth = Gaussian(means.mean(0), centred.T @ centred / 10 + 0.25 * torch.eye(d))
    reference = Gaussian(torch.zeros(d).double(), torch.eye(d).double())
    exact = frechet_distance(truth, reference)
    covered, ses = 0, {"balanced": 0.0, "free": 0.0}
    for seed in range(repeats):
        balanced = draw_labels("auto", 10, seed, torch.arange(n))
        free = torch.randint(10, (n,), generator=generator)
        noise = 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)
        for name, labels in (("balanced", balanced), ("free", free)):
            moments = GroupedMoments(d)
            moments.update(means[labels] + noise, range(n))
            e = estimate(moments, reference)
            ses[name] += e.se / repeats
            covered += name == "balanced" and abs(e.value - exact) <= 2 * e.se
    assert 0.89 <= covered / repeats <= 1.0
    assert ses["balanced"] < ses["free"] / 1.5


def test_operations_are_those_of_the_layers(settings: Settings) -> None:
    """Counted by hand for a network of one convolution and one matrix product; guidance counts twice."""
    from torch import nn

    from fastsample.bench.cost import network_flops

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(8, 8)
            self.back = nn.Conv2d(4, 1, 1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.back(self.linear(self.conv(x)))

    by_hand = 2 * 64 * (4 * 9) + 2 * 4 * 8 * 8 * 8 + 2 * 64 * 4
    denoiser = fs.wrap(Net(), fs.VP.linear(), sample_shape=(1, 8, 8))
    assert network_flops(denoiser, (1, 8, 8), {}) == by_hand
    config = settings(
        model="digits", solvers=["ddim"], nfe=[4], n=20, guidance=2.0, metrics=[], train=None, heldout=None
    )
    bench(config)
    data = json.loads((Path(config.out) / "results.json").read_text())
    (point,) = data["points"]
    assert point["flops_per_sample"] == 2 * 4 * data["run"]["model"]["flops_per_row"] > 0
    assert point["images_per_second"] == pytest.approx(1 / point["seconds_per_sample"])
    assert point["peak_memory_bytes"] is None
