"""LCM against explicit DDIM steps and diffusers' own; LoRA students of any method."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distill import SHAPE, text_unet, tiny_teacher
from torch import Tensor, nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.adapters import Conditioned
from fastsample.distill.batch import Batch
from fastsample.distill.prediction import predict
from fastsample.distill.student import _embedded
from fastsample.zoo.data import digits

VP = fs.VP.linear()
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


class Labelled(nn.Module):
    """eps of x, t and a class, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.1 * torch.randn(64, 64, generator=generator, dtype=torch.float64))
        self.classes = nn.Parameter(torch.randn(4, 64, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = torch.tanh(x.flatten(1) @ self.weight + self.classes[labels] + torch.sin(t)[:, None])
        return out.reshape(x.shape)


def labelled(scale: float = 2.0, **settings: Any) -> fs.Denoiser:
    guidance = fs.Guidance(scale, null={"labels": 3}, **settings)
    return fs.wrap(Labelled(), VP, "eps", guidance=guidance, dtype=torch.float64, sample_shape=SHAPE)


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_target_is_a_guided_ddim_step() -> None:
    """``z + (1 + w) Psi(c) - w Psi(null)`` with Psi of eq. 15, written out with the schedule's own table."""
    teacher = labelled()
    method = distill.LCM(teacher, prediction="eps", w_min=2.0, w_max=2.0)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x, labels = noise(3), torch.tensor([0, 1, 2])
    high, low, w = [999, 519, 19], [979, 499, 0], torch.tensor([2.0, 7.5, 14.0], dtype=torch.float64)
    expected = []
    for i in range(3):
        z, a, b = x[i : i + 1], bar[high[i]].sqrt(), bar[low[i]].sqrt()
        sa, sb = (1 - bar[high[i]]).sqrt(), (1 - bar[low[i]]).sqrt()

        def psi(
            label: int, z: Tensor = z, a: Any = a, b: Any = b, sa: Any = sa, sb: Any = sb, i: int = i
        ) -> Tensor:
            eps = teacher.net(z, torch.tensor([float(high[i])], dtype=torch.float64), torch.tensor([label]))
            return b / a * z - sb * (sa * b / (a * sb) - 1) * eps - z

        expected.append(z + (1 + w[i]) * psi(int(labels[i])) - w[i] * psi(3))
    t, s = (torch.tensor(v, dtype=torch.float64) for v in (high, low))
    got = method.step(x, t, s, w, {"labels": labels})
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_the_loss_asks_for_that_target() -> None:
    """The whole loss, from the paper's words, at the times that it may draw."""
    method = distill.LCM(labelled(), prediction="eps", w_min=3.0, w_max=3.0, space="x0", skip=20, substeps=1)
    x, labels = noise(50).clamp(-1, 1), torch.arange(50) % 3
    batch = Batch.of(x, labels=labels)
    asked: list[Tensor] = []
    step = method.step

    def listening(x: Tensor, t: Tensor, s: Tensor, w: Tensor, conditions: Any) -> Tensor:
        asked.append(torch.stack([t, s]))
        assert w.tolist() == [3.0] * 50
        return step(x, t, s, w, conditions)

    method.step = listening  # type: ignore[method-assign]
    loss = method.loss(batch)
    t, s = asked[0]
    assert sorted(t.tolist()) == [20 * n - 1 for n in range(1, 51)]  # stratified: each of the 50 once
    assert torch.equal(s, (t - 20).clamp(min=0))

    def f(x: Tensor, t: Tensor) -> Tensor:
        bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t.long()]
        a, sigma = (v.sqrt().reshape(-1, 1, 1, 1) for v in (bar, 1 - bar))
        u = 10 * t.reshape(-1, 1, 1, 1)
        x0 = (x - sigma * method.nets["student"](x, t, labels)) / a
        return 0.25 / (u**2 + 0.25) * x + u / (u**2 + 0.25).sqrt() * x0

    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t.long()]
    x_t = bar.sqrt().reshape(-1, 1, 1, 1) * x + (1 - bar).sqrt().reshape(-1, 1, 1, 1) * batch.normal("eps")
    before = step(x_t, t, s, torch.full((50,), 3.0, dtype=torch.float64), {"labels": labels})
    expected = (f(x_t, t) - f(before, s)).flatten(1).square().mean(dim=1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("substeps", [1, 3, 4])
def test_a_link_is_as_many_ddim_steps_of_whole_training_times(substeps: int) -> None:
    method = distill.LCM(labelled(), prediction="eps", w_min=3.0, w_max=3.0, skip=125, substeps=substeps)
    asked: list[tuple[Tensor, Tensor]] = []
    step = method.step

    def listening(x: Tensor, t: Tensor, s: Tensor, w: Tensor, conditions: Any) -> Tensor:
        asked.append((t, s))
        return step(x, t, s, w, conditions)

    method.step = listening  # type: ignore[method-assign]
    batch = Batch.of(noise(8).clamp(-1, 1), labels=torch.arange(8) % 3)
    method.loss(batch)
    n = torch.arange(1, 9, dtype=torch.float64) * 125 - 1  # stratified: each link once
    times = [asked[0][0], *(s for _, s in asked)]
    assert len(asked) == substeps
    assert torch.equal(times[0], n)
    assert torch.equal(times[-1], (n - 125).clamp(min=0))
    for (_, low), (high, _) in itertools.pairwise(asked):
        assert torch.equal(low, high)
    widths = [float((a - b)[-1]) for a, b in itertools.pairwise(times)]
    assert all(w == round(w) for w in widths)
    assert max(widths) - min(widths) <= 1


def test_every_link_of_the_chain_weighs_the_same() -> None:
    """The first one alone ties the student to the teacher; in x0 it weighs less than a hundredth of the last."""

    class Shifted(Labelled):
        shift = 0.0

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, t, labels) + self.shift

    def curvature(**settings: Any) -> Tensor:
        method = distill.LCM(
            labelled().replace(net=Shifted()),
            prediction="v",
            convert=0,
            w_max=2.0,
            skip=20,
            substeps=1,
            **settings,
        )
        net: Any = method.nets["student"]
        losses = []
        for net.shift in (-0.1, 0.0, 0.1):
            losses.append(method.loss(Batch.of(noise(50).clamp(-1, 1), labels=torch.arange(50) % 3)).detach())
        return (losses[0] + losses[2] - 2 * losses[1]) / 0.1**2

    torch.testing.assert_close(curvature(), torch.full((50,), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)
    found = curvature(space="x0")
    assert float(found.max()) > 100 * float(found.min())


def test_guidance_within_an_interval_and_without() -> None:
    x, labels = noise(2), torch.tensor([0, 1])
    t, s = torch.tensor([999.0, 99.0], dtype=torch.float64), torch.tensor([979.0, 79.0], dtype=torch.float64)
    w = torch.tensor([5.0, 5.0], dtype=torch.float64)
    steps = [
        distill.LCM(labelled(**interval), prediction="eps", w_max=2.0).step(x, t, s, w, {"labels": labels})
        for interval in ({}, {"interval": (0.0, 1.0)})
    ]
    assert torch.equal(steps[0][1], steps[1][1])
    assert not torch.allclose(steps[0][0], steps[1][0])
    plain = distill.LCM(labelled().replace(guidance=None), prediction="eps").step(
        x, t, s, w, {"labels": labels}
    )
    assert torch.equal(plain[0], steps[1][0])
    with pytest.raises(ValueError, match=r"guidance.rescale=0\.7"):
        distill.LCM(labelled(rescale=0.7))


def test_training_and_sampling_are_one_function() -> None:
    method = distill.LCM(labelled(), prediction="eps", w_min=2.0, w_max=2.0)
    x = noise(2)
    t = torch.full((2,), 999.0, dtype=torch.float64)
    state = float(VP.sigma(999)) * x
    expected = method.end(method.denoiser(), state, t, {"labels": torch.tensor([0, 1])})
    got = fs.Sampler(method.denoiser(), plan=method.plan(1))(noise=x, labels=[0, 1])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"skip": 20}])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampling_times_are_those_of_diffusers(steps: int, settings: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    method = distill.LCM(labelled(), prediction="eps", w_max=2.0, **settings)
    scheduler = diffusers.LCMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        original_inference_steps=1000 // settings.get("skip", 125),
    )
    scheduler.set_timesteps(steps)
    assert method.solver_options["grids"][str(steps)] == [*map(float, scheduler.timesteps), -1.0]


