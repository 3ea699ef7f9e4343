"""The one executor: runs any plan on any denoiser.

Row arithmetic is done in place in as few buffers as the table needs (found once from the plan), with Python
numbers, so nothing in the loop waits for the device. :func:`execute_differentiable` is the same arithmetic
without in-place writes, for gradients with respect to the table, the network or the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from .denoiser import Bound
from .errors import NonFiniteError
from .hooks import At, Hook
from .noise import normal
from .plan import Plan, Row, RowValues, is_copy
from .prediction import coefficients
from .process import as_time

NoiseSource = Callable[[int, Tensor], Tensor]
Times = tuple[list[Tensor], list[Tensor]]

_DENSE = torch.contiguous_format


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
        times: what :func:`times_of` gave, where that was called before.
        draws: seed and sample indices of ``noise``, where it is :func:`philox_noise` and a kernel may draw it.
    """

    network: Bound
    noise: NoiseSource
    hooks: Sequence[Hook] = ()
    callback: Callback | None = None
    samples: slice = field(default_factory=lambda: slice(None))
    times: Times | None = None
    draws: tuple[int, Tensor] | None = None


def philox_noise(seed: int, index: Tensor) -> NoiseSource:
    """The counter-based noise of samples ``index`` (see :mod:`fastsample.noise`)."""

    def draw(stream: int, like: Tensor) -> Tensor:
        return normal(like.shape, seed, index, stream, dtype=like.dtype)

    return draw


# -- what the table needs ------------------------------------------------------------------------------------

_MUL, _ADD, _SUM, _ZERO = range(4)  # dst = c src;  dst += c src;  dst = src + c other;  dst = 0
_OUT = -1  # the buffer that is the network's newest output

Instruction = tuple[int, int, int, float, int]  # kind, dst, src, c, other
Value = tuple[str, int]  # ("x", j) a state, ("m", k) a prediction, ("out", 0) the newest output


@dataclass(frozen=True)
class _Line:
    """A row as arithmetic on buffers.

    Attributes:
        code: instructions on whole buffers; first the store of the last row's prediction, where it is kept.
        noises: (stream, coefficient), added to the state afterwards.
        state: the buffer of the row's state.
        hooked: whether hooks act on the row's prediction.
    """

    code: tuple[Instruction, ...]
    noises: tuple[tuple[int, float], ...]
    state: int
    hooked: bool


@dataclass(frozen=True)
class _Program:
    lines: tuple[_Line, ...]
    buffers: int


def _cached(plan: Plan, key: Any, make: Callable[[], Any]) -> Any:
    cache = plan.__dict__.setdefault("_cache", {})
    if key not in cache:
        cache[key] = make()
    return cache[key]


def _program(plan: Plan, owned: bool, hooked: bool) -> _Program:
    """The plan's arithmetic with every life time resolved (see :func:`_compile`), cached on the plan."""
    return _cached(plan, ("program", owned, hooked), lambda: _compile(plan, owned, hooked))


def x0_pairs(plan: Plan) -> tuple[tuple[float, float], ...]:
    """``(p, q)`` of each row that evaluates, where ``x0 = p x + q out``; zeros for the others."""

    def pair(row: Row, v: RowValues) -> tuple[float, float]:
        if not row.evaluates:
            return 0.0, 0.0
        p, q = coefficients(plan.prediction, as_time(v.alpha), as_time(v.sigma), "x0")
        return float(p), float(q)

    rows = zip(plan.rows, plan.values, strict=True)
    return _cached(plan, "x0", lambda: tuple(pair(row, v) for row, v in rows))


def conversions(plan: Plan, hooked: bool) -> tuple[list[tuple[float, float]], list[bool]]:
    """``(p, q)`` of each row's ``m = p x + q out``, and whether hooks act there.

    Where they do, ``out`` is the clean prediction that they changed.
    """
    pairs = [(v.p, v.q) for v in plan.values]
    acts = [False] * len(pairs)
    if hooked:
        for r, (p0, q0) in enumerate(x0_pairs(plan)):
            # Where x0 does not depend on the output (no noise), there is nothing that a hook could change.
            if q0 != 0:
                acts[r] = True
                p, q = pairs[r]
                # m as a function of the state and the changed clean prediction
                pairs[r] = (p - q * p0 / q0, q / q0)
    return pairs, acts


