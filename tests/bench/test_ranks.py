"""A launched run: samples shared out over processes, the same result as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
METRICS = "metrics=[fd-blocks,kd-blocks,precision-blocks,recall-blocks,swd,psnr]"


def launch(out: Path, images: dict[str, str], processes: int) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29543"]
    settings = [
        *("model._target_=gaussian_model.make_model", "solvers=[ddim,dpmpp_2m]", "nfe=[4,8]"),
        "feature_samples=130",
        *("n=430", "batch=50", "images=3", METRICS, "reference.steps=30", "reference.n=120"),
        *(f"train={images['train']}", f"heldout={images['heldout']}", f"out={out}"),
    ]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "fastsample.cli",
        "bench",
        *settings,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    return json.loads((out / "results.json").read_text())


def test_two_processes_give_the_result_of_one(images: dict[str, str], tmp_path: Path) -> None:
    one, two = (launch(tmp_path / str(n), images, n) for n in (1, 2))
    assert two["complete"]
    for a, b in zip([one["reference"], *one["points"]], [two["reference"], *two["points"]], strict=True):
        for key in ("label", "nfe", "n", "rows_per_sample", "flops_per_sample"):
            assert a[key] == b[key]
        if a is not one["reference"]:
            assert b["rmse"] == pytest.approx(a["rmse"], rel=1e-5)
        assert list(a["metrics"]) == list(b["metrics"])
        for x, y in zip(a["metrics"].values(), b["metrics"].values(), strict=True):
            for split in x:
                assert (
                    (x[split] is None) == (y[split] is None) == (a["rmse"] is None and split == "converged")
                )
                if x[split] is not None:
                    assert y[split]["value"] == pytest.approx(x[split]["value"], rel=1e-6, abs=1e-9)
                    assert y[split]["se"] == pytest.approx(x[split]["se"], rel=1e-5)
    cells = [sorted((tmp_path / str(n) / "cells").glob("*.json")) for n in (1, 2)]
    assert [f.name.rsplit("-", 1)[0] for f in cells[0]] == [f.name.rsplit("-", 1)[0] for f in cells[1]]
    shown = [[json.loads(f.read_text())["result"]["images"] for f in files] for files in cells]
    assert shown[0] == shown[1]


AT_THE_END = """
import atexit, json, os, sys, time
from pathlib import Path

seen = []

def threads():
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found.append((task / "comm").read_text())
        except OSError:  # it has just ended
            pass
    return found

def at_the_end():
    for _ in range(100):  # a thread that was joined is listed for a moment more
        if not any("gloo" in name for name in threads()):
            break
        time.sleep(0.05)
    seen.append(threads())
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(seen))  # their output would mix

import torch
from fastsample.distributed import summed

atexit.register(at_the_end)  # runs after what was registered later
assert summed(torch.ones(3)).tolist() == [2.0] * 3
seen.append(threads())
import torch.distributed.nn.functional  # whose defaults are the group, if there is one by now
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list its threads")
def test_no_thread_outlives_the_group(tmp_path: Path) -> None:
    """A thread that frees a tensor while Python ends kills the process, its work all done (SIGABRT)."""
    script = tmp_path / "script.py"
    script.write_text(AT_THE_END)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29544"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        before, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert any("gloo" in name for name in before)
        assert not any("gloo" in name for name in after)
