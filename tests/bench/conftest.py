"""Shared by the harness's tests: true images of the Gaussian model, and a small set of settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gaussian_model import write_images

from fastsample.conf import BenchConfig, ReferenceConfig


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("images")
    return {
        "train": str(write_images(root / "train", 200, 7)),
        "heldout": str(write_images(root / "heldout", 100, 8)),
    }


@pytest.fixture
def settings(images: dict[str, str], tmp_path: Path) -> Callable[..., BenchConfig]:
    def make(**changes: Any) -> BenchConfig:
        chosen: dict[str, Any] = {
            "model": {"_target_": "gaussian_model.make_model"},
            "solvers": ["ddim", "dpmpp_2m"],
            "nfe": [4, 8],
            "n": 400,
            "batch": 150,
            "metrics": ["fd-blocks"],
            "train": images["train"],
            "heldout": images["heldout"],
            "reference": ReferenceConfig(solver="dpmpp_2m", steps=40),
            "out": str(tmp_path / "run"),
        }
        return BenchConfig(**(chosen | changes))

    return make