def _compile(plan: Plan, owned: bool, hooked: bool) -> _Program:
    """Assigns states and predictions to as few buffers as their life times allow.

    A prediction ``m = p x + q out`` that only the next row reads is never written: that row adds ``p`` to
    its state's coefficient and ``q`` to the output's. One that lives longer is stored as ``m / q`` in one
    pass, and ``q`` goes into the coefficients that use it. It is always a copy: a network may overwrite its
    output when called again.
    """
    rows, values, n = plan.rows, plan.values, len(plan.rows)
    same = [0]  # state -> the earliest state that it is a copy of
    for r, row in enumerate(rows):
        same.append(same[row.states[0]] if is_copy(row, values[r]) else r + 1)
    pairs, acts = conversions(plan, hooked)
    kept = {k for r, row in enumerate(rows) for k in row.predictions if r > k + 1}
    scale = {k: q if p and q else 1.0 for k, (p, q) in enumerate(pairs) if k in kept}

    # Each row as a combination of values, and the last row that reads each value.
    combinations: list[dict[Value, float]] = []
    last: dict[Value, int] = {}
    for r, (row, v) in enumerate(zip(rows, values, strict=True)):
        terms: dict[Value, float] = {}
        if same[r + 1] == r + 1:
            for j, c in zip(row.states, v.a, strict=True):
                terms["x", same[j]] = terms.get(("x", same[j]), 0.0) + c
            for k, c in zip(row.predictions, v.b, strict=True):
                if k in kept:
                    terms["m", k] = c * scale[k]
                    continue
                p, q = pairs[k]
                if p:
                    terms["x", same[r]] = terms.get(("x", same[r]), 0.0) + c * p
                terms["out", 0] = c * q
        combinations.append(terms)
        stored = [("x", same[r])] if r - 1 in kept else []
        for value in (*terms, *stored, ("x", same[r + 1])):
            last[value] = r
    last["x", same[n]] = n  # the result

    place: dict[Value, int] = {("x", 0): 0, ("out", 0): _OUT}
    free: list[int] = []
    buffers = 1

    def allocate() -> int:
        nonlocal buffers
        if free:
            return free.pop()
        buffers += 1
        return buffers - 1

    lines = []
    for r, (row, v) in enumerate(zip(rows, values, strict=True)):
        code: list[Instruction] = []
        if r - 1 in kept:
            p, q = pairs[r - 1]
            target, state = allocate(), place["x", same[r]]
            place["m", r - 1] = target
            if p and q:
                code.append((_SUM, target, _OUT, p / q, state))
            else:
                code.append((_MUL, target, *((state, p) if p else (_OUT, q)), 0))
        if same[r + 1] == r + 1:
            terms = combinations[r]
            dying = [u for u in terms if last[u] == r and place[u] != _OUT and (owned or place[u] != 0)]
            target = place[dying[0]] if dying else allocate()
            code += _combine(target, [(place[u], c) for u, c in terms.items()])
            for u in [u for u, i in place.items() if i == target]:
                del place[u]
            place["x", r + 1] = target
        lines.append(
            _Line(tuple(code), tuple(zip(row.noises, v.c, strict=True)), place["x", same[r + 1]], acts[r])
        )
        for u in [u for u in place if u != ("out", 0) and last.get(u, -1) <= r]:
            slot = place.pop(u)
            if owned or slot != 0:
                free.append(slot)
    return _Program(tuple(lines), buffers)


def _combine(target: int, terms: list[tuple[int, float]]) -> list[Instruction]:
    """Instructions for ``target = sum c src``, where ``target`` may be one of the sources."""
    if not terms:
        return [(_ZERO, target, target, 0.0, 0)]
    terms = sorted(terms, key=lambda term: (term[0] != target, term[0] == _OUT, term[1] != 1.0))
    (first, c), *rest = terms
    if first == target:
        code = [(_MUL, target, target, c, 0)] if c != 1.0 else []
    elif c == 1.0 and rest:
        (second, c), *rest = rest
        code = [(_SUM, target, first, c, second)]
    else:
        code = [(_MUL, target, first, c, 0)]
    return code + [(_ADD, target, src, c, 0) for src, c in rest]


def buffers_needed(plan: Plan) -> int:
    """State-sized buffers alive at once with the input's, besides what the network itself makes."""
    return _program(plan, True, False).buffers + plan.stochastic


