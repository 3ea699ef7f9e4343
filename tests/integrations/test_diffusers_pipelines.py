"""Pipelines of the real classes: the first-order plan is their own sampler, many steps agree with many steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor

import fastsample as fs
from fastsample.distill.student import Student
from fastsample.integrations.diffusers import PlanScheduler
from fastsample.integrations.schedules import read

LATENT = {"output_type": "latent", "height": 16, "width": 16}
LEADING = {"solver": "ddim", "grid": "leading", "end": "sigma_min", "options": {"offset": 1}}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def prompts(negative: bool = True, pooled: bool = False) -> dict[str, Tensor]:
    given = {"prompt_embeds": tiny.embeddings()}
    if negative:
        given["negative_prompt_embeds"] = tiny.embeddings(seed=21)
    if pooled:
        given["pooled_prompt_embeds"] = tiny.embeddings()[:, 0]
    if pooled and negative:
        given["negative_pooled_prompt_embeds"] = tiny.embeddings(seed=22)[:, 0]
    return given


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline: how it is made and called, and the plan that is its own first-order sampler."""

    make: Callable[[], Any]
    call: Callable[..., Any]
    first_order: dict[str, Any]
    rows: int  # network rows of one evaluation

    def run(self, pipe: Any, **more: Any) -> Tensor:
        out = self.call(pipe, generator=generator(), **more)
        return torch.as_tensor(out.frames if hasattr(out, "frames") else out.images)


def _image() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=generator())


KINDS = {
    "DDPM": Kind(
        tiny.ddpm,
        lambda p, **k: p(batch_size=2, output_type="np", **k),
        {"solver": "ddim", "grid": "leading", "end": "sigma_min"},
        2,
    ),
    "DiT": Kind(
        tiny.dit,
        lambda p, **k: p(class_labels=[1, 2], output_type="np", **k),
        {"solver": "ddim", "grid": "leading", "end": "sigma_min"},
        4,
    ),
    "SD v": Kind(
        lambda: tiny.sd(prediction="v_prediction"), lambda p, **k: p(**prompts(), **LATENT, **k), LEADING, 2
    ),
    "SD eps": Kind(tiny.sd, lambda p, **k: p(**prompts(), **LATENT, **k), LEADING, 2),
    "SDXL": Kind(tiny.sdxl, lambda p, **k: p(**prompts(pooled=True), **LATENT, **k), LEADING, 2),
    "ControlNet": Kind(
        tiny.controlnet, lambda p, **k: p(**prompts(), image=_image(), **LATENT, **k), LEADING, 2
    ),
    "SD3": Kind(tiny.sd3, lambda p, **k: p(**prompts(pooled=True), **LATENT, **k), {"solver": "euler"}, 2),
    "Flux": Kind(
        tiny.flux,
        lambda p, **k: p(**prompts(negative=False, pooled=True), **LATENT, **k),
        {"solver": "euler", "grid": "uniform"},
        1,
    ),
    "Qwen-Image": Kind(
        tiny.qwen,
        lambda p, **k: p(
            **prompts(negative=False), prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long), **LATENT, **k
        ),
        {"solver": "euler", "grid": "uniform"},
        1,
    ),
    "CogVideoX": Kind(
        tiny.cogvideox,
        lambda p, **k: p(**prompts(), num_frames=5, **LATENT, **k),
        {"solver": "ddim", "grid": "trailing"},
        2,
    ),
    "Wan": Kind(tiny.wan, lambda p, **k: p(**prompts(), num_frames=5, **LATENT, **k), {"solver": "euler"}, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_first_order_plan_is_the_pipelines_own_sampler(name: str) -> None:
    kind = KINDS[name]
    pipe = kind.make()
    if name == "Wan":  # whose own scheduler has no first-order form: Euler on the same flow
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = kind.run(pipe, num_inference_steps=5)
    settings = dict(kind.first_order)
    if "grid" not in settings:  # diffusers shifts these sigmas twice: take them as they are
        settings["grid"] = pipe.scheduler.sigmas.double().tolist()
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, **settings)
    ours = kind.run(pipe, num_inference_steps=5)
    assert float((ours - theirs).abs().max()) < 1e-4 * max(1.0, float(theirs.abs().max()))
    assert not torch.equal(ours, torch.zeros_like(ours))


