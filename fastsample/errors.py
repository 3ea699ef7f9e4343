"""Error helpers shared by every part: a wrong name is answered with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """A sentence fragment naming the nearest known name and the full list."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def unknown(argument: str, value: object, known: Iterable[str]) -> ValueError:
    """The error for a value of ``argument`` that is not among ``known``."""
    return ValueError(f"{argument}={value!r} is unknown; {nearest(value, known)}")


class NonFiniteError(FloatingPointError):
    """The network or the sampler produced NaN or infinity; the message says at which row and time."""
