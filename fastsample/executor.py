"""The one executor: runs any plan on any denoiser.

Row arithmetic is done in place in as few buffers as the table needs (found once from the plan), with Python
numbers, so nothing in the loop waits for the device. :func:`execute_differentiable` is the same arithmetic
without in-place writes, for gradients with respect to the table, the network or the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .denoiser import Bound
from .errors import NonFiniteError
from .hooks import At, Hook
from .noise import normal
from .plan import Plan, Row, RowValues, is_copy
from .prediction import coefficients

NoiseSource = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """What a callback sees after each evaluation.

    Attributes:
        row, nfe: the row of the plan, and evaluations so far.
        t, alpha, sigma: time and process at the state (floats).
        x: the state, (B, ...); valid during the call only.
        x0: the predicted clean sample there, (B, ...).
        samples: which samples of the whole call are in this batch.
    """

    row: int
    nfe: int
    t: float
    alpha: float
    sigma: float
    x: Tensor
    x0: Tensor
    samples: slice


Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Run:
    """What one execution needs besides the plan.

    Attributes:
        network: the denoiser bound to its conditions.
        noise: ``noise(stream, like) -> z`` of the shape of ``like``.
        hooks: applied to the predicted clean sample, in order.
        callback: called after each evaluation.
        samples: which samples of the whole call these are.
    """

    network: Bound
    noise: NoiseSource
    hooks: Sequence[Hook] = ()
    callback: Callback | None = None
    samples: slice = field(default_factory=lambda: slice(None))


def philox_noise(seed: int, index: Tensor) -> NoiseSource:
    """The counter-based noise of samples ``index`` (see :mod:`fastsample.noise`)."""

    def draw(stream: int, like: Tensor) -> Tensor:
        return normal(like.shape, seed, index, stream, dtype=like.dtype)

    return draw


# -- what the table needs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """One row with its life times resolved.

    ``keeps`` is whether the row's prediction outlives the next row and so needs a buffer of its own;
    ``dead_states`` and ``dead_predictions`` can be overwritten once the row is done; ``in_place`` is the position
    of a state that the new one may overwrite.
    """

    row: Row
    copy_of: int | None
    keeps: bool
    dead_states: tuple[int, ...]
    dead_predictions: tuple[int, ...]
    in_place: int | None


def _compile(plan: Plan) -> tuple[_Op, ...]:
    """Life times of states and predictions; cached on the plan."""
    cached = plan.__dict__.get("_program")
    if cached is not None:
        return cached
    rows, values = plan.rows, plan.values
    count = len(rows)
    alias = {0: 0}  # state -> the state whose buffer it is
    for r, row in enumerate(rows):
        alias[r + 1] = alias[row.states[0]] if is_copy(row, values[r]) else r + 1
    last_state: dict[int, int] = {}
    last_prediction: dict[int, int] = {}
    for r, row in enumerate(rows):
        for j in row.states:
            last_state[alias[j]] = r
        if row.evaluates:  # the conversion of the output reads the state until the next row
            last_state[alias[r + 1]] = max(last_state.get(alias[r + 1], 0), min(r + 1, count - 1))
        for k in row.predictions:
            last_prediction[k] = r
    last_state[alias[count]] = count  # the result
    program = []
    for r, row in enumerate(rows):
        copy_of = alias[row.states[0]] if is_copy(row, values[r]) else None
        dead = tuple(j for j, last in last_state.items() if last == r and j <= r)
        reusable = [i for i, j in enumerate(row.states) if alias[j] in dead]
        program.append(
            _Op(
                row,
                copy_of,
                keeps=last_prediction.get(r, -1) > r + 1,
                dead_states=dead,
                dead_predictions=tuple(k for k, last in last_prediction.items() if last == r and k != r - 1),
                in_place=reusable[0] if reusable and copy_of is None else None,
            )
        )
    plan.__dict__["_program"] = tuple(program)
    return plan.__dict__["_program"]


def buffers_needed(plan: Plan) -> int:
    """State-sized buffers alive at once, besides the network's own output and working memory."""
    alive, peak = {0}, 1
    predictions: set[int] = set()
    for r, op in enumerate(_compile(plan)):
        if op.copy_of is None and op.in_place is None:
            alive.add(r + 1)
        elif op.in_place is not None:
            alive.add(r + 1)
            alive.discard(next(j for j in op.dead_states))
        if op.keeps:
            predictions.add(r)
        peak = max(peak, len(alive) + len(predictions) + bool(op.row.noises))
        alive -= set(op.dead_states)
        predictions -= set(op.dead_predictions)
    return peak