@pytest.mark.parametrize("name", ["DDPM", "DiT", "SD v", "SD3", "Flux", "Qwen-Image", "CogVideoX", "Wan"])
def test_many_steps_of_theirs_agree_with_many_of_ours(name: str) -> None:
    """Random networks are rough in time, so convergence has no clean order; it has to go to the same image."""
    kind = KINDS[name]
    pipe = kind.make()
    if name == "Wan":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    few, many = (kind.run(pipe, num_inference_steps=n) for n in (8, 100))
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config)
    ours = kind.run(pipe, num_inference_steps=100)
    assert float((many - ours).abs().mean()) < 0.03 * float(ours.abs().mean())
    assert float((many - ours).abs().mean()) < 0.5 * float((few - ours).abs().mean())


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_in_place_and_back(name: str) -> None:
    kind = KINDS[name]
    pipe = kind.make()
    scheduler, cls = pipe.scheduler, type(pipe)
    before = kind.run(pipe, num_inference_steps=4)
    handle = fs.accelerate(pipe, steps=4)
    fast = kind.run(pipe)  # no number in the call: 4
    assert (handle.evaluations, handle.rows) == (4, 4 * kind.rows) or name == "Wan"
    assert handle.plan is not None
    assert handle.plan.nfe == 4
    assert "4 steps" in str(handle)
    assert bool(torch.isfinite(fast).all())
    kind.run(pipe, num_inference_steps=3)  # a number in the call wins
    assert handle.plan.nfe == 3
    assert isinstance(pipe, cls)
    handle.undo()
    assert pipe.scheduler is scheduler
    assert type(pipe) is cls
    torch.testing.assert_close(kind.run(pipe, num_inference_steps=4), before)


def test_fewer_steps_are_nearer_to_the_converged_image() -> None:
    kind = KINDS["SD v"]
    pipe = kind.make()
    converged = kind.run(pipe, num_inference_steps=200)
    theirs = kind.run(pipe, num_inference_steps=8)
    fs.accelerate(pipe, steps=8)
    ours = kind.run(pipe)
    assert float((ours - converged).abs().mean()) < 0.35 * float((theirs - converged).abs().mean())


# -- beginning in the middle ----------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.4, 0.75, 1.0])
def test_image_to_image(strength: float) -> None:
    pipe = tiny.sd("StableDiffusionImg2ImgPipeline", "v_prediction")

    def run(steps: int) -> Tensor:
        out = pipe(
            **prompts(),
            image=_image(),
            strength=strength,
            num_inference_steps=steps,
            generator=generator(),
            output_type="latent",
        )
        return torch.as_tensor(out.images)

    theirs = run(10)
    original = pipe.scheduler
    pipe.scheduler = PlanScheduler.from_config(original.config, **LEADING)
    assert float((run(10) - theirs).abs().max()) < 1e-4
    pipe.scheduler = PlanScheduler.from_config(original.config)
    assert bool(torch.isfinite(run(10)).all())
    assert pipe.scheduler.step_index == 10


