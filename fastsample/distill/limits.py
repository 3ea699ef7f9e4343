"""Ranges of settings, which are checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """What a number may be.

    Args:
        low, high: the range.
        whole: whole numbers alone.
        above, below: whether ``low``, ``high`` themselves are excluded.
        optional: None is allowed, too.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    optional: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        parts = []
        if self.low > -math.inf:
            parts.append(f"above {self.low:g}" if self.above else f"of at least {self.low:g}")
        if self.high < math.inf:
            parts.append(f"below {self.high:g}" if self.below else f"of at most {self.high:g}")
        return f"{kind} {' and '.join(parts)}".strip() + (", or None" if self.optional else "")

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if not (value >= self.low and value <= self.high):  # not a number fails, too
            return False
        return not (self.above and value == self.low) and not (self.below and value == self.high)


def check(owner: Any, limits: Mapping[str, Limit]) -> None:
    """
    Raises:
        ValueError: a setting of ``owner`` is out of its range; the message names it.
    """
    for name, limit in limits.items():
        value = getattr(owner, name)
        if not limit.holds(value):
            raise ValueError(f"{name}={value!r} must be {limit}")


COUNT = Limit(1, whole=True)
"""A number of things."""

SHARE = Limit(0, 1)
"""A share of a whole."""

DECAY = Limit(0, 1, below=True)
"""Of a moving average."""

POSITIVE = Limit(0, above=True)
WEIGHT = Limit(0)
