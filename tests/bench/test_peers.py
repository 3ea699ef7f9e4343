"""Other libraries' samplers in the run: the same noise, the same network, counted evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_model import SHAPE, make_model
from helpers_bench import points_of_run

import fastsample as fs
from fastsample.bench import peers
from fastsample.bench.errors import UserError

HERE = "gaussian_model.make_model"


def test_theirs_and_ours_of_the_same_name_agree(tmp_path: Path) -> None:
    """DDIM on the same times is the same sampler; DPM-Solver++(2M) nearly, but for their rounded times."""
    trailing = {"name": "ddim", "label": "ours"}
    found = points_of_run(
        tmp_path,
        [trailing, "diffusers:ddim", "dpmpp_2m", "diffusers:dpmpp_2m"],
        grids=[None],
        nfe=[5, 20],
    )
    for nfe in (5.0, 20.0):
        assert found["dpmpp_2m", nfe]["rmse"] == pytest.approx(
            found["diffusers:dpmpp_2m", nfe]["rmse"], rel=0.1
        )
        assert found["ours", nfe]["rmse"] == pytest.approx(found["diffusers:ddim", nfe]["rmse"], rel=0.02)


def test_evaluations_are_counted_and_budgets_kept(tmp_path: Path) -> None:
    found = points_of_run(tmp_path, ["diffusers:heun", "diffusers:pndm", "diffusers:euler_a"], nfe=[8])
    assert {k: p["steps"] for k, p in found.items()} == {
        ("diffusers:heun", 7.0): 4,  # 2 n - 1
        ("diffusers:pndm", 8.0): 7,  # n + 1
        ("diffusers:euler_a", 8.0): 8,
    }
    assert found["diffusers:euler_a", 8.0]["stochastic"]
    assert found["diffusers:euler_a", 8.0]["rmse"] is None
    assert "diffusers" in found["diffusers:heun", 7.0]["plan"]


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    mine = {"_target_": "peer_functions.euler", "power": 1.0, "label": "mine"}
    found = points_of_run(
        tmp_path, [mine, {"_target_": "peer_functions.euler", "power": 1.5}, "ddim"], nfe=[6]
    )
    assert set(found) == {("mine", 6.0), ("euler", 6.0), ("ddim", 6.0)}
    assert found["mine", 6.0]["rmse"] == pytest.approx(found["ddim", 6.0]["rmse"], rel=0.05)
    assert found["mine", 6.0]["rmse"] != found["euler", 6.0]["rmse"]


def test_a_finished_run_keeps_peers_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points_of_run(tmp_path, ["diffusers:unipc"])
    capsys.readouterr()
    points_of_run(tmp_path, ["diffusers:unipc"])
    assert "2 of 2 cells are finished already" in capsys.readouterr().err


def test_flows_run_theirs() -> None:
    flow = fs.wrap(lambda x, t: x, fs.Flow(shift=3.0), "flow", sample_shape=SHAPE)
    sampler = peers.DiffusersSampler(flow, "diffusers:FlowMatchEulerDiscreteScheduler", 4, {})
    index = torch.arange(2)
    x = sampler((2, *SHAPE), seed=0, index=index, device=torch.device("cpu"))
    ours = fs.Sampler(flow, "euler", 4)((2, *SHAPE), seed=0)
    assert sampler.plan.nfe == 4
    assert sampler.plan.end_sigma == 0
    # x' = x gives x_1 exp(-1), which both approach; their last sigmas differ a little
    assert float((x - ours).abs().max()) < 0.1
    with pytest.raises(ValueError, match="does not run flows"):
        peers.DiffusersSampler(flow, "diffusers:ddim", 4, {})


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("diffusers:dpmpp2m", "did you mean 'diffusers:dpmpp_2m'"),
        ({"name": "diffusers:ddim", "timestep_spacin": "leading"}, "did you mean 'timestep_spacing'"),
        ({"_target_": "peer_functions.euller"}, "euller"),
        ({"_target_": "peer_functions.flat"}, "returned .* for noise of shape"),
        ({"_target_": "peer_functions.idle"}, "never called the denoiser"),
    ],
)
def test_bad_peers_are_refused_before_any_work(solver: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        points_of_run(tmp_path, [solver])
    assert not (tmp_path / "run" / "cells").exists()


def test_processes_that_diffusers_does_not_run() -> None:
    edm = fs.wrap(make_model().net, fs.EDM(), "x0", sample_shape=SHAPE)
    with pytest.raises(ValueError, match="discrete VP processes and flows"):
        peers.DiffusersSampler(edm, "diffusers:euler", 4, {})