def test_a_run_from_the_middle_is_the_plan_of_the_rest_of_the_grid() -> None:
    scheduler = PlanScheduler.from_config(tiny.scheduler_of("v_prediction").config)
    scheduler.set_timesteps(8)
    plan = scheduler.plan
    scheduler.set_begin_index(3)
    x = torch.randn(2, 3, generator=generator())
    state = x
    for t in scheduler.timesteps[3:]:
        state = scheduler.step(torch.tanh(state) + t / 1000, t, state).prev_sample

    def net(y: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(y) + (t / 1000).to(y.dtype)[:, None]

    process = read(tiny.scheduler_of().config).process
    rest = fs.Sampler(fs.wrap(net, process, "v"), plan.solver, grid=list(plan.grid[3:]), **plan.options)
    torch.testing.assert_close(state, rest(x=x), rtol=1e-5, atol=1e-5)


def test_inpainting() -> None:
    pipe = tiny.sd("StableDiffusionInpaintPipeline", "v_prediction")
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1

    def run() -> Tensor:
        out = pipe(
            **prompts(),
            image=_image() * 2 - 1,
            mask_image=mask,
            height=16,
            width=16,
            strength=1.0,
            num_inference_steps=10,
            generator=generator(),
            output_type="latent",
        )
        return torch.as_tensor(out.images)

    theirs = run()
    original = pipe.scheduler
    pipe.scheduler = PlanScheduler.from_config(original.config, **LEADING)
    assert float((run() - theirs).abs().max()) < 1e-4
    pipe.scheduler = PlanScheduler.from_config(original.config)
    ours = run()
    torch.testing.assert_close(ours[..., :4], theirs[..., :4], rtol=1e-3, atol=1e-3)  # what is known stays
    assert float((ours[..., 4:] - theirs[..., 4:]).abs().max()) > 1e-3


def test_flow_image_to_image() -> None:
    pipe = tiny.sd3("StableDiffusion3Img2ImgPipeline")

    def run() -> Tensor:
        out = pipe(
            **prompts(pooled=True),
            image=_image(),
            strength=0.6,
            num_inference_steps=10,
            generator=generator(),
            output_type="latent",
            height=16,
            width=16,
        )
        return torch.as_tensor(out.images)

    theirs = run()
    grid = pipe.scheduler.sigmas.double().tolist()
    original = pipe.scheduler
    pipe.scheduler = PlanScheduler.from_config(original.config, solver="euler", grid=grid)
    assert float((run() - theirs).abs().max()) < 1e-4
    pipe.scheduler = PlanScheduler.from_config(original.config)
    assert bool(torch.isfinite(run()).all())


def test_solvers_that_cannot_begin_in_the_middle_say_so() -> None:
    scheduler = PlanScheduler.from_config(tiny.scheduler_of().config, solver="heun")
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="cannot begin at its evaluation 2 of 7"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[2], torch.zeros(1, 2))


# -- the scheduler itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "dpmpp_2m", "unipc", "heun", "pndm", "ddpm", "dpmpp_2m_sde"])
@pytest.mark.parametrize("skip_start", [False, True])
def test_it_runs_the_plan(solver: str, skip_start: bool) -> None:
    """Step by step it gives what the executor gives."""
    options = {"skip_start": skip_start} if solver == "auto" else {}
    scheduler = PlanScheduler.from_config(
        tiny.scheduler_of("v_prediction").config, solver=solver, options=options or None
    )
    scheduler.set_timesteps(6)
    process = read(tiny.scheduler_of().config).process

    def net(y: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(y) * (1 + (t / 1000).to(y.dtype)[:, None])

    z = torch.randn(3, 5, generator=generator())
    if scheduler.plan.stochastic:
        noises: dict[int, Tensor] = {}
        draws = generator()
    state = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, t)
        out = net(seen, torch.full((3,), float(t)))
        extra = {"generator": draws} if scheduler.plan.stochastic else {}
        state = scheduler.step(out, t, state, **extra, return_dict=False)[0]
    sampler = fs.Sampler(fs.wrap(net, process, "v"), plan=scheduler.plan)
    if scheduler.plan.stochastic:
        again = generator()
        order = [s for row in scheduler.plan.rows for s in row.noises]
        for s in dict.fromkeys(order):
            noises[s] = torch.randn(3, 5, generator=again)
        from fastsample.executor import Run, execute

        bound = sampler.denoiser.bind(3, {}, torch.device("cpu"))
        expected = execute(scheduler.plan, z.clone(), Run(bound, lambda s, like: noises[s]))
    else:
        expected = sampler(x=z.clone())
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="all done"):
        scheduler.step(out, t, state)


def test_half_precision_states_stay_float32_inside() -> None:
    """With a half-precision pipeline the result is that of float32 states, rounded once at the network."""
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        scheduler = PlanScheduler.from_config(tiny.scheduler_of("v_prediction").config, solver="ddim")
        scheduler.set_timesteps(200)
        state = torch.linspace(-1, 1, 64).to(dtype)[None]
        for t in scheduler.timesteps:
            state = scheduler.step(torch.zeros_like(state), t, state).prev_sample
        assert state.dtype == dtype
        results[dtype] = state.double()
    start = torch.linspace(-1, 1, 64).to(torch.bfloat16).double()
    exact = results[torch.float64]
    rounding = float((start[None] - torch.linspace(-1, 1, 64).double()).abs().max())
    assert float((results[torch.bfloat16] - exact).abs().max()) < 3 * rounding


