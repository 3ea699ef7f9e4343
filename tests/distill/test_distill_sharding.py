"""FSDP2 on two processes (gloo), by accelerate's launcher: the training of one process, and its checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distill import exact_trainer, final_state

METHODS: dict[str, dict[str, Any]] = {"consistency": {"convert": 2}, "dmd2": {"ratio": 2}}
SETTINGS: dict[str, Any] = {"steps": 6, "save_every": 3, "power_ema": [0.1]}

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from torch.distributed.tensor import DTensor
from helpers_distill import exact_trainer
from test_distill_sharding import METHODS, SETTINGS
from fastsample.distill.trainer import _Run

restore = _Run._restore
def checked(run):
    for net in (*run.plain.values(), *run.averages.nets.values(), *run.power.nets.values()):
        assert all(isinstance(p, DTensor) for p in net.parameters())
        assert 2 * sum(p.to_local().numel() for p in net.parameters()) < 1.2 * sum(p.numel() for p in net.parameters())
    restore(run)
_Run._restore = checked
for name, method in METHODS.items():
    exact_trainer(name, method, **SETTINGS).fit(f"{sys.argv[1]}/{name}")
    exact_trainer(name, method, **SETTINGS).fit(f"{sys.argv[1]}/resumed-{name}", resume=True)
"""


def half(source: Path, target: Path) -> None:
    """A folder as it was after three updates."""
    shutil.copytree(
        source, target, ignore=shutil.ignore_patterns("00000006*", "manifest.json", "tensorboard")
    )
    shutil.copy(source / "checkpoints" / "00000003" / "manifest.json", target / "checkpoints" / "00000003")


def close(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Everything that a checkpoint holds, up to the order of sums."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(b[key], value, rtol=1e-8, atol=1e-10)
        elif key != "/best/sha256":  # of weights that are near, not equal
            assert b[key] == value, key


@pytest.mark.slow
def test_fsdp2_trains_as_one_process_and_resumes_on_one(tmp_path: Path) -> None:
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    for name, method in METHODS.items():
        exact_trainer(name, method, **SETTINGS).fit(one / name)
        half(one / name, two / f"resumed-{name}")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(script), str(two), str(Path(__file__).parent),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, method in METHODS.items():
        expected = final_state(one / name, 6)
        close(expected, final_state(two / name, 6))
        close(expected, final_state(two / f"resumed-{name}", 6))
        half(two / name, mixed / name)
        exact_trainer(name, method, **SETTINGS).fit(mixed / name, resume=True)
        close(expected, final_state(mixed / name, 6))
        for folder in (two / name, two / f"resumed-{name}"):
            assert (folder / "model.safetensors").stat().st_size == (
                one / name / "model.safetensors"
            ).stat().st_size
            assert (folder / "samples" / "00000006.png").is_file()


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version=1: FSDP2 is needed"):
        exact_trainer("consistency", {}).fit(tmp_path)
