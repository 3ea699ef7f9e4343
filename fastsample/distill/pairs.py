"""Pairs of noise and the teacher's sample, made once and kept on disk."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..distributed import rank_and_size, together
from ..identity import Probe, probe
from ..metrics.statistics import read_sealed, write_sealed
from ..noise import START, normal
from ..plan import write_atomically
from ..sampler import Sampler
from .data import Data, as_data

log = logging.getLogger(__name__)
SHARD = 2048
_SCHEMA = "fastsample.pairs/1"


@dataclass(frozen=True)
class Pairs:
    """Noise and samples; the noise is drawn again from (seed, index).

    Attributes:
        x0: the samples (N, ...).
        conditions: theirs, by name (N, ...).
        seed: of the noise.
    """

    x0: Tensor
    conditions: dict[str, Tensor]
    seed: int

    def __len__(self) -> int:
        return len(self.x0)

    def noise(self, index: Tensor) -> Tensor:
        """Standard normal noise of the pairs ``index`` (B,)."""
        index = index.to(self.x0.device, non_blocking=True)
        return normal((len(index), *self.x0.shape[1:]), self.seed, index, START)


def make_pairs(
    teacher: Denoiser | Sampler,
    data: Data | Any,
    n: int,
    folder: Path,
    *,
    solver: str = "auto",
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Pairs:
    """The teacher's samples from ``n`` noises, with the conditions of the data; made again where they lie not.

    Each shard is a file of its own, written whole and checked by its sha256: a killed run goes on after the last
    one. The processes of a launched run share the shards out; all must call this.

    Args:
        teacher: the model; or a sampler, whose plan is used instead of solver and steps.
        data: where the conditions come from.
        n: number of pairs.
        folder: where the shards lie.
        solver, steps: of the teacher's sampler.
        seed: of the noise.
        batch_size: samples at once.

    Raises:
        ValueError: the folder holds pairs of another teacher or other settings.
    """
    sampler = teacher if isinstance(teacher, Sampler) else Sampler(teacher, solver, steps, end="zero")
    teacher = sampler.denoiser
    source, device = as_data(data), teacher.device
    shape = teacher.sample_shape or source.shape
    known = probe(teacher, (3, *shape), source.conditions(torch.arange(3), device))
    identity = {
        "teacher": known.to_dict(),
        "plan": sampler.plan.to_json() if sampler.plan is not None else solver,
        "data": source.sha256,
        "seed": seed,
        "shard": SHARD,
    }
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "pairs.json"
    if described.exists():
        try:
            there = json.loads(described.read_text())
            before = Probe.from_dict(there["teacher"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{described} is damaged ({error!r}); delete {folder}") from error
        others = [name for name in identity if name != "teacher" and there.get(name) != identity[name]]
        if (why := known.differs(before)) is not None:
            others.insert(0, f"teacher ({why})")
        if others:
            raise ValueError(
                f"{folder} holds pairs with another {', '.join(others)}; give another folder, or delete this one"
            )
    else:
        write_atomically(described, json.dumps(identity).encode())
    parts: list[dict[str, Tensor]] = []
    rank, size = rank_and_size()
    shards = [
        (folder / f"{i:05d}.safetensors", range(first, min(n, first + SHARD)))
        for i, first in enumerate(range(0, n, SHARD))
    ]
    mine = shards[rank::size]
    with _bar(progress, len(mine)) as tick:
        for file, samples in mine:
            if _read(file, len(samples)) is None:
                index = torch.arange(samples.start, samples.stop)
                conditions: dict[str, Any] = source.conditions(index, device, seed=seed)
                x0 = sampler(
                    shape=(len(index), *shape), seed=seed, index=index, batch_size=batch_size, **conditions
                )
                write_sealed(
                    file, _SCHEMA, {"x0": x0, **{f"condition.{k}": v for k, v in conditions.items()}}
                )
            tick()
    together()
    for file, samples in shards:
        part = _read(file, len(samples))
        if part is None:
            raise ValueError(f"{file}: another process did not leave it whole; run the same command again")
        parts.append(part)
    names = [k for k in parts[0] if k != "x0"]
    x0 = torch.cat([p["x0"] for p in parts])[:n].to(device)
    joined = {k.removeprefix("condition."): torch.cat([p[k] for p in parts])[:n].to(device) for k in names}
    return Pairs(x0, joined, seed)


def _read(file: Path, n: int) -> dict[str, Tensor] | None:
    """A shard of at least ``n`` pairs; None where it has to be made (again)."""
    if not file.exists():
        return None
    try:
        tensors = read_sealed(file, _SCHEMA)
    except ValueError as error:
        log.warning("%s; its pairs are made again", error)
        return None
    return tensors if len(tensors["x0"]) >= n else None


def _bar(wanted: bool, total: int) -> Any:
    from ..sampler import _progress

    return _progress(wanted, total)