def test_saved_and_loaded(tmp_path: Any) -> None:
    pipe = tiny.ddpm()
    pipe.scheduler = PlanScheduler.from_config(
        pipe.scheduler.config, solver="exp_adams", grid="karras", options={"order": 2, "rho": 5.0}
    )
    pipe.scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    pipe.scheduler.set_timesteps(5)
    again.set_timesteps(5)
    assert again.plan == pipe.scheduler.plan
    assert again.config.num_train_timesteps == 1000
    third = PlanScheduler.from_config(again.config, solver="ddim", grid=None, options=None)
    third.set_timesteps(5)
    assert third.plan.solver == "ddim"


def test_a_plan_of_ones_own() -> None:
    pipe = tiny.sd(prediction="v_prediction")
    denoiser = fs.wrap(pipe)
    plan = fs.Sampler(denoiser, "dpmpp_2m", 5).plan
    handle = fs.accelerate(pipe, plan=plan)
    KINDS["SD v"].run(pipe)
    assert handle.plan == plan
    with pytest.raises(ValueError, match="the plan has 5 evaluations"):
        KINDS["SD v"].run(pipe, num_inference_steps=7)


@pytest.mark.parametrize("from_file", [False, True])
def test_a_students_network_in_a_pipeline(from_file: bool, tmp_path: Path) -> None:
    """Exported and put into the pipeline, it gives the student's own samples in one evaluation."""
    pipe = tiny.ddpm()
    x = torch.rand(8, 3, 8, 8, generator=generator()) * 2 - 1
    trainer = fs.distill.Trainer(
        fs.distill.Consistency(fs.wrap(pipe)), x, steps=2, batch_size=4, device="cpu"
    )
    student = trainer.fit(tmp_path / "student")
    folder = student.export_diffusers(tmp_path / "exported")
    pipe.unet = diffusers.UNet2DModel.from_pretrained(folder)
    handle = fs.accelerate(pipe, plan=folder / "plan-1.json" if from_file else student.plan(1))
    made = pipe(batch_size=2, output_type="np", generator=generator()).images
    assert handle.evaluations == 1
    own = student(noise=torch.randn(2, 3, 8, 8, generator=generator()), steps=1)
    expected = (own / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.as_tensor(made), expected, rtol=0, atol=2e-4)
    fs.accelerate(pipe, plan=student.plan(4))
    pipe(batch_size=2, output_type="np", generator=generator())
    told = fs.solvers.build("shortcut", fs.VP.linear(), 2, prediction="eps")
    with pytest.raises(ValueError, match="tells the network its step, which a pipeline cannot"):
        fs.accelerate(pipe, plan=told)


