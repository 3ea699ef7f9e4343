"""Importing the package is cheap, and its public names are where they are said to be."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastsample as fs

HEAVY = (
    "triton",
    "diffusers",
    "transformers",
    "torch_fidelity",
    "torchvision",
    "matplotlib",
    "hydra",
    "sklearn",
    "scipy",
    "rich",
)


def loaded_after(code: str) -> set[str]:
    report = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = loaded_after("import fastsample")
    assert not loaded & {*HEAVY, "torch", "numpy"}


def test_sampling_imports_nothing_heavy() -> None:
    # what torch itself brings along is not ours
    code = (
        "import fastsample as fs\n"
        "fs.Sampler(fs.wrap(lambda x, t: x, fs.VP.linear()), 'exp_adams', 3)(shape=(2, 3))\n"
        "fs.solvers.names(), fs.grids.names()"
    )
    ours = loaded_after(code) - loaded_after("import torch, torch.utils.checkpoint")
    assert not ours & set(HEAVY)


@pytest.mark.parametrize("name", sorted(set(fs.__all__)))
def test_public_names_exist(name: str) -> None:
    assert getattr(fs, name) is not None
    assert name in dir(fs)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Samplr'"):
        _ = fs.Samplr


def test_the_package_runs_as_the_command() -> None:
    shown = [sys.executable, "-m", "fastsample", "--help"]
    done = subprocess.run(shown, capture_output=True, text=True, check=True)
    assert "fastsample tune" in done.stdout
