"""Tuning that is killed, split over processes, or run from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_tuning import QUICK, model

import fastsample as fs
from fastsample.cli import main

SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fastsample as fs
from helpers_tuning import QUICK, model
from fastsample.distributed import rank_and_size
fs.tune(model(), 4, folder=sys.argv[1], **(QUICK | {{"batch_size": 16}}))
assert rank_and_size()[1] == int(os.environ.get("WORLD_SIZE", "1"))
"""


def start(folder: Path, *launcher: str) -> subprocess.Popen[bytes]:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(script), str(folder)], env=environment)


def test_killed_and_started_again_it_gives_the_same_plan(tmp_path: Path) -> None:
    whole = fs.tune(model(), 4, folder=tmp_path / "whole", **(QUICK | {"batch_size": 16}))
    folder = tmp_path / "killed"
    for wanted in (1, 3):  # kill after so many iterations
        process = start(folder)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            states = [json.loads(f.read_text()) for f in folder.glob("state-*.json")]
            if states and states[0]["iteration"] >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folder).wait() == 0
    again = fs.Plan.load(folder / "tuned-4.json")
    assert again.values == whole.values
    record, expected = again.options["record"], whole.options["record"]
    assert record["heldout_rmse"] == expected["heldout_rmse"]
    # of all processes: what the later ones repeated is spent, too
    assert expected["evaluations"] <= record["evaluations"] < 3 * expected["evaluations"]
    assert not list(folder.rglob(".*"))  # nothing half-written


def test_trajectories_are_made_once_and_damage_is_noticed(tmp_path: Path) -> None:
    first = fs.tune(model(), 3, folder=tmp_path, **QUICK)
    again = fs.tune(model(), 4, folder=tmp_path, **QUICK)
    assert again.options["record"]["trajectories"] == first.options["record"]["trajectories"]
    file = min(tmp_path.glob("trajectories-*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    for state in tmp_path.glob("state-*.json"):
        state.unlink()
    with pytest.warns(UserWarning, match="checksum does not match"):
        repaired = fs.tune(model(), 3, folder=tmp_path, **QUICK)
    assert repaired.values == first.values
    state = next(iter(tmp_path.glob("state-*.json")))
    state.write_text("{")
    with pytest.raises(ValueError, match=r"state-.*damaged.*remove it"):
        fs.tune(model(), 3, folder=tmp_path, **QUICK)


def test_another_model_does_not_use_them(tmp_path: Path) -> None:
    one = fs.tune(model(), 3, folder=tmp_path, **QUICK)
    other = fs.tune(model(fs.VP.cosine()), 3, folder=tmp_path, **QUICK)
    assert one.options["record"]["trajectories"] != other.options["record"]["trajectories"]
    assert other == fs.tune(model(fs.VP.cosine()), 3, **QUICK)


def test_two_processes_fit_as_one(tmp_path: Path) -> None:
    """Batches are shared out; the sums differ by their order of addition alone."""
    one = fs.tune(model(), 4, **(QUICK | {"batch_size": 16}))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29541")
    assert start(tmp_path / "two", *launcher).wait() == 0
    two = fs.Plan.load(tmp_path / "two" / "tuned-4.json")
    torch.testing.assert_close(two.numbers, one.numbers, rtol=1e-3, atol=1e-4)
    ratio = two.options["record"]["heldout_rmse"] / one.options["record"]["heldout_rmse"]
    assert ratio == pytest.approx(1, rel=1e-2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        *("trajectories=64", "heldout=64", "reference_steps=30", "iterations=2", "batch=64"),
        f"out={tmp_path / 'tuned'}",
    ]
    main(["tune", "model=digits", "steps=[3,4]", *settings])
    printed = capsys.readouterr().out
    assert "tuned from" in printed
    assert f"wrote {tmp_path / 'tuned' / 'tuned-3.json'}" in printed
    out = tmp_path / "bench"
    main(
        [
            *("bench", "n=60", "batch=60", "reference.steps=30", "metrics=[]", "nfe=[3,4]", f"out={out}"),
            f"solvers=[auto,{{plan: {tmp_path / 'tuned'}, label: mine}}]",
        ]
    )
    points = json.loads((out / "results.json").read_text())["points"]
    rmse = {(p["label"], p["nfe"]): p["rmse"] for p in points}
    assert set(rmse) == {("auto", 3), ("auto", 4), ("mine", 3), ("mine", 4)}
    assert rmse["mine", 4] < rmse["auto", 4]
    main(
        [
            "sample",
            f"solver={{plan: {tmp_path / 'tuned' / 'tuned-4.json'}}}",
            "n=4",
            f"out={tmp_path / 'images'}",
        ]
    )
    assert (tmp_path / "images" / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "steps=0"], "steps=0 must be a whole number"),
        (["tune", "objective=rms"], "did you mean 'rmse'"),
        (["tune", "select=fd-digits", "heldout=100"], "heldout=576 samples are needed"),
        (["bench", "solvers=[{plan: missing.json}]"], "no such file"),
        (["bench", "solvers=[{plan: missing.json, eta: 1}]"], "takes no eta"),
        (["tune", "stesp=3"], "did you mean 'steps'"),
    ],
)
def test_bad_commands(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, f"out={tmp_path / 'out'}"])
    assert message in capsys.readouterr().err


def test_the_command_matches_the_metrics_moments(tmp_path: Path) -> None:
    """As many held-out samples as the distance needs; the moments are in the record."""
    settings = ["steps=3", "iterations=1", "trajectories=64", "reference_steps=20", "threads=1"]
    main(["tune", "match=fd-digits", *settings, f"out={tmp_path}"])
    record = fs.Plan.load(tmp_path / "tuned-3.json").options["record"]
    assert record["match"][1] == 1.0
    assert record["heldout_moments"] > 0