def _times(plan: Plan, run: Run, x: Tensor, column: str) -> list[Tensor]:
    """What the network is told at each row, (B,) each, moved to the device at once."""
    denoiser = run.network.denoiser
    raw = [getattr(v, column) for v in plan.values]
    known = torch.tensor([0.0 if v is None else v for v in raw], dtype=torch.float64)
    if column == "t_in":
        wanted = torch.tensor([row.evaluates for row in plan.rows])
        told = torch.zeros_like(known)
        if bool(wanted.any()):
            told[wanted] = denoiser.told(known[wanted])
        known = told
        dtype = denoiser.time_dtype(x.dtype)
    else:
        dtype = torch.float32 if x.dtype != torch.float64 else torch.float64
    if not dtype.is_floating_point:
        known = known.round()
    return [t.expand(x.shape[0]) for t in known.to(x.device, dtype).unbind()]


def _x0_pair(plan: Plan, v: RowValues) -> tuple[float, float]:
    alpha, sigma = (torch.tensor(c, dtype=torch.float64) for c in (v.alpha, v.sigma))
    p, q = coefficients(plan.prediction, alpha, sigma, "x0")
    return float(p), float(q)


# -- running -------------------------------------------------------------------------------------------------


def execute(plan: Plan, x: Tensor, run: Run, *, owned: bool = False, trajectory: list[Tensor] | None = None) -> Tensor:
    """Run a plan.

    Args:
        plan: the table.
        x: the input state (B, ...), float32 or float64.
        run: network, noise and hooks.
        owned: whether ``x`` may be overwritten.
        trajectory: a list that receives a copy of every row's state.

    Returns:
        The last row's state, (B, ...).
    """
    values = plan.values
    times = _times(plan, run, x, "t_in")
    sizes = _times(plan, run, x, "step") if any(row.sized for row in plan.rows) else None
    states: dict[int, Tensor] = {0: x}
    alias = {0: 0}
    kept: dict[int, tuple[Tensor, float]] = {}  # prediction k = buffer * scale
    pending: tuple[Tensor, float, float] | None = None  # the last row's m = p x + q out, not written out
    free: list[Tensor] = []
    scratch: Tensor | None = None
    nfe = 0

    def buffer() -> Tensor:
        return free.pop() if free else torch.empty_like(x, memory_format=torch.contiguous_format)

    for r, op in enumerate(_compile(plan)):
        row, v = op.row, values[r]
        if op.copy_of is not None:
            alias[r + 1] = op.copy_of
        else:
            terms = {alias[j]: c for j, c in zip(row.states, v.a, strict=True)}
            outputs: list[tuple[Tensor, float]] = []
            for k, b in zip(row.predictions, v.b, strict=True):
                if k in kept:
                    outputs.append((kept[k][0], b * kept[k][1]))
                else:
                    assert pending is not None and k == r - 1
                    out, p, q = pending
                    if p:
                        terms[alias[r]] = terms.get(alias[r], 0.0) + b * p
                    outputs.append((out, b * q))
            home = alias[row.states[op.in_place]] if op.in_place is not None else None
            if home is not None and home == 0 and not owned:
                home = None
            if home is not None:
                target = states[home]
                torch.mul(target, terms.pop(home), out=target)
            else:
                target = buffer()
                if terms:
                    j = next(iter(terms))
                    torch.mul(states[j], terms.pop(j), out=target)
                else:
                    target.zero_()
            for j, c in terms.items():
                target.add_(states[j], alpha=c)
            for m, c in outputs:
                target.add_(m, alpha=c)
            for s, c in zip(row.noises, v.c, strict=True):
                scratch = run.noise(s, x)
                target.add_(scratch, alpha=c)
            states[r + 1] = target
            alias[r + 1] = r + 1
        pending = None
        for j in op.dead_states:
            held = states.pop(j)
            if held is not states.get(r + 1) and (owned or j != 0):
                free.append(held)
        for k in op.dead_predictions:
            free.append(kept.pop(k)[0])
        state = states[alias[r + 1]]
        if trajectory is not None:
            trajectory.append(state.clone())
        if not row.evaluates:
            continue
        size = sizes[r] if sizes is not None and row.sized else None
        out = run.network(state, times[r], v.sigma / v.alpha if v.alpha else float("inf"), size)
        nfe += 1
        p, q = v.p, v.q
        if run.hooks or run.callback:
            px, qx = _x0_pair(plan, v)
            x0 = out.to(state.dtype) * qx + px * state
            if run.hooks:
                at = At(r, v.t, v.alpha, v.sigma, state, run.samples)
                for hook in run.hooks:
                    x0 = hook(x0, at)
                # m as a function of the state and the (changed) clean prediction
                out, p, q = x0, p - q * px / qx, q / qx
            if run.callback:
                run.callback(Step(r, nfe, v.t, v.alpha, v.sigma, state, x0, run.samples))
        if op.keeps:
            # One pass: m / q = out + (p / q) x; the scale q goes into the coefficients that use it. A copy is
            # needed even for p = 0: the network may overwrite its output at the next call.
            m = buffer()
            if not q:
                torch.mul(state, p, out=m)
                kept[r] = (m, 1.0)
            elif p:
                torch.add(out, state, alpha=p / q, out=m)
                kept[r] = (m, q)
            else:
                m.copy_(out)
                kept[r] = (m, q)
        else:
            pending = (out, p, q)
    return states[alias[len(plan.rows)]]


