"""What the samples of a run are conditioned on: class labels, or prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fastsample.bench.model import Model, draw_labels


@dataclass(frozen=True)
class Conditions:
    """The conditions of sample i of a seed; of (seed, i) alone.

    Attributes:
        labels: as in the settings.
        classes: number of classes; None for models without labels.
        prompts: the prompts; empty for models that take none.
        encoded: the conditions of each prompt, a row each.
    """

    labels: Any
    classes: int | None
    prompts: tuple[str, ...] = ()
    encoded: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, seed: int, index: Tensor) -> Tensor | None:
        """Numbers of the samples' prompts ``[B]``, drawn in balance like labels."""
        return draw_labels("auto", len(self.prompts), seed, index) if self.prompts else None

    def __call__(self, seed: int, index: Tensor) -> dict[str, Any]:
        """Conditions of the samples ``index``, by name."""
        chosen = self.prompt(seed, index)
        if chosen is not None:
            rows = chosen.cpu()
            return tree_map(lambda v: v[rows] if isinstance(v, Tensor) else v, dict(self.encoded))
        labels = draw_labels(self.labels, self.classes, seed, index)
        return {} if labels is None else {"labels": labels}

    @property
    def sha256(self) -> str | None:
        """Digest of the prompts; None without."""
        return hashlib.sha256(repr(self.prompts).encode()).hexdigest() if self.prompts else None


def read_prompts(path: str) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={path}: {error}; give a text file with one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts={path}: no prompt in it; give a text file with one prompt a line")
    return prompts


def conditions_of(model: Model, labels: Any, prompts: tuple[str, ...]) -> Conditions:
    """The run's conditions, the prompts encoded once.

    Raises:
        ValueError: prompts for a model that cannot encode them, or that are encoded to another number of rows.
    """
    if not prompts:
        return Conditions(labels, model.classes)
    encode = model.denoiser.encode
    if encode is None:
        raise ValueError(
            f"prompts: model={model.name} does not say how prompts are encoded; return fs.wrap(pipe) of a Stable "
            "Diffusion 1.x or 2.x pipeline, or fs.wrap(..., encode=function): prompts -> conditions"
        )
    encoded = encode(list(prompts))

    def check(value: Any) -> None:
        if isinstance(value, Tensor) and value.shape[:1] != (len(prompts),):
            raise ValueError(
                f"prompts: encode gave a condition of shape {tuple(value.shape)} for {len(prompts)} prompts; a row "
                "for each is needed"
            )

    tree_map(check, dict(encoded))
    return Conditions(None, None, prompts, encoded)