def times_of(plan: Plan, run: Run, x: Tensor) -> Times:
    """The time and the step size that the network is told at each row, (B,) each, on the device of ``x``."""
    denoiser = run.network.denoiser
    rows = list(zip(plan.rows, plan.values, strict=True))
    told = torch.zeros(len(rows), dtype=torch.float64)
    wanted = torch.tensor([row.evaluates for row, _ in rows])
    if bool(wanted.any()):
        told[wanted] = denoiser.told(as_time([v.t_in for row, v in rows if row.evaluates]))
    sizes = torch.tensor([v.step or 0.0 for _, v in rows], dtype=x.dtype)
    on_device = (told.to(x.device, denoiser.time_dtype(x.dtype)), sizes.to(x.device))
    times, steps = ([t.expand(x.shape[0]) for t in column.unbind()] for column in on_device)
    return times, steps


def _hooked(hook: Hook, x0: Tensor, at: At) -> Tensor:
    changed = hook(x0, at)
    if not isinstance(changed, Tensor) or changed.shape != x0.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(f"the hook {hook!r} returned {got} for a clean sample of shape {tuple(x0.shape)}")
    return changed.to(x0.dtype)


# -- running -------------------------------------------------------------------------------------------------


def execute(
    plan: Plan, x: Tensor, run: Run, *, owned: bool = False, trajectory: list[Tensor] | None = None
) -> Tensor:
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
    program = _program(plan, owned, bool(run.hooks))
    times = run.times or times_of(plan, run, x)
    # The last entry is the newest output.
    buffers = [x, *(torch.empty_like(x, memory_format=_DENSE) for _ in range(program.buffers - 1)), x]
    own = {tensor.untyped_storage().data_ptr() for tensor in buffers}
    state, nfe = x, 0
    for r, (row, line) in enumerate(zip(plan.rows, program.lines, strict=True)):
        for kind, dst, src, c, other in line.code:
            if kind == _ADD:
                buffers[dst].add_(buffers[src], alpha=c)
            elif kind == _MUL:
                torch.mul(buffers[src], c, out=buffers[dst])
            elif kind == _SUM:
                torch.add(buffers[src], buffers[other], alpha=c, out=buffers[dst])
            else:
                buffers[dst].zero_()
        state = buffers[line.state]
        for stream, c in line.noises:
            state.add_(run.noise(stream, x), alpha=c)
        if trajectory is not None:
            trajectory.append(state.clone())
        if not row.evaluates:
            continue
        nfe += 1
        out = evaluate(plan, r, state, times, run, nfe, line.hooked)
        # A network may return its input, or something that shares its memory.
        buffers[_OUT] = out.clone() if out.untyped_storage().data_ptr() in own else out
    return state.clone() if state is x and not owned else state


def evaluate(plan: Plan, r: int, state: Tensor, times: Times, run: Run, nfe: int, hooked: bool) -> Tensor:
    """The network's output at row ``r``, dense and of the state's dtype, or the clean prediction that hooks changed.

    Args:
        plan, r, state: where.
        times: of :func:`times_of`.
        run: network, hooks and callback.
        nfe: evaluations with this one.
        hooked: whether hooks act here (:func:`conversions`).
    """
    row, v = plan.rows[r], plan.values[r]
    rho = v.sigma / v.alpha if v.alpha else math.inf
    out = run.network(state, times[0][r], rho, times[1][r] if row.sized else None)
    if out.dtype != state.dtype:
        out = out.to(state.dtype)
    if not out.is_contiguous() and not out[0].is_contiguous():
        out = out.contiguous()
    if run.hooks or run.callback:
        p, q = x0_pairs(plan)[r]
        x0 = torch.mul(out, q).add_(state, alpha=p)
        if hooked:
            at = At(r, v.t, v.alpha, v.sigma, state, run.samples)
            for hook in run.hooks:
                x0 = _hooked(hook, x0, at)
            out = x0
        if run.callback:
            run.callback(Step(r, nfe, v.t, v.alpha, v.sigma, state, x0, run.samples))
    return out


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
    states = [x]
    extend(plan, plan.tensors(), states, {}, run, checkpoint=checkpoint)
    if trajectory is not None:
        trajectory += states[1:]
    return states[-1]


