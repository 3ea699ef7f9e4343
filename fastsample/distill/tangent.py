"""Derivatives of a network along a curve in (x, t): forward mode, with fallbacks that are said aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..denoiser import Denoiser
from ..distributed import decided
from ..errors import unknown
from ..prediction import coefficients
from .draws import Draws
from .limits import Limit
from .method import Method
from .prediction import column

log = logging.getLogger(__name__)
_DIFFERENCE = 1e-3
_DISAGREES = 0.2
_ROUGH = 0.5
MODES = ("auto", "forward", "difference", "secant")
_WHOLE_TIMES = (
    "the network knows whole times only, so its output has no derivative in time; use jvp='secant' (or 'auto'), or "
    "a method without derivatives (consistency, ect, shortcut)"
)


class Tangent:
    """``dF/ds`` of a denoiser's prediction F along a curve ``(x(s), t(s))``.

    The first call with "auto" compares forward mode with a difference quotient and with a secant: operators
    without a forward-mode rule raise, and some return zero tangents silently; and a network that is told its time
    by a fast embedding (a thousand whole times, for one) is so rough in time that its derivative says nothing of
    the curve, with which continuous-time training diverges (Lu & Song 2025, section 4.1, who train another
    embedding). Central differences, or secants, are taken from then on, and the reason is logged as a warning.

    Args:
        mode: "auto", "forward", "difference" or "secant".
    """

    def __init__(self, mode: str = "auto") -> None:
        if mode not in MODES:
            raise unknown("jvp", mode, MODES)
        self.mode = mode

    def check(self, denoiser: Denoiser) -> None:
        """
        Raises:
            ValueError: the network has no derivative in time, which the mode needs.
        """
        exact = self.mode in ("forward", "difference")
        if exact and not denoiser.time_dtype(torch.float32).is_floating_point:
            raise ValueError(f"jvp={self.mode!r}: {_WHOLE_TIMES}")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        space: str,
        x: Tensor,
        t: Tensor,
        dx: Tensor,
        dt: Tensor,
        conditions: Mapping[str, Any],
        step: Tensor | None = None,
        dstep: Tensor | None = None,
        *,
        secant: Callable[[], Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """
        Args:
            denoiser: the network with its meaning.
            space: of F.
            x, dx: state and its derivative (B, ...).
            t, dt: time and its derivative (B,), float64 on the CPU.
            conditions: of the network.
            step, dstep: a step size also told to the network and its derivative (B,).
            secant: dF from two points of the curve that are well apart, where the caller can give it.
            draws: what each pass draws (dropout: differences of two masks are no derivative); by default the next.
        """
        draws = Draws(x.device) if draws is None else draws
        if self.mode == "secant":
            if secant is None:
                raise ValueError("jvp='secant' needs a curve, and this derivative has none")
            return secant()
        process = denoiser.process
        with torch.enable_grad():
            time = t.detach().clone().requires_grad_()
            values = [
                *coefficients(denoiser.prediction, process.alpha(time), process.sigma(time), space),
                denoiser.told(process.network_time(time)),
            ]
            # the chain rule on the host, in float64
            rates = [
                torch.autograd.grad(v.sum(), time, retain_graph=True)[0] * dt
                if v.requires_grad
                else torch.zeros_like(dt)
                for v in values
            ]
        (p, q, told), (dp, dq, dtold) = [v.detach() for v in values], rates
        dtype = denoiser.time_dtype(x.dtype)
        if not dtype.is_floating_point:
            if self.mode == "auto" and secant is not None:
                log.warning("the network knows whole times only; derivatives are secants")
                self.mode = "secant"
                return secant()
            raise ValueError(_WHOLE_TIMES)
        told, dtold = (v.to(x.device, dtype, non_blocking=True) for v in (told, dtold))
        steps, dsteps = (
            [] if v is None else [v.to(x.device, x.dtype, non_blocking=True)] for v in (step, dstep)
        )
        bound = denoiser.bind(len(x), conditions, x.device)

        def network(x: Tensor, told: Tensor, *step: Tensor) -> Tensor:
            draws.again()
            return bound(x, told, 1.0, *step).to(x.dtype)

        primals, tangents = (x, told, *steps), (dx, dtold, *dsteps)
        examined = self.mode == "auto"
        if examined:
            self.mode = MODES[decided(MODES.index(self._examine(network, primals, tangents)))]
        if self.mode == "forward":
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
                out, dout, *_ = torch.func.jvp(network, primals, tangents)
        else:
            out, dout = self._difference(network, primals, tangents)
        derivative = column(dp, x) * x + column(p, x) * dx + column(dq, x) * out + column(q, x) * dout
        if examined and secant is not None:
            smooth = secant()
            if decided(bool((derivative - smooth).norm() > _ROUGH * smooth.norm())):
                log.warning(
                    "the network is rough in time: along the trajectory its derivative is %.1f times the secant's; "
                    "derivatives are secants (an embedding of slow frequencies would allow jvp='forward')",
                    float(derivative.norm() / smooth.norm()),
                )
                self.mode = "secant"
                derivative = smooth
        return derivative

    def _examine(self, network: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> str:
        try:
            with sdpa_kernel(SDPBackend.MATH):
                forward = torch.func.jvp(network, primals, tangents)[1]
        except (RuntimeError, NotImplementedError) as error:
            log.warning(
                "forward mode fails (%s); derivatives are central differences", str(error).split("\n")[0]
            )
            return "difference"
        _, difference = self._difference(network, primals, tangents)
        # a missing rule shows in every sample; where the curve is steep the quotient itself is wrong
        apart, size = (v.flatten(1).norm(dim=1) for v in (forward - difference, difference))
        if not bool((apart - _DISAGREES * size).median() <= 1e-6):
            log.warning(
                "forward mode disagrees with a difference quotient (an operator without a forward rule gives "
                "zeros silently); derivatives are central differences"
            )
            return "difference"
        return "forward"

    @staticmethod
    def _difference(
        network: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        h = _DIFFERENCE if primals[0].dtype == torch.float32 else _DIFFERENCE / 30
        # the state's own scale; times are differentiated in units of the whole curve
        with _full_precision():
            ahead, behind = (
                network(*(a + sign * h * b for a, b in zip(primals, tangents, strict=True)))
                for sign in (1, -1)
            )
        return network(*primals), (ahead - behind) / (2 * h)


def one_sided(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights (B,) of ``F(s)``, ``F(s - near)`` and ``F(s - far)`` in ``dF/ds``.

    The derivative of a parabola; of a line where both distances are one, and nothing where they are 0.
    """
    line = (far - near) < 1e-6
    there = near > 1e-6
    near = torch.where(there, near, 1.0)
    far = torch.where(line, 2 * near, far)
    first = torch.where(line, -1 / near, -far / (near * (far - near)))
    second = torch.where(line, 0.0, near / (far * (far - near)))
    first, second = (torch.where(there, w, 0.0) for w in (first, second))
    return -(first + second), first, second


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TensorFloat-32, whose rounding is as large as the differences that are divided."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class WithTangents(Method):
    """What methods share that need a derivative along the trajectory; ``jvp`` and ``width`` are among their settings.

    How it is taken is decided once, and checkpoints keep it: another batch could decide otherwise.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"width": Limit(0, 0.5, above=True, below=True)}
    jvp: str
    width: float

    def begin_tangents(self) -> None:
        """Once the student is there.

        Raises:
            ValueError: an unknown way, or one that the student's network does not allow.
        """
        self._tangent = Tangent(self.jvp)
        self._tangent.check(self.denoiser("student"))

    def state_dict(self) -> dict[str, Any]:
        return {"jvp": self._tangent.mode}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tangent.mode = state["jvp"]
