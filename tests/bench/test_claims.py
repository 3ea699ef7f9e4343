"""Several workers on one folder: every cell is computed once, and a killed worker holds nothing back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastsample.bench.claims import claimed

HERE = Path(__file__).parent


def worker(out: Path, log: Path, kill_at: int = 0) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "KILL_AT": str(kill_at),
        "CALL_LOG": str(log),
        "CALL_SECONDS": "0.01",  # long enough for both to be at work
        "OMP_NUM_THREADS": "1",
    }
    settings = [
        "model._target_=gaussian_model.make_killed",
        "model.log=by-environment",
        "solvers=[ddim,dpmpp_2m,unipc,deis]",
        *("nfe=[4,6,8]", "n=60", "batch=20", "images=0", "metrics=[]"),
        *("reference.steps=40", "reference.n=60", f"out={out}"),
    ]
    command = [sys.executable, "-m", "fastsample.cli", "bench", *settings]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(log: Path) -> int:
    return sum(map(int, log.read_text().split()))


def results(out: Path) -> dict[tuple[str, float], float]:
    points = json.loads((out / "results.json").read_text())["points"]
    return {(p["label"], p["nfe"]): p["rmse"] for p in points}


def test_two_workers_share_the_cells(tmp_path: Path) -> None:
    alone = worker(tmp_path / "alone", tmp_path / "alone.log")
    assert alone.wait() == 0
    both = [worker(tmp_path / "both", tmp_path / f"{i}.log") for i in range(2)]
    assert [w.wait() for w in both] == [0, 0]
    assert results(tmp_path / "both") == results(tmp_path / "alone")
    # Each worker's first call, which pays for memory and kernels, samples a batch by the first of its plans,
    # the reference, and one row is spent on counting operations; the rest is done once.
    each = [rows(tmp_path / f"{i}.log") for i in range(2)]
    spent = sum(each)
    warm = 20 * 40 + 1
    assert min(each) > warm + 20 * 4
    assert rows(tmp_path / "alone.log") <= spent <= rows(tmp_path / "alone.log") + warm
    assert not list((tmp_path / "both" / "cells").glob("*.claim"))


def test_a_killed_workers_cell_is_taken_over(tmp_path: Path) -> None:
    first = worker(tmp_path / "run", tmp_path / "first.log", kill_at=60)
    second = worker(tmp_path / "run", tmp_path / "second.log")
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0
    alone = worker(tmp_path / "alone", tmp_path / "alone.log")
    assert alone.wait() == 0
    assert results(tmp_path / "run") == results(tmp_path / "alone")


def test_a_claim_is_exclusive_and_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    code = (
        "import sys, time; from pathlib import Path; from fastsample.bench.claims import claimed\n"
        f"with claimed(Path({str(path)!r}), wait=False) as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    with claimed(path, wait=False) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with claimed(path, wait=True) as mine:
        assert mine
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())