def extend(
    plan: Plan,
    values: Sequence[RowValues],
    states: list[Tensor],
    predictions: dict[int, Tensor],
    run: Run,
    *,
    checkpoint: bool = False,
) -> None:
    """Run the rows that are missing, keeping every state and prediction.

    Args:
        plan: the structure.
        values: its numbers: ``plan.tensors()`` for gradients, ``plan.values`` without.
        states: ``x_0`` and the states so far (B, ...); the others are appended.
        predictions: those of the rows so far; the others are added.
        run, checkpoint: as in :func:`execute_differentiable`.
    """
    denoiser, x = run.network.denoiser, states[0]
    dtype = denoiser.time_dtype(x.dtype)

    def told(t: Any) -> Tensor:
        return denoiser.told(as_time(t)).to(x.device, dtype).expand(x.shape[0])

    def near(c: Any) -> Any:
        return c.to(x.device, x.dtype) if isinstance(c, Tensor) else c

    nfe = sum(row.evaluates for row in plan.rows[: len(states) - 1])
    for r in range(len(states) - 1, len(plan.rows)):
        row, v, known = plan.rows[r], values[r], plan.values[r]
        state = torch.zeros_like(x)
        for c, j in zip(v.a, row.states, strict=True):
            state = state + near(c) * states[j]
        for c, k in zip(v.b, row.predictions, strict=True):
            state = state + near(c) * predictions[k]
        for c, s in zip(v.c, row.noises, strict=True):
            state = state + near(c) * run.noise(s, x)
        states.append(state)
        if not row.evaluates:
            continue
        size = (
            torch.as_tensor(near(v.step), dtype=x.dtype, device=x.device).expand(len(x))
            if row.sized
            else None
        )
        rho = known.sigma / known.alpha if known.alpha else math.inf
        arguments = (state, told(v.t_in), rho, size)
        if checkpoint:
            out = torch.utils.checkpoint.checkpoint(run.network, *arguments, use_reentrant=False)
        else:
            out = run.network(*arguments)
        nfe += 1
        out = out.to(x.dtype)
        p, q = near(v.p), near(v.q)
        if run.hooks or run.callback:
            level = (as_time(v.alpha), as_time(v.sigma))
            px, qx = map(near, coefficients(plan.prediction, *level, "x0"))
            x0 = px * state + qx * out
            if run.hooks and float(qx.detach()):
                at = At(r, known.t, known.alpha, known.sigma, state, run.samples)
                for hook in run.hooks:
                    x0 = _hooked(hook, x0, at)
                out, p, q = x0, p - q * px / qx, q / qx
            if run.callback:
                run.callback(Step(r, nfe, known.t, known.alpha, known.sigma, state, x0, run.samples))
        predictions[r] = p * state + q * out


def locate_nonfinite(plan: Plan, x: Tensor, run: Run) -> NonFiniteError:
    """Replay a run whose result was not finite, and say where it began.

    The replay draws the same noise, so it meets the same values; the check inside the loop costs one
    synchronisation a row, which is why the first run has none.
    """
    if not bool(torch.isfinite(x).all()):
        return NonFiniteError("the input state is not finite; check noise= or x=")
    evaluating = [r for r, row in enumerate(plan.rows) if row.evaluates]
    found: list[str] = []
    calls = 0

    class Watched(Bound):
        def __init__(self) -> None:
            self.__dict__.update(run.network.__dict__)

        def __call__(self, state: Tensor, t: Tensor, rho: float, step: Tensor | None = None) -> Tensor:
            nonlocal calls
            calls += 1
            out = super().__call__(state, t, rho, step)
            for name, value in (("the state", state), ("the network's output", out)):
                bad = ~torch.isfinite(value).flatten(1).all(dim=1)
                if not found and bool(bad.any()):
                    which = (bad.nonzero().flatten() + (run.samples.start or 0)).tolist()
                    r = evaluating[calls - 1]
                    found.append(
                        f"{name} is not finite at row {r} (t={plan.values[r].t:g}, evaluation {calls} of "
                        f"{plan.nfe}) for samples {which[:8]}{'...' if len(which) > 8 else ''}"
                    )
            return out

    execute(plan, x, Run(Watched(), run.noise, run.hooks, None, run.samples))
    what = found[0] if found else "the last update overflowed"
    return NonFiniteError(
        f"sampling with {plan!r} failed: {what}; try the network in float32 or another grid"
    )
