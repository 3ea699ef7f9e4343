"""Running a plan with one kernel launch a row: ``fastsample_kernels.update``.

The same arithmetic as :func:`fastsample.executor.execute`. A row reads its states, its predictions and the network's
newest output once, draws its noise in registers, and writes the new state and, where a later row reads it, the newest
prediction.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .executor import Run, conversions, evaluate, times_of
from .plan import Plan, is_copy


def require(x: Tensor) -> None:
    """Refuse states that the kernel does not take.

    Raises:
        ValueError: no kernels here, or none for this device or dtype; says why.
    """
    try:
        import fastsample_kernels as fk
    except ImportError as e:
        raise ValueError("kernels=True needs the package fastsample_kernels; leave kernels= out") from e
    if not fk.supported("update", [x], [1.0]):
        raise ValueError(
            f"kernels=True cannot run here ({fk.explain('update', [x], [1.0])}); leave kernels= out"
        )


def execute_fused(plan: Plan, x: Tensor, run: Run, *, trajectory: list[Tensor] | None = None) -> Tensor:
    """Run a plan; arguments and result as in :func:`fastsample.executor.execute`. ``x`` is not overwritten."""
    from fastsample_kernels import Noise, update

    rows, values = plan.rows, plan.values
    pairs, acts = conversions(plan, bool(run.hooks))
    times = run.times or times_of(plan, run, x)
    last_state, last_prediction = _last_uses(plan)
    states, predictions = {0: x}, dict[int, Tensor]()
    state, out, nfe = x, None, 0
    for r, (row, v) in enumerate(zip(rows, values, strict=True)):
        newest: dict[str, Any] = {}
        if out is not None and last_prediction.get(r - 1, -1) >= r:
            p, q = pairs[r - 1]
            newest = {"output": out, "convert": (p, q), "keep": last_prediction[r - 1] > r}
        noises = list(zip(row.noises, v.c, strict=True))
        if is_copy(row, v):
            following = states[row.states[0]]
            if newest:
                p, q = newest["convert"]
                predictions[r - 1] = update([state], [p], output=out, weight=q)[0]
        else:
            terms = [(states[j], a) for j, a in zip(row.states, v.a, strict=True)]
            reads = list(zip(row.predictions, v.b, strict=True))
            terms += [(predictions[k], b) for k, b in reads if k in predictions]
            if newest:
                newest["weight"] = sum(b for k, b in reads if k == r - 1)
                if newest["convert"][0]:
                    newest["state"] = next((i for i, (t, _) in enumerate(terms) if t is state), len(terms))
                    terms += [(state, 0.0)] if newest["state"] == len(terms) else []
            if noises and run.draws is not None:
                (stream, c), *noises = noises
                newest["noise"] = Noise(c, run.draws[0], stream, run.draws[1])
            terms = terms or [(x, 0.0)]
            following, m = update([t for t, _ in terms], [a for _, a in terms], **newest)
            if m is not None:
                predictions[r - 1] = m
            for stream, c in noises:
                following.add_(run.noise(stream, x), alpha=c)
        state = states[r + 1] = following
        states = {j: s for j, s in states.items() if last_state.get(j, -1) > r or j == r + 1}
        predictions = {k: m for k, m in predictions.items() if last_prediction[k] > r}
        if trajectory is not None:
            trajectory.append(state.clone())
        out = None
        if row.evaluates:
            nfe += 1
            out = evaluate(plan, r, state, times, run, nfe, acts[r])
    return state.clone() if state is x else state


def _last_uses(plan: Plan) -> tuple[dict[int, int], dict[int, int]]:
    """The last row that reads each state and each prediction."""
    states: dict[int, int] = {}
    predictions: dict[int, int] = {}
    for r, row in enumerate(plan.rows):
        states |= dict.fromkeys(row.states, r)
        predictions |= dict.fromkeys(row.predictions, r)
    return states, predictions
