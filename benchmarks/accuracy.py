"""Error per network evaluation on the digits mixture, diffusers' schedulers beside ``auto`` in the same run.

    python benchmarks/accuracy.py [--samples 512] [--out benchmarks/results/accuracy-digits-mixture.md]

VP with DDPM's linear betas from index 999 to 0, float64; the error is that to the exact ODE solution, the smaller
of that to the state at index 0 and to its denoised image. RMSE is over everything; the median is over samples of
each sample's RMSE. Evaluations are counted on the network. A peer's figure at each number of evaluations is the
best of all its settings there, chosen anew for RMSE and for the median; ``auto`` is one rule.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import fastsample as fs
from fastsample.zoo.mixture import digits_mixture

NFE = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)


def settings() -> Iterator[tuple[str, Callable[[], Any]]]:
    """diffusers' schedulers at the settings that people use."""
    base = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

    def make(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: getattr(diffusers, name)(**base, **options)

    plain = {"clip_sample": False, "set_alpha_to_one": False}
    yield "DDIM leading", make("DDIMScheduler", timestep_spacing="leading", **plain)
    yield "DDIM trailing", make("DDIMScheduler", timestep_spacing="trailing", **plain)
    yield "PNDM", make("PNDMScheduler", skip_prk_steps=True)
    yield "Euler", make("EulerDiscreteScheduler")
    yield "Euler Karras", make("EulerDiscreteScheduler", use_karras_sigmas=True)
    yield "Heun", make("HeunDiscreteScheduler")
    yield "LMS", make("LMSDiscreteScheduler")
    yield "DEIS 2", make("DEISMultistepScheduler", solver_order=2)
    yield "DEIS 3 Karras", make("DEISMultistepScheduler", solver_order=3, use_karras_sigmas=True)
    for order in (2, 3):
        name, multi = f"DPM++({order}M)", "DPMSolverMultistepScheduler"
        for spacing in ("linspace", "leading"):
            yield f"{name} {spacing}", make(multi, solver_order=order, timestep_spacing=spacing)
        end = {"final_sigmas_type": "sigma_min"}
        yield f"{name} leading sigma_min", make(multi, solver_order=order, timestep_spacing="leading", **end)
        yield f"{name} Karras", make(multi, solver_order=order, use_karras_sigmas=True)
        yield f"{name} Lu", make(multi, solver_order=order, use_lu_lambdas=True)
        for kind in ("bh1", "bh2"):
            yield (
                f"UniPC-{order} {kind}",
                make("UniPCMultistepScheduler", solver_order=order, solver_type=kind),
            )


def run_peer(scheduler: Any, steps: int, net: Callable[..., Tensor], noise: Tensor) -> tuple[Tensor, int]:
    """A scheduler's own loop; the result and the counted evaluations."""
    scheduler.set_timesteps(steps)
    x, calls = noise * scheduler.init_noise_sigma, 0
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        out = net(given.double(), t.double().expand(len(x)))
        calls += 1
        x = scheduler.step(out, t, x).prev_sample.double()
    return x, calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy-digits-mixture.md"))
    arguments = parser.parse_args()
    diffusers.logging.set_verbosity_error()

    denoiser = fs.zoo.load("digits-mixture")
    process = denoiser.process
    index = torch.arange(arguments.samples)
    noise = fs.noise.normal((arguments.samples, 1, 8, 8), 0, index, dtype=torch.float64)
    start = noise * float(process.sigma(process.t_start))
    exact = digits_mixture().reference(start, process)

    def errors(x: Tensor) -> tuple[float, float]:
        each = [(x - s).square().flatten(1).mean(1) for s in (exact.x, exact.x0)]
        return min(float(e.mean().sqrt()) for e in each), min(float(e.sqrt().median()) for e in each)

    best: dict[int, list[tuple[float, str]]] = {n: [(math.inf, ""), (math.inf, "")] for n in NFE}
    count = 0
    for name, make in settings():
        count += 1
        for nfe in NFE:
            steps = (nfe + 1) // 2 if name == "Heun" else nfe - 1 if name == "PNDM" else nfe
            x, calls = run_peer(make(), steps, denoiser.net, start)
            if calls > nfe:
                continue  # Heun takes odd numbers of evaluations only
            for i, error in enumerate(errors(x)):
                if error < best[nfe][i][0]:  # False for NaN
                    best[nfe][i] = (error, name)

    lines = [
        "# Error per evaluation on the digits mixture",
        "",
        f"{arguments.samples} samples, float64; exact solution to {exact.error:.0e}; diffusers "
        f"{diffusers.__version__}: the best of {count} settings at each budget; torch {torch.__version__}, "
        f"{platform.machine()}.",
        "",
        "| NFE | diffusers RMSE | setting | auto RMSE | ratio | diffusers median | setting | auto median | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    logs = []
    for nfe in NFE:
        sampler = fs.Sampler(denoiser, steps=nfe)
        assert sampler.plan.nfe == nfe
        cells = [str(nfe)]
        for (peer, name), ours in zip(best[nfe], errors(sampler(noise=noise)), strict=True):
            cells += [f"{peer:.4f}", name, f"**{ours:.4f}**", f"{ours / peer:.2f}"]
            logs.append(math.log(ours / peer))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Geometric mean of the ratios: {math.exp(sum(logs) / len(logs)):.2f}.", ""]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
