"""fastsample: the same diffusion or flow model, sampling in far fewer steps, with the proof.

import fastsample as fs

denoiser = fs.wrap(net, fs.VP.linear(), prediction="eps")      # net(x, t, **conditions) -> tensor
sampler = fs.Sampler(denoiser, steps=8)                        # solver="auto"
images = sampler(shape=(16, 3, 32, 32), seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; loaded at first use so that importing the package is cheap.
_WHERE = {
    "VP": "process",
    "VE": "process",
    "EDM": "process",
    "Flow": "process",
    "TrigFlow": "process",
    "Process": "process",
    "Denoiser": "denoiser",
    "Guidance": "denoiser",
    "wrap": "denoiser",
    "Plan": "plan",
    "Builder": "builder",
    "Sampler": "sampler",
    "Trajectory": "sampler",
    "NonFiniteError": "errors",
    "tune": "tuning",
    "load": "distill.student",
    "accelerate": "integrations.pipelines",
    "unaccelerate": "integrations.pipelines",
}
_MODULES = (
    "solvers",
    "grids",
    "hooks",
    "noise",
    "zoo",
    "metrics",
    "adaptive",
    "tuning",
    "distill",
    "integrations",
)

__all__ = ["__version__", *_WHERE, *_MODULES]

if TYPE_CHECKING:
    from . import adaptive, distill, grids, hooks, integrations, metrics, noise, solvers, tuning, zoo
    from .builder import Builder
    from .denoiser import Denoiser, Guidance, wrap
    from .distill.student import load
    from .errors import NonFiniteError
    from .integrations.pipelines import accelerate, unaccelerate
    from .plan import Plan
    from .process import EDM, VE, VP, Flow, Process, TrigFlow
    from .sampler import Sampler, Trajectory
    from .tuning import tune


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
