"""Distillation: any model into a student of one to four steps. One trainer; a method is one file.

Each method is a loss over roles (see :class:`fastsample.distill.method.Method`), used by :class:`Trainer` or in a
training loop of one's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# name on the command line -> (file, class)
METHODS = {
    "consistency": ("consistency", "Consistency"),
    "ict": ("ect", "ICT"),
    "ect": ("ect", "ECT"),
    "scm": ("continuous", "SCM"),
    "shortcut": ("shortcut", "Shortcut"),
    "meanflow": ("meanflow", "MeanFlow"),
    "progressive": ("progressive", "Progressive"),
    "reflow": ("reflow", "ReFlow"),
    "knowledge": ("knowledge", "Knowledge"),
    "sid": ("sid", "SiD"),
    "dmd2": ("dmd2", "DMD2"),
    "lcm": ("lcm", "LCM"),
}
_WHERE = {
    **{name: file for file, name in METHODS.values()},
    "Batch": "batch",
    "Data": "data",
    "Method": "method",
    "Student": "student",
    "Trainer": "trainer",
    "load": "student",
    "make_pairs": "pairs",
}

__all__ = ["METHODS", *_WHERE]

if TYPE_CHECKING:
    from .batch import Batch
    from .consistency import Consistency
    from .continuous import SCM
    from .data import Data
    from .dmd2 import DMD2
    from .ect import ECT, ICT
    from .knowledge import Knowledge
    from .lcm import LCM
    from .meanflow import MeanFlow
    from .method import Method
    from .pairs import make_pairs
    from .progressive import Progressive
    from .reflow import ReFlow
    from .shortcut import Shortcut
    from .sid import SiD
    from .student import Student, load
    from .trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
