"""Gaussian mixtures: a model whose score, moments and probability-flow ODE are known exactly.

With ``x_0 ~ sum_k w_k N(mu_k, S_k)`` the noised ``x = alpha x_0 + sigma eps`` is again a mixture,
``sum_k w_k N(alpha mu_k, alpha^2 S_k + sigma^2 I)``. In the eigenbasis of each ``S_k = U_k diag(d_k) U_k^T``
its covariances are diagonal, so an evaluation at any (alpha, sigma) costs two matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prediction import canonical
from ..process import Process, as_time

Level = float | Tensor


class GaussianMixture:
    """A Gaussian mixture with an optional class for each component.

    Shapes: a batch ``x`` is ``[B, *sample_shape]`` with ``D`` numbers a sample. ``alpha`` and ``sigma`` are
    numbers or tensors of shape ``[]`` or ``[B]``, not negative, not both zero. Evaluation runs in the dtype
    (float32 or float64) and on the device of ``x``.

    Args:
        means: ``[K, D]``.
        covs: ``[K, D, D]``, symmetric positive semi-definite.
        weights: ``[K]``, positive; normalised to sum one.
        classes: ``[K]``, the class index of each component, 0..C-1; default: component k is class k. Class
            ``C`` (``num_classes``) is the null class: the full mixture.
        sample_shape: the shape of one sample, default ``(D,)``.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, covariances that are not symmetric
            positive semi-definite, a class without components.
    """

    def __init__(
        self,
        means: Tensor,
        covs: Tensor,
        weights: Tensor,
        classes: Tensor | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covs = torch.as_tensor(covs, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means has shape {tuple(self.means.shape)}; expected [K, D]")
        k, d = self.means.shape
        if self.covs.shape != (k, d, d):
            raise ValueError(f"covs has shape {tuple(self.covs.shape)}; expected {(k, d, d)} to fit means")
        if self.weights.shape != (k,) or not bool((self.weights > 0).all()):
            raise ValueError(f"weights={self.weights.tolist()} must be {k} positive numbers")
        self.weights = self.weights / self.weights.sum()
        scale = self.covs.abs().amax().clamp_min(1e-300)
        if bool((self.covs - self.covs.mT).abs().amax() > 1e-10 * scale):
            raise ValueError("covs must be symmetric; symmetrise them: (S + S.mT) / 2")
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.covs)  # [K, D], [K, D, D] in columns
        if bool(self.eigenvalues.min() < -1e-10 * scale):
            raise ValueError(
                f"covs must be positive semi-definite; least eigenvalue {float(self.eigenvalues.min()):.3g}; "
                "add a multiple of the identity"
            )
        self.eigenvalues = self.eigenvalues.clamp_min(0.0)
        self.classes = torch.arange(k) if classes is None else torch.as_tensor(classes, dtype=torch.int64)
        if self.classes.shape != (k,):
            raise ValueError(f"classes has shape {tuple(self.classes.shape)}; expected [{k}]")
        self.num_classes = int(self.classes.max()) + 1
        if sorted(set(self.classes.tolist())) != list(range(self.num_classes)):
            raise ValueError(f"classes={self.classes.tolist()} must use every index from 0 up")
        self.sample_shape = (d,) if sample_shape is None else tuple(sample_shape)
        if math.prod(self.sample_shape) != d:
            raise ValueError(f"sample_shape={self.sample_shape} does not hold D={d} numbers")
        # log w_k + log-mask of each class, with the null class (no mask) last: [C + 1, K]
        member = self.classes[None, :] == torch.arange(self.num_classes)[:, None]
        member = torch.cat([member, torch.ones(1, k, dtype=torch.bool)])
        self._log_prior = torch.where(member, self.weights.log(), -math.inf).log_softmax(dim=1)
        self._casts: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    @classmethod
    def fit(
        cls, x: Tensor, labels: Tensor, ridge: float = 1e-3, sample_shape: tuple[int, ...] | None = None
    ) -> GaussianMixture:
        """One component for each class of labelled data: its mean, maximum-likelihood covariance + ridge * I.

        Args:
            x: ``[N, *sample_shape]``; labels: ``[N]``, 0..K-1, each class at least once.
            ridge: added to the diagonals, > 0.
            sample_shape: of one sample; default that of ``x``.

        Raises:
            ValueError: labels that do not fit, or a ridge that is not positive.
        """
        if labels.shape != (len(x),):
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected [{len(x)}] to fit x")
        if not ridge > 0:
            raise ValueError(f"ridge={ridge!r} must be positive: class covariances are often singular")
        flat = x.reshape(len(x), -1).double()
        counts = labels.bincount()
        if bool((counts == 0).any()):
            raise ValueError(f"labels leave a class empty: counts {counts.tolist()}; renumber them")
        groups = [flat[labels == k] for k in range(len(counts))]
        eye = torch.eye(flat.shape[1], dtype=torch.float64)
        means = torch.stack([g.mean(dim=0) for g in groups])
        covs = torch.stack(
            [(g - m).T @ (g - m) / len(g) + ridge * eye for g, m in zip(groups, means, strict=True)]
        )
        return cls(means, covs, counts.double(), sample_shape=sample_shape or tuple(x.shape[1:]))

    @property
    def dim(self) -> int:
        """The numbers in a sample, D."""
        return self.means.shape[1]

    # -- moments and samples ---------------------------------------------------------------------------------

    def _prior(self, label: int | None) -> Tensor:
        index = self.num_classes if label is None else label
        if not 0 <= index <= self.num_classes:
            raise ValueError(
                f"label={label!r} must lie in 0..{self.num_classes} ({self.num_classes}: no class)"
            )
        return self._log_prior[index].exp()

    def mean(self, label: int | None = None) -> Tensor:
        """The exact mean, float64 ``[D]``; of one class where a label is given."""
        return self._prior(label) @ self.means

    def cov(self, label: int | None = None) -> Tensor:
        """The exact covariance, float64 ``[D, D]``; of one class where a label is given."""
        prior = self._prior(label)
        centred = self.means - self.mean(label)
        return torch.einsum("k,kij->ij", prior, self.covs) + torch.einsum(
            "k,ki,kj->ij", prior, centred, centred
        )

    def sample(self, n: int, seed: int = 0, label: int | None = None) -> tuple[Tensor, Tensor]:
        """``n`` exact samples, float64 ``[n, *sample_shape]``, and their classes, int64 ``[n]``."""
        if n < 1:
            raise ValueError(f"n={n} must be at least 1")
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self._prior(label), n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        x = torch.empty_like(z)
        for i in k.unique():  # one product a component, rather than n gathered D x D matrices
            chosen = k == i
            x[chosen] = self.means[i] + (z[chosen] * self.eigenvalues[i].sqrt()) @ self.eigenvectors[i].T
        return x.reshape(n, *self.sample_shape), self.classes[k]

    # -- evaluation at a noise level -------------------------------------------------------------------------

    def _cast(self, like: Tensor) -> tuple[Tensor, ...]:
        key = (like.dtype, like.device)
        if key not in self._casts:
            k, d = self.means.shape
            to_basis = self.eigenvectors.permute(1, 0, 2).reshape(d, k * d)  # x -> U_k^T x for all k at once
            centre = torch.einsum("kij,ki->kj", self.eigenvectors, self.means)  # U_k^T mu_k
            parts = (to_basis, centre, self.eigenvalues, self.means, self._log_prior)
            self._casts[key] = tuple(part.to(like.device, like.dtype) for part in parts)
        return self._casts[key]

    def _evaluate(
        self, x: Tensor, alpha: Level, sigma: Level, labels: Tensor | int | None, class_probs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all quantities are made of.

        Returns:
            With ``C_k = alpha^2 S_k + sigma^2 I``: ``log w_k N(x; alpha mu_k, C_k)`` up to the constant of pi
            ``[B, K]``; ``U_k^T C_k^-1 (x - alpha mu_k)`` ``[B, K, D]``; alpha and sigma ``[B or 1, 1, 1]``.
        """
        if x.shape[1:] != self.sample_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected [B, {', '.join(map(str, self.sample_shape))}]"
            )
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x has dtype {x.dtype}; expected float32 or float64")
        to_basis, centre, eigenvalues, _, log_prior = self._cast(x)
        a, s = self._level(alpha, x, "alpha"), self._level(sigma, x, "sigma")
        if bool(((a == 0) & (s == 0)).any()):
            raise ValueError("alpha and sigma are both zero: there is no distribution to evaluate")
        # a zero eigenvalue at sigma = 0, or a square that underflows: keep the quotients finite
        variance = (a * a * eigenvalues + s * s).clamp_min(torch.finfo(x.dtype).tiny)
        projected = (x.reshape(len(x), self.dim) @ to_basis).reshape(len(x), *centre.shape)
        residual = projected - a * centre
        scaled = residual / variance
        log_density = -0.5 * (torch.linalg.vecdot(residual, scaled) + variance.log().sum(dim=2))
        return self._log_prior_of(x, log_prior, labels, class_probs) + log_density, scaled, a, s

    def _level(self, value: Level, x: Tensor, name: str) -> Tensor:
        level = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x)):
            raise ValueError(f"{name} has shape {tuple(level.shape)}; expected [] or [{len(x)}]")
        if not bool(((level >= 0) & level.isfinite()).all()):
            raise ValueError(f"{name}={value!r} must be finite and not negative")
        return level.reshape(-1, 1, 1)

    def _log_prior_of(
        self, x: Tensor, log_prior: Tensor, labels: Tensor | int | None, class_probs: Tensor | None
    ) -> Tensor:
        if class_probs is not None:
            if labels is not None:
                raise ValueError("give labels or class_probs, not both")
            probs = torch.as_tensor(class_probs, dtype=x.dtype, device=x.device)
            probs = probs[None] if probs.ndim == 1 else probs
            if probs.ndim != 2 or probs.shape[1] != self.num_classes or len(probs) not in (1, len(x)):
                raise ValueError(
                    f"class_probs has shape {tuple(probs.shape)}; expected [{self.num_classes}] or "
                    f"[{len(x)}, {self.num_classes}]"
                )
            if not bool((probs >= 0).all() and (probs.sum(dim=1) > 0).all()):
                raise ValueError("class_probs must not be negative, and not all zero")
            classes = self.classes.to(x.device)
            within = log_prior[classes, torch.arange(len(classes), device=x.device)]  # log p(k | class of k)
            return within + (probs / probs.sum(dim=1, keepdim=True)).log()[:, classes]
        if labels is None:
            return log_prior[-1:]
        index = torch.as_tensor(labels, device=x.device)
        if index.is_floating_point() or bool(((index < 0) | (index > self.num_classes)).any()):
            raise ValueError(
                f"labels={index.tolist()} must be integers in 0..{self.num_classes} (the last: no class)"
            )
        if index.ndim > 1 or (index.ndim == 1 and len(index) != len(x)):
            raise ValueError(f"labels has shape {tuple(index.shape)}; expected [{len(x)}]")
        return log_prior[index.reshape(-1)]

    def log_prob(
        self,
        x: Tensor,
        alpha: Level = 1.0,
        sigma: Level = 0.0,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """The exact log-density of the noised mixture at ``x``, ``[B]``; arguments as in :meth:`x0`."""
        joint = self._evaluate(x, alpha, sigma, labels, class_probs)[0]
        return joint.logsumexp(dim=1) - 0.5 * self.dim * math.log(2 * math.pi)

    def responsibilities(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """The posterior probability of each component, ``[B, K]``; arguments as in :meth:`x0`."""
        return self._evaluate(x, alpha, sigma, labels, class_probs)[0].softmax(dim=1)

    def _posterior(
        self,
        scaled_gain: Callable[[Tensor, Tensor, Tensor], Tensor],
        mean_gain: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None,
        class_probs: Tensor | None,
    ) -> Tensor:
        """Every prediction has the form ``sum_k r_k (U_k diag(g_k) U_k^T C_k^-1 (x - alpha mu_k) + m mu_k)``.

        ``g_k = scaled_gain(alpha, sigma, eigenvalues)`` and ``m = mean_gain(alpha, sigma)``; ``r_k`` are the
        responsibilities. Forming the gains first avoids differences such as ``x - alpha x_0``, which lose all
        digits at small sigma.
        """
        joint, scaled, a, s = self._evaluate(x, alpha, sigma, labels, class_probs)
        to_basis, _, eigenvalues, means, _ = self._cast(x)
        weight = joint.softmax(dim=1)
        spread = weight[:, :, None] * (scaled_gain(a, s, eigenvalues) * scaled)
        out = spread.reshape(len(x), -1) @ to_basis.T + mean_gain(a, s).reshape(-1, 1) * (weight @ means)
        return out.reshape(x.shape)

    def x0(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """The posterior mean ``E[x_0 | x]`` of ``x = alpha x_0 + sigma eps``: the exact denoiser.

        At ``sigma = 0`` it is ``x / alpha``, at ``alpha = 0`` the prior mean.

        Args:
            x: ``[B, *sample_shape]``, float32 or float64.
            alpha, sigma: numbers, or tensors ``[]`` or ``[B]``.
            labels: class of each sample, int64 ``[B]`` or a number; ``num_classes`` or None is no class.
            class_probs: ``[C]`` or ``[B, C]``, other prior class probabilities instead of labels.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or range.
        """
        out = self._posterior(
            lambda a, s, d: a * d, lambda a, s: torch.ones_like(a), x, alpha, sigma, labels, class_probs
        )
        a, s = (self._level(v, x, "level").reshape(-1, *[1] * (x.ndim - 1)) for v in (alpha, sigma))
        clean = s == 0
        return torch.where(clean, x / torch.where(clean, a, 1), out) if bool(clean.any()) else out

    def score(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """The gradient of :meth:`log_prob` in ``x``; arguments as in :meth:`x0`."""
        return self._posterior(
            lambda a, s, d: -torch.ones_like(d),
            lambda a, s: torch.zeros_like(a),
            x,
            alpha,
            sigma,
            labels,
            class_probs,
        )

    def eps(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """The expected noise ``E[eps | x] = -sigma * score``; arguments as in :meth:`x0`."""
        return self._posterior(
            lambda a, s, d: s, lambda a, s: torch.zeros_like(a), x, alpha, sigma, labels, class_probs
        )

    def v(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """``alpha E[eps | x] - sigma E[x_0 | x]`` (Salimans & Ho 2022); arguments as in :meth:`x0`."""
        return self._posterior(
            lambda a, s, d: a * s * (1 - d), lambda a, s: -s, x, alpha, sigma, labels, class_probs
        )

    def flow(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        labels: Tensor | int | None = None,
        *,
        class_probs: Tensor | None = None,
    ) -> Tensor:
        """``E[eps - x_0 | x]``, the velocity of a rectified flow; arguments as in :meth:`x0`."""
        return self._posterior(
            lambda a, s, d: s - a * d, lambda a, s: -torch.ones_like(a), x, alpha, sigma, labels, class_probs
        )

    # -- the reference solution ------------------------------------------------------------------------------

    def reference(
        self,
        x: Tensor,
        process: Process,
        t_start: float | None = None,
        t_end: float | None = None,
        labels: Tensor | int | None = None,
        *,
        guidance: float = 1.0,
        tolerance: float = 1e-9,
    ) -> Reference:
        """Solve the probability-flow ODE to a verified accuracy, in float64.

        In the angle ``phi = atan2(sigma, alpha)`` the state ``x / sqrt(alpha^2 + sigma^2)`` moves with
        velocity ``v = cos(phi) eps - sin(phi) x_0`` for every process (the ODE of TrigFlow, Lu & Song 2025),
        finite at pure noise and at no noise alike; a process enters by its two ends alone. The ODE is
        integrated by Dormand & Prince's method of order 8 with adaptive steps, again with a 30 times smaller
        tolerance, and so on until two successive solutions agree.

        Args:
            x: the state at ``t_start``, ``[B, *sample_shape]``.
            process: anything with ``alpha(t)`` and ``sigma(t)``.
            t_start, t_end: times; default: the process's own ends ``t_start`` and ``t_end`` (swap to invert).
            labels: as in :meth:`x0`.
            guidance: scale of classifier-free guidance towards ``labels``; 1: none.
            tolerance: the RMSE within which two successive solutions must agree.

        Raises:
            ValueError: guidance without labels, a tolerance out of reach, or arguments as in :meth:`x0`.
            RuntimeError: no agreement at the finest tolerance that float64 permits.
        """
        from scipy.integrate import solve_ivp

        if guidance != 1 and labels is None:
            raise ValueError(f"guidance={guidance!r} needs labels to guide towards")
        if not tolerance >= 1e-11:
            raise ValueError(f"tolerance={tolerance!r} must be at least 1e-11: float64 has no more to give")
        ends = [process.t_start if t_start is None else t_start, process.t_end if t_end is None else t_end]
        (a0, s0), (a1, s1) = ((float(process.alpha(t)), float(process.sigma(t))) for t in ends)
        phi0, phi1 = math.atan2(s0, a0), math.atan2(s1, a1)
        start = x.double().reshape(-1).cpu() / math.hypot(a0, s0)
        evaluations = 0

        def velocity(phi: float, flat: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            state = torch.from_numpy(flat).reshape(x.shape)
            # cos(pi/2) is 6e-17 in floating point: harmless, as v has no quotient
            a, s = max(math.cos(phi), 0.0), max(math.sin(phi), 0.0)
            out = self.v(state, a, s, labels)
            if guidance != 1:
                out = torch.lerp(self.v(state, a, s), out, guidance)
            return out.reshape(-1).numpy()

        previous: Tensor | None = None
        error = math.inf
        local = max(tolerance, 1e-12)
        while local >= 3e-14:
            solution = solve_ivp(
                velocity, (phi0, phi1), start.numpy(), method="DOP853", rtol=local, atol=local
            )
            if not solution.success:
                raise RuntimeError(f"the integration stopped at phi={solution.t[-1]}: {solution.message}")
            current = torch.from_numpy(solution.y[:, -1].copy()).reshape(x.shape)
            if previous is not None:
                error = float((current - previous).square().mean().sqrt()) * math.hypot(a1, s1)
                if error <= tolerance:
                    state = current * math.hypot(a1, s1)
                    x0 = self._guided_x0(state, a1, s1, labels, guidance)
                    return Reference(state, x0, error, evaluations)
            previous = current
            local /= 30
        raise RuntimeError(
            f"successive solutions differ by RMSE {error:.2e}, more than tolerance={tolerance:.1e}: "
            "give a larger one, or fewer samples (some may lie on the border between two modes)"
        )

    def _guided_x0(
        self, x: Tensor, alpha: float, sigma: float, labels: Tensor | int | None, guidance: float
    ) -> Tensor:
        out = self.x0(x, alpha, sigma, labels)
        return out if guidance == 1 else torch.lerp(self.x0(x, alpha, sigma), out, guidance)


@dataclass(frozen=True)
class Reference:
    """A verified solution of the probability-flow ODE.

    Attributes:
        x: the state at the end, float64 ``[B, *sample_shape]``.
        x0: its denoised image (the guided one where guidance was used), float64.
        error: RMSE between the last two solutions, an upper estimate of the last one's error.
        evaluations: evaluations of the velocity, of all solutions together.
    """

    x: Tensor
    x0: Tensor
    error: float
    evaluations: int


class MixtureNet:
    """The mixture as a network of a process: ``net(x, t, labels=None)`` with the exact prediction.

    Args:
        mixture: the data distribution.
        process: gives alpha and sigma at the times that the network is told.
        prediction: ``"eps"``, ``"x0"``, ``"v"``, ``"flow"`` or ``"score"``.

    Raises:
        ValueError: another prediction.
    """

    def __init__(self, mixture: GaussianMixture, process: Process, prediction: str = "eps") -> None:
        self.mixture, self.process, self.prediction = mixture, process, canonical(prediction)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """The exact prediction for ``x`` ``[B, *sample_shape]`` at times ``t``, ``[]`` or ``[B]``."""
        # float32 times may round past an end of the process
        ends = sorted((self.process.t_zero, self.process.t_start))
        time = as_time(t).clamp(*ends)
        if time.ndim and bool((time == time[0]).all()):
            time = time[0]  # one noise level for the batch: its [K, D] variances are computed once
        predict = getattr(self.mixture, self.prediction)
        return predict(x, self.process.alpha(time), self.process.sigma(time), labels)


def digits_mixture() -> GaussianMixture:
    """The embedded analytic model: one Gaussian for each digit, fitted to all the digits (+ 1e-3 I)."""
    from .data import digits

    return GaussianMixture.fit(*digits("all"), ridge=1e-3)
