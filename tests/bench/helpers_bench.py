"""A run of the harness on a small analytic model, for tests that compare samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastsample.bench.run import bench
from fastsample.conf import BenchConfig, ReferenceConfig


def points_of_run(
    tmp_path: Path, solvers: list[Any], **changes: Any
) -> dict[tuple[str, float], dict[str, Any]]:
    config = BenchConfig(
        model={"_target_": "gaussian_model.make_model"},
        solvers=solvers,
        n=40,
        batch=20,
        images=0,
        metrics=[],
        reference=ReferenceConfig(steps=60, n=40),
        out=str(tmp_path / "run"),
        **({"nfe": [5]} | changes),
    )
    bench(config)
    points = json.loads((tmp_path / "run" / "results.json").read_text())["points"]
    return {(p["label"], p["nfe"]): p for p in points}