def execute_differentiable(
    plan: Plan, x: Tensor, run: Run, *, checkpoint: bool = False, trajectory: list[Tensor] | None = None
) -> Tensor:
    """The same arithmetic as :func:`execute` with every operation differentiable.

    Gradients flow to ``plan.numbers``, to ``x``, to the network's parameters and, through the time that the
    network is told, to the grid.

    Args:
        plan, x, run, trajectory: as in :func:`execute`.
        checkpoint: recompute each evaluation in the backward pass instead of storing its activations.
    """
    denoiser = run.network.denoiser
    states: list[Tensor] = [x]
    predictions: dict[int, Tensor] = {}
    nfe = 0
    for r, (row, v, known) in enumerate(zip(plan.rows, plan.tensors(), plan.values, strict=True)):
        terms: list[tuple[Any, Tensor]] = [(c, states[j]) for j, c in zip(row.states, v.a, strict=True)]
        terms += [(c, predictions[k]) for k, c in zip(row.predictions, v.b, strict=True)]
        terms += [(c, run.noise(s, x)) for s, c in zip(row.noises, v.c, strict=True)]
        state = torch.zeros_like(x)
        for c, tensor in terms:
            state = state + c.to(x.device, x.dtype) * tensor
        states.append(state)
        if trajectory is not None:
            trajectory.append(state)
        if not row.evaluates:
            continue
        dtype = denoiser.time_dtype(x.dtype)
        told = denoiser.told(v.t_in)
        told = (told if dtype.is_floating_point else told.round()).to(x.device, dtype).expand(x.shape[0])
        size = v.step.to(x.device, x.dtype).expand(x.shape[0]) if row.sized else None
        rho = known.sigma / known.alpha if known.alpha else float("inf")
        if checkpoint:
            out = torch.utils.checkpoint.checkpoint(run.network, state, told, rho, size, use_reentrant=False)
        else:
            out = run.network(state, told, rho, size)
        nfe += 1
        out = out.to(x.dtype)
        p, q = (c.to(x.device, x.dtype) for c in (v.p, v.q))
        if run.hooks or run.callback:
            px, qx = (c.to(x.device, x.dtype) for c in coefficients(plan.prediction, v.alpha, v.sigma, "x0"))
            x0 = px * state + qx * out
            if run.hooks:
                at = At(r, known.t, known.alpha, known.sigma, state, run.samples)
                for hook in run.hooks:
                    x0 = hook(x0, at)
                out, p, q = x0, p - q * px / qx, q / qx
            if run.callback:
                run.callback(Step(r, nfe, known.t, known.alpha, known.sigma, state, x0, run.samples))
        predictions[r] = p * state + q * out
    return states[-1]


def locate_nonfinite(plan: Plan, x: Tensor, run: Run) -> NonFiniteError:
    """Replay a run whose result was not finite, and say where it began.

    The replay draws the same noise, so it meets the same values; the check inside the loop costs one
    synchronisation a row, which is why the first run has none.
    """
    if not bool(torch.isfinite(x).all()):
        return NonFiniteError("the input state is not finite; check noise= or x=")
    found: list[str] = []
    network = run.network

    class Watched(Bound):
        def __init__(self) -> None:
            self.__dict__.update(network.__dict__)

        def __call__(self, state: Tensor, t: Tensor, rho: float, step: Tensor | None = None) -> Tensor:
            out = super().__call__(state, t, rho, step)
            if not found:
                for name, value in (("the state", state), ("the network's output", out)):
                    bad = ~torch.isfinite(value).flatten(1).all(dim=1)
                    if bool(bad.any()):
                        which = (bad.nonzero().flatten() + (run.samples.start or 0)).tolist()
                        r = [i for i, row in enumerate(plan.rows) if row.evaluates][counted[0]]
                        found.append(
                            f"{name} is not finite at row {r} (t={plan.values[r].t:g}, evaluation {counted[0] + 1} of "
                            f"{plan.nfe}) for samples {which[:8]}{'...' if len(which) > 8 else ''}"
                        )
                        break
            counted[0] += 1
            return out

    counted = [0]
    replay = Run(Watched(), run.noise, run.hooks, None, run.samples)
    execute(plan, x, replay)
    what = found[0] if found else "the last update overflowed"
    return NonFiniteError(f"sampling with {plan!r} failed: {what}; try the network in float32 or another grid")