def test_one_object_a_run_is_safe_in_threads() -> None:
    kind = KINDS["SD v"]
    config = kind.make().scheduler.config
    expected = [kind.run(_with(kind, config), num_inference_steps=n) for n in (4, 7)]
    pipes = [_with(kind, config) for _ in range(2)]
    found: dict[int, Tensor] = {}

    def work(i: int, n: int) -> None:
        found[i] = kind.run(pipes[i], num_inference_steps=n)

    threads = [threading.Thread(target=work, args=(i, n)) for i, n in enumerate((4, 7))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(expected):
        torch.testing.assert_close(found[i], x)


def _with(kind: Kind, config: Any) -> Any:
    pipe = kind.make()
    pipe.scheduler = PlanScheduler.from_config(config)
    return pipe


def test_times_and_sigmas_that_are_given() -> None:
    scheduler = PlanScheduler.from_config(tiny.scheduler_of().config, solver="ddim")
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    process = read(tiny.scheduler_of().config).process
    scheduler.set_timesteps(sigmas=[10.0, 2.0, 0.5, 0.0])
    torch.testing.assert_close(
        process.rho(scheduler.timesteps.double()), torch.tensor([10.0, 2.0, 0.5]).double(), rtol=1e-4, atol=0
    )
    assert scheduler.sigmas[-1] == 0
    flow = PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    flow.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    peer.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    torch.testing.assert_close(flow.timesteps, peer.timesteps)
    torch.testing.assert_close(flow.sigmas, peer.sigmas)
    with pytest.raises(ValueError, match="not both"):
        scheduler.set_timesteps(timesteps=[1], sigmas=[1.0])


def test_noise_is_added_as_theirs() -> None:
    x, z = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    t = torch.tensor([10, 500, 900])
    theirs = tiny.scheduler_of()
    ours = PlanScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.add_noise(x, z, t), theirs.add_noise(x, z, t), rtol=1e-4, atol=1e-4)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    mine = PlanScheduler.from_config(flow.config)
    some = flow.timesteps[[2, 5, 8]]
    torch.testing.assert_close(
        mine.scale_noise(x, some, z), flow.scale_noise(x, some, z), rtol=1e-5, atol=1e-5
    )


def test_clipping_and_thresholding_are_the_schedulers_own() -> None:
    out, x = (5 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for settings in ({"clip_sample": True}, {"clip_sample": False, "thresholding": True}):
        theirs = diffusers.DDIMScheduler(set_alpha_to_one=False, **settings)
        ours = PlanScheduler.from_config(theirs.config, solver="ddim", grid="leading", end="sigma_min")
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(10)
        a = theirs.step(out, theirs.timesteps[0], x, use_clipped_model_output=True).prev_sample
        b = ours.step(out, ours.timesteps[0], x).prev_sample
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- pipelines as denoisers -----------------------------------------------------------------------------


def test_wrap_reads_the_pipeline() -> None:
    denoiser = fs.wrap(tiny.ddpm())
    assert (denoiser.process, denoiser.prediction) == (fs.VP.linear(), "eps")
    assert denoiser.sample_shape == (3, 8, 8)
    assert fs.Sampler(denoiser, steps=4)(n=2).shape == (2, 3, 8, 8)
    dit = fs.wrap(tiny.dit())
    assert dit.learned_variance
    labels = torch.tensor([3, 4])
    assert fs.Sampler(dit, steps=3)(n=2, class_labels=labels).shape == (2, 4, 8, 8)
    v = fs.wrap(tiny.sd(prediction="v_prediction"))
    assert v.prediction == "v"
    assert v.process == fs.VP.scaled_linear()
    x = fs.Sampler(v, steps=3)(n=2, encoder_hidden_states=tiny.embeddings(2))
    assert x.shape == (2, 4, 8, 8)
    sd3 = fs.wrap(tiny.sd3())
    assert isinstance(sd3.process, fs.Flow)
    assert sd3.process.shift == 3.0
    guided = fs.wrap(
        tiny.sd(prediction="v_prediction"),
        guidance=fs.Guidance(3.0, null={"encoder_hidden_states": torch.zeros(1, 6, 12)}),
    )
    assert fs.Sampler(guided, steps=3)(n=2, encoder_hidden_states=tiny.embeddings(2)).shape == (2, 4, 8, 8)


def test_a_wrapped_flow_pipeline_samples_as_the_pipeline_does() -> None:
    pipe = tiny.sd3()
    kind = KINDS["SD3"]
    theirs = kind.run(pipe, num_inference_steps=5, guidance_scale=1.0)
    noise = torch.randn(1, 4, 8, 8, generator=generator())
    grid = pipe.scheduler.sigmas.double().tolist()
    ours = fs.Sampler(fs.wrap(pipe), "euler", grid=grid)(
        noise=noise,
        encoder_hidden_states=tiny.embeddings(),
        pooled_projections=tiny.embeddings()[:, 0],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# -- what cannot be done says so ------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        fs.accelerate(tiny.sd(), solver="dpmpp2m")
    pipe = tiny.sd()
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="has no option 'ordr'"):
        fs.accelerate(pipe, solver="exp_adams", ordr=3)
    assert pipe.scheduler is scheduler  # nothing half-done
    for nothing in (object(), fs.wrap(lambda x, t: x, fs.Flow(), "flow")):
        with pytest.raises(TypeError, match=r"give a diffusers pipeline .* or a student or denoiser of one"):
            fs.accelerate(nothing)
    with pytest.raises(ValueError, match="plan= is for pipelines"):
        fs.accelerate(pipe.unet, plan=fs.solvers.build("ddim", fs.VP.linear(), 2))
    with pytest.raises(ValueError, match="was not accelerated"):
        fs.unaccelerate(pipe)
    edm = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match=r"neither betas nor flow sigmas; say what.*fastsample\.wrap"):
        PlanScheduler.from_config(edm.config)
    with pytest.raises(ValueError, match="solvr= is not understood"):
        PlanScheduler.from_config(scheduler.config, solvr="ddim")
    ours = PlanScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="set_timesteps first"):
        ours.step(torch.zeros(1, 2), 0, torch.zeros(1, 2))
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match=r"eta=0\.5: give it to the solver"):
        ours.step(torch.zeros(1, 2), 0, torch.zeros(1, 2), eta=0.5)
    flux = PlanScheduler.from_config(tiny.flux().scheduler.config)
    with pytest.raises(ValueError, match="give mu="):
        flux.set_timesteps(4)
    with pytest.raises(ValueError, match="squaredcos"):
        read({"beta_schedule": "squaredcos"})
    with pytest.raises(ValueError, match="prediction_type='noise'"):
        read({"beta_schedule": "linear", "prediction_type": "noise"})


