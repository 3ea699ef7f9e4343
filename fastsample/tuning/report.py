"""What tuning changed, in words and as a table."""

from __future__ import annotations

from typing import Any

from ..plan import Plan
from .levenberg import State


def notes(start: str, record: dict[str, Any], state: State) -> list[str]:
    """Sentences for the printed plan."""
    gap = record["heldout_rmse"] / max(record["training_rmse"], 1e-30)
    return [
        f"tuned from {start}: error on held-out noise {record['start_rmse']:.4g} -> "
        f"{record['heldout_rmse']:.4g} (median {record['start_median']:.4g} -> {record['heldout_median']:.4g}), "
        f"{gap:.2f} times that on the noise it was fitted to",
        f"{state.iteration} iterations ({state.stopped or 'budget spent'}), {record['evaluations']:,} network "
        f"evaluations: {record['evaluations_per_batch']:.0f} times sampling the trajectories once; the "
        f"reference solution's own error is {record['reference_error']:.2g}",
    ]


def changes(before: Plan, after: Plan) -> str:
    """A table of two plans of one structure side by side: times, coefficients, told times.

    Raises:
        ValueError: the plans have different numbers of rows.
    """
    if len(before.rows) != len(after.rows):
        raise ValueError(f"the plans have {len(before.rows)} and {len(after.rows)} rows; nothing to compare")
    lines = [f"{'row':>4} {'t':>21} {'told to the network':>25}  coefficients"]
    pairs = zip(before.rows, before.values, after.rows, after.values, strict=True)
    for r, (row, v, other, w) in enumerate(pairs):
        old = dict(zip(row.columns, (*v.a, *v.b), strict=False))
        new = dict(zip(other.columns, (*w.a, *w.b), strict=False))
        told = f"{v.t_in:>11.5g} -> {w.t_in:>10.5g}" if row.evaluates else ""
        moved = [
            f"{k} {old.get(k, 0.0):+.4g} -> {new.get(k, 0.0):+.4g}" for k in sorted(old.keys() | new.keys())
        ]
        lines.append(f"{r:>4} {v.t:>9.5g} -> {w.t:>8.5g} {told:>25}  {'; '.join(moved)}")
    return "\n".join(lines)
