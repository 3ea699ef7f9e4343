"""The trajectories that a plan is fitted to: starting noise and the model's own high-accuracy solution."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, select
from ..identity import Probe, probe
from ..noise import normal
from ..plan import write_atomically
from ..sampler import Sampler

Conditions = Mapping[str, Any] | Callable[[Tensor], Mapping[str, Any]]

_FOLDER = "trajectories-"
_PROBE = "probe.json"
_NOISE = 0xFFFFFFFE  # noise stream of the trajectories: never the noise that a user samples from


@dataclass(frozen=True)
class Batch:
    """Some consecutive trajectories: the first one's index, unit noise and solution (B, ...), the conditions."""

    first: int
    noise: Tensor
    solution: Tensor
    conditions: Mapping[str, Any]


class Trajectories:
    """Starting noise and solutions of samples ``0..n-1``, made once and kept on disk where asked.

    Attributes:
        n: how many.
        evaluations: network evaluations that this process spent on them.
        error: root mean square difference to the solution of half the steps, on one batch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        n: int,
        *,
        seed: int,
        steps: int,
        end: str | None,
        conditions: Conditions | None = None,
        batch_size: int = 64,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            denoiser: the model.
            shape: of one sample.
            n: number of trajectories.
            seed: of the noise; sample ``i`` depends on (seed, i) alone.
            steps, end: of the solution by ``solver="auto"``.
            conditions: shared by all, one value a sample, or a function of the samples' indices (B,).
            batch_size: trajectories at once.
            folder: where solutions are kept.
            dtype: of the state.
        """
        self.denoiser, self.shape, self.n = denoiser, tuple(shape), n
        self._seed, self._conditions, self._dtype = seed, conditions, dtype
        self._batch = batch_size
        self.evaluations = 0
        self.error = float("nan")
        self._solver = Sampler(denoiser, "auto", steps, end=end)
        self._half = Sampler(denoiser, "auto", max(1, steps // 2), end=end)
        few = min(2, n)
        known = probe(denoiser, (few, *self.shape), self.conditions(torch.arange(few)))
        settings = json.dumps([known.exact, seed, str(dtype), batch_size, self._solver.plan.to_json()])
        name = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self._folder = None if folder is None else _place(folder, name, known)
        self.key = f"{name}-{known.digest}" if self._folder is None else self._folder.name[len(_FOLDER) :]
        self._made: dict[tuple[int, int], Tensor] = {}

    def conditions(self, index: Tensor) -> Mapping[str, Any]:
        """The conditions of samples ``index`` (B,), consecutive."""
        if self._conditions is None:
            return {}
        if callable(self._conditions):
            return self._conditions(index)
        return select(dict(self._conditions), slice(int(index[0]), int(index[-1]) + 1), self.n)

    def noise(self, index: Tensor) -> Tensor:
        """Unit noise of samples ``index`` (B,)."""
        where = index.to(self.denoiser.device)
        return normal((len(index), *self.shape), self._seed, where, _NOISE, dtype=self._dtype)

    def batches(self, samples: range, mine: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The trajectories of ``samples``, in batches; of every ``mine[1]`` batches the ``mine[0]``-th."""
        firsts = range(samples.start, samples.stop, self._batch)
        for first in firsts[mine[0] :: mine[1]]:
            index = torch.arange(first, min(samples.stop, first + self._batch))
            yield Batch(first, self.noise(index), self._solution(index), self.conditions(index))

    def _solution(self, index: Tensor) -> Tensor:
        key = int(index[0]), len(index)
        if key not in self._made:
            self._made[key] = self._load(index)
        return self._made[key]

    def _load(self, index: Tensor) -> Tensor:
        """The solution of consecutive samples, from the folder if it is there whole."""
        from safetensors.torch import load, save

        path = (
            None if self._folder is None else self._folder / f"{int(index[0]):06d}-{len(index)}.safetensors"
        )
        if path is not None and path.exists():
            content = path.read_bytes()
            checksum = path.with_suffix(".sha256")  # missing after a kill between the two files
            if checksum.exists():
                if hashlib.sha256(content).hexdigest() == checksum.read_text():
                    return load(content)["x"].to(self.denoiser.device)
                warnings.warn(f"{path}: its checksum does not match; it is made again", stacklevel=2)
        noise, conditions = self.noise(index), self.conditions(index)
        x = self._solver(noise=noise, **conditions)
        self.evaluations += self._solver.plan.nfe * len(index)
        if path is not None:
            content = save({"x": x.cpu().contiguous()})
            write_atomically(path, content)
            write_atomically(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest().encode())
        return x

    def check(self, samples: range) -> float:
        """The solution's own error: the distance to that of half the steps, on the first batch."""
        batch = next(self.batches(samples))
        x = self._half(noise=batch.noise, **batch.conditions)
        self.evaluations += self._half.plan.nfe * len(x)
        self.error = float((x - batch.solution).double().square().mean().sqrt())
        return self.error


def _place(folder: Path, name: str, known: Probe) -> Path:
    """The folder of this model's trajectories: one that is there, though other kernels made it, or a new one."""
    for file in sorted(folder.glob(f"{_FOLDER}{name}-*/{_PROBE}")):
        try:
            there = Probe.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{file} is damaged; its trajectories are made again elsewhere", stacklevel=2)
            continue
        if known.differs(there) is None:
            return file.parent
    place = folder / f"{_FOLDER}{name}-{known.digest}"
    write_atomically(place / _PROBE, json.dumps(known.to_dict()).encode())
    return place