def test_kernels_and_solver_are_separate_choices() -> None:
    kind = KINDS["SD v"]
    pipe = kind.make()
    scheduler = pipe.scheduler
    before = kind.run(pipe, num_inference_steps=3)
    handle = fs.accelerate(pipe, solver=None, steps=None, kernels=True)
    assert pipe.scheduler is scheduler
    assert "group_norm + silu" in str(handle)
    torch.testing.assert_close(kind.run(pipe, num_inference_steps=3), before)
    handle.undo()
    assert not any(hasattr(type(m), "_fastsample_base") for m in pipe.unet.modules())
    with pytest.raises(ValueError, match="give kernels=True"):
        fs.accelerate(pipe, attention=True)
    handle = fs.accelerate(pipe, solver=None, steps=None, kernels=True, attention=True)
    assert "attention" in {*handle.kernels.replaced.values()}
    torch.testing.assert_close(kind.run(pipe, num_inference_steps=3), before)
    network = fs.accelerate(pipe.unet)
    assert network.kernels.replaced
    assert "attention" not in {*network.kernels.replaced.values()}
    assert "attention" in {*fs.accelerate(pipe.unet, attention=True).kernels.replaced.values()}
    fs.unaccelerate(pipe.unet)
    assert not any(hasattr(type(m), "_fastsample_base") for m in pipe.unet.modules())


@pytest.mark.parametrize("kind", ["student", "student with an adapter", "sampler", "denoiser"])
def test_the_network_of_a_student_gets_the_kernels(kind: str, tmp_path: Path) -> None:
    denoiser = fs.zoo.load("digits")
    if "adapter" in kind:
        method = fs.distill.Shortcut(denoiser)
        denoiser = method.denoiser().replace(net=method.nets["student"].eval().requires_grad_(False))
    student = Student(denoiser, "shortcut" if "adapter" in kind else "consistency")
    given = {"sampler": student.sampler(2), "denoiser": denoiser}.get(kind, student)
    before = student(n=2, seed=0, steps=2, labels=[1, 2])
    handle = fs.accelerate(given)
    assert handle.kernels.replaced
    torch.testing.assert_close(student(n=2, seed=0, steps=2, labels=[1, 2]), before)
    loaded = fs.load(student.save(tmp_path))  # a patched network is saved as it was
    torch.testing.assert_close(loaded(n=2, seed=0, steps=2, labels=[1, 2]), before, rtol=0, atol=1e-3)
    fs.unaccelerate(given)
    with pytest.raises(ValueError, match="was not accelerated"):
        fs.unaccelerate(given)