def test_guidance_is_told_by_an_adapter_that_starts_at_nothing() -> None:
    """At first the student is its teacher whatever scale it is told; trained, it tells scales apart; it is saved."""
    teacher = fs.zoo.load("digits").guided(3.0, null={"labels": 10})
    method = distill.LCM(teacher, prediction="eps")
    net = method.nets["student"].eval()
    assert isinstance(net, Conditioned)
    assert method.denoiser().conditions == {"guidance": 9.0}
    x, t, labels = noise(3).float(), torch.tensor([900.0, 400.0, 19.0]), torch.tensor([1, 2, 3])
    expected = teacher.net(x, t, labels)
    for scale in (3.0, 15.0, torch.tensor([3.0, 7.5, 15.0])):
        torch.testing.assert_close(net(x, t, labels=labels, guidance=scale), expected)
    nn.init.normal_(net.adapter[2].weight, std=0.1)  # type: ignore[arg-type]
    each = net(x, t, labels=labels, guidance=torch.tensor([3.0, 7.5, 15.0]))
    for i, scale in enumerate((3.0, 7.5, 15.0)):
        torch.testing.assert_close(net(x, t, labels=labels, guidance=scale)[i], each[i])
    assert not torch.allclose(each, expected)


def test_an_lcm_student_is_sampled_at_any_scale(tmp_path: Path) -> None:
    teacher = fs.zoo.load("digits").guided(3.0, null={"labels": 10})
    trainer = distill.Trainer(
        distill.LCM(teacher, convert=0), "digits", steps=3, batch_size=8, warmup=1, device="cpu"
    )
    student = trainer.fit(tmp_path)
    nn.init.normal_(student.denoiser.net.adapter[2].weight)  # type: ignore[attr-defined]
    student.save(tmp_path)
    loaded = fs.load(tmp_path)
    made = {g: loaded(n=2, seed=0, steps=2, labels=[1, 2], guidance=g) for g in (3.0, 9.0)}
    assert not torch.allclose(made[3.0], made[9.0])
    assert torch.equal(loaded(n=2, seed=0, steps=2, labels=[1, 2]), made[9.0])  # the middle
    torch.testing.assert_close(student(n=2, seed=0, steps=2, labels=[1, 2], guidance=3.0), made[3.0])


