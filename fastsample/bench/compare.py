"""``fastsample compare``: what got better or worse between two runs, beyond the uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastsample.bench.errors import UserError
from fastsample.bench.results import Results, collect
from fastsample.bench.results import compare as paired
from fastsample.metrics.frechet import Difference


@dataclass(frozen=True)
class Change:
    """One distance in both runs.

    Attributes:
        label, nfe: the solver and its evaluations.
        metric, split: the distance and the images that it is to.
        before, after: the metric's values.
        difference: ``after - before``, paired sample by sample.
        rmse: the error in both runs, None where there is none.
        speedup: seconds a sample before over those after (no part of the verdict: machines differ).
        sign: 1 for distances, -1 where more is better.
    """

    label: str
    nfe: float
    metric: str
    split: str
    before: float
    after: float
    difference: Difference
    rmse: tuple[float | None, float | None]
    speedup: float
    sign: int

    @property
    def verdict(self) -> str:
        """ "better" or "worse" beyond two standard errors, else "same"."""
        if not self.difference.significant:
            return "same"
        return "worse" if self.sign * self.difference.value > 0 else "better"


def changes(a: Results, b: Results) -> list[Change]:
    """The points that both runs have, compared.

    Args:
        a: before.
        b: after.

    Raises:
        UserError: runs that cannot be compared; the message says what differs.
    """
    for what in ("metrics", "splits"):
        first, second = a.manifest[what], b.manifest[what]
        if first != second:
            raise UserError(f"the runs cannot be compared: their {what} differ ({first} and {second})")
    if not a.metrics:
        raise UserError("the runs have no metric to compare; run the benchmarks with metrics=")
    before = {(p.label, p.nfe): p for p in a.points}
    found = []
    for point in b.points:
        old = before.get((point.label, point.nfe))
        if old is None:
            continue
        for metric, split in a.pairs:
            if not (old.measured(metric, split) and point.measured(metric, split)):
                continue
            difference = paired(point, old, metric, split)
            if difference is None:
                raise UserError(f"{point.label} at {point.nfe:g}: the runs share no seed; run both with one")
            found.append(
                Change(
                    point.label,
                    point.nfe,
                    metric,
                    split,
                    old.distance(metric, split).value,
                    point.distance(metric, split).value,
                    difference,
                    (old.mean("rmse"), point.mean("rmse")),
                    old.seconds_per_sample / point.seconds_per_sample,
                    a.sign(metric),
                )
            )
    if not found:
        raise UserError("the runs share no solver at the same number of evaluations")
    return found


def compare(a: Path, b: Path) -> tuple[str, bool]:
    """The comparison as text, and whether anything got worse.

    Args:
        a, b: run folders, before and after.
    """
    from fastsample.bench.report import number, with_error

    all_changes = changes(collect(a), collect(b))
    header = (
        f"{'solver':<24} {'NFE':>4} {'metric':<24} {'before':>9} {'after':>9}  {'difference':<18} verdict"
    )
    lines = [header]
    for c in all_changes:
        where = f"{c.metric} {c.split}"
        difference = with_error(c.difference.value, c.difference.se)
        lines.append(
            f"{c.label:<24.24} {c.nfe:>4g} {where:<24.24} {c.before:>9.4f} {c.after:>9.4f}  {difference:<18} "
            f"{c.verdict}; RMSE {number(c.rmse[0])} to {number(c.rmse[1])}, {c.speedup:.2f}x as fast"
        )
    verdicts = [c.verdict for c in all_changes]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("better", "worse", "same"))
    lines.append(f"{counts}; differences are paired, +- two standard errors")
    return "\n".join(lines), "worse" in verdicts