def test_a_networks_own_argument_is_used() -> None:
    class Own(Labelled):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None = None) -> Tensor:
            out = super().forward(x, t, labels)
            return out if guidance is None else out * guidance.reshape(-1, 1, 1, 1)

    teacher = labelled().replace(net=Own())
    method = distill.LCM(teacher, prediction="eps")
    assert isinstance(method.nets["student"], Own)
    assert bool(torch.isfinite(method.loss(Batch.of(noise(4), labels=torch.arange(4) % 3))).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_min": 3.0, "w_max": 2.0}, "w_min=3.0, w_max=2.0"),
        ({"skip": 0}, "skip=0"),
        ({"skip": 2, "substeps": 3}, "substeps=3, skip=2"),
        ({"skip": 1000}, "skip=1000"),
        ({"metric": "l3"}, "metric='l3'"),
        ({"space": "eps"}, "space='eps'"),
        ({"target_decay": 1.0}, "target_decay=1.0"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill.LCM(labelled(), **settings)


# -- LoRA ----------------------------------------------------------------------------------------------------

LORA = {"r": 4, "target_modules": ["conv1", "qkv", "emb"]}


def state_of(net: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


@needs_peft
@pytest.mark.parametrize("name", ["lcm", "dmd2", "shortcut", "ect", "progressive"])
def test_any_method_trains_a_lora_student(name: str, tmp_path: Path) -> None:
    """Only the matrices (and the adapter) are trained; the base is the teacher's, bit for bit as it was."""
    teacher = fs.zoo.load("digits").guided(2.0, null={"labels": 10})
    before, base = state_of(teacher.net), {id(p) for p in teacher.net.parameters()}  # type: ignore[attr-defined]
    kind = getattr(distill, distill.METHODS[name][1])
    method = kind(teacher, lora=LORA)
    assert method.prediction == "eps"
    x, labels = digits("train")
    start = method.predict(
        "student", x[:4], torch.full((4,), 500.0).double(), Batch.of(x[:4], labels=labels[:4])
    )
    plain = predict(
        teacher.replace(guidance=None), x[:4], torch.full((4,), 500.0).double(), {"labels": labels[:4]}
    )
    method.nets["student"].eval()
    if name != "shortcut":
        again = method.predict(
            "student", x[:4], torch.full((4,), 500.0).double(), Batch.of(x[:4], labels=labels[:4])
        )
        torch.testing.assert_close(again, plain)
    assert start.shape == plain.shape
    trainer = distill.Trainer(
        method, "digits", steps=4, batch_size=8, warmup=1, save_every=2, ema=[0.5], device="cpu"
    )
    student = trainer.fit(tmp_path)
    net: Any = student.denoiser.net
    assert base < {id(p) for p in net.parameters()}
    assert all(torch.equal(v, before[k]) for k, v in teacher.net.state_dict().items())  # type: ignore[attr-defined]
    assert all(not p.requires_grad and p.grad is None for p in teacher.net.parameters())  # type: ignore[attr-defined]
    trained = [v for k, v in net.state_dict().items() if "lora_B" in k]
    assert trained
    assert any(bool(v.abs().sum() > 0) for v in trained)
    state = torch.load(tmp_path / "checkpoints" / "00000004" / "state.pt", weights_only=True)
    for kept in (*state["nets"].values(), *state["ema"].values()):
        assert kept
        assert all("lora_" in k or k.startswith(("adapter.", "head.")) for k in kept), list(kept)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == set(state["ema"]["0.5"])
    assert sum(v.numel() for v in saved.values()) < 0.25 * sum(v.numel() for v in before.values())


@needs_peft
def test_lora_students_are_loaded_on_their_teacher(tmp_path: Path) -> None:
    teacher = fs.zoo.load("digits")
    method = distill.LCM(teacher, lora=LORA)
    settings: dict[str, Any] = {"steps": 4, "batch_size": 8, "warmup": 1, "device": "cpu"}
    student = distill.Trainer(method, "digits", **settings).fit(tmp_path)
    made = student(n=2, seed=0, steps=2, labels=[1, 2])
    assert not torch.allclose(made, fs.Sampler(teacher, plan=student.plan(2))(n=2, seed=0, labels=[1, 2]))
    other = fs.zoo.load("digits")
    for loaded in (fs.load(tmp_path, other), fs.load(tmp_path, other.net), fs.load(tmp_path)):
        assert torch.equal(loaded(n=2, seed=0, steps=2, labels=[1, 2]), made)
    shared = {p.data_ptr() for p in other.net.parameters()}  # type: ignore[attr-defined]
    net: Any = fs.load(tmp_path, other).denoiser.net
    assert shared < {p.data_ptr() for p in net.parameters()}
    # a student of the same settings resumes, and what is saved again is the same file
    (tmp_path / "manifest.json").unlink()
    again = distill.Trainer(distill.LCM(teacher, lora=LORA), "digits", **settings).fit(tmp_path, resume=True)
    assert torch.equal(again(n=2, seed=0, steps=2, labels=[1, 2]), made)
    content = (tmp_path / "model.safetensors").read_bytes()
    fs.load(tmp_path).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == content
    with torch.no_grad():
        next(iter(other.net.parameters())).add_(0.1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="LoRA matrices on other weights"):
        fs.load(tmp_path, other)
    with pytest.raises(ValueError, match="device='meta', but the LoRA student's base is on cpu"):
        fs.load(tmp_path, device="meta")


@needs_peft
def test_lora_start_does_not_depend_on_what_was_drawn_before() -> None:
    teacher = fs.zoo.load("digits")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        method = distill.LCM(teacher, lora=LORA)
        assert torch.equal(torch.rand(3), drawn)  # and draws nothing itself
        states.append(state_of(method.nets["student"]))
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@needs_peft
def test_wrong_lora_options_are_named() -> None:
    teacher = fs.zoo.load("digits")
    with pytest.raises(ValueError, match=r"lora=.*'nowhere'"):
        distill.ECT(teacher, lora={"r": 4, "target_modules": ["nowhere"]})
    with pytest.raises(ValueError, match=r"lora=.*rank"):
        distill.ECT(teacher, lora={"rank": 4})
    with pytest.raises(ValueError, match=r"give it: fs\.load"):
        _embedded(Path("x"), {"_target_": "mine.teacher"})


@needs_peft
def test_a_pipelines_network(tmp_path: Path) -> None:
    """A text-conditional UNet of diffusers with an fp16 base: trained by LCM with LoRA, exported, and read back."""
    net = text_unet(4)
    null = torch.zeros(1, 5, 8)
    guidance = fs.Guidance(7.5, null={"encoder_hidden_states": null})
    teacher = fs.wrap(
        net, fs.VP.scaled_linear(), "eps", guidance=guidance, quantize=True, sample_shape=(4, 8, 8)
    )
    before = state_of(net)
    lora = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    words = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0))
    data = {
        "x": torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": words,
    }
    settings: dict[str, Any] = {
        "steps": 3,
        "batch_size": 4,
        "warmup": 1,
        "device": "cpu",
        "learning_rate": 1e-2,
    }
    for told, method in (
        (True, distill.LCM(teacher, lora=lora)),
        (False, distill.LCM(teacher, lora=lora, w_min=6.5, w_max=6.5)),
    ):
        folder = tmp_path / str(told)
        student = distill.Trainer(method, data, **settings).fit(folder)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        made = student(n=2, seed=0, steps=4, encoder_hidden_states=words[:2])
        assert torch.equal(
            fs.load(folder, teacher)(n=2, seed=0, steps=4, encoder_hidden_states=words[:2]), made
        )
        assert isinstance(student.denoiser.net, Conditioned) is told
    student.export_diffusers(tmp_path / "exported")
    other = type(net).from_config(net.config)
    other.load_state_dict(before)
    other.load_lora_adapter(str(tmp_path / "exported"), prefix=None, use_safetensors=True)
    denoiser = fs.wrap(other.eval(), fs.VP.scaled_linear(), "eps", quantize=True, sample_shape=(4, 8, 8))
    got = fs.Sampler(denoiser, plan=tmp_path / "exported" / "plan-4.json")(
        n=2, seed=0, encoder_hidden_states=words[:2]
    )
    torch.testing.assert_close(got, made)


@needs_peft
def test_a_half_precision_base_stays_so() -> None:
    teacher = tiny_teacher()
    half = teacher.replace(net=teacher.net.to(torch.bfloat16), dtype=torch.bfloat16)  # type: ignore[attr-defined]
    method = distill.LCM(half, lora={"r": 2, "target_modules": ["conv1", "emb"]})
    x, labels = digits("train")
    loss = method.loss(Batch.of(x[:4], labels=labels[:4]))
    loss.mean().backward()
    kinds = {p.dtype for p in method.nets["student"].parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert {p.dtype for p in half.net.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]
    assert all(p.grad is not None for p in method.nets["student"].parameters() if p.requires_grad)
