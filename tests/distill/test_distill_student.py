"""Students as folders: saved, checked, loaded, exported, sampled and benched from the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails
from helpers_distill import SHAPE, text_unet, tiny_teacher, tiny_trainer
from torch import Tensor, nn

import fastsample as fs
from fastsample import distill
from fastsample.bench.model import load_model
from fastsample.cli import main
from fastsample.conf.schema import DistillConfig, EvaluationConfig, TrainerConfig
from fastsample.distill import Batch
from fastsample.distill.adapters import Conditioned, time_embedding
from fastsample.distill.student import Student
from fastsample.process import from_description
from fastsample.zoo.unet import UNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shortcut student: a network with an adapter."""
    target = tmp_path_factory.mktemp("runs") / "my-student"
    tiny_trainer(steps=4, final_samples=60).fit(target)
    return target


def test_loads_in_one_line(folder: Path) -> None:
    student = fs.load(folder)
    for steps in (1, 2, 3, 4):
        x = student(shape=(3, *SHAPE), seed=0, steps=steps, labels=[1, 2, 3])
        assert x.shape == (3, *SHAPE)
        assert student.plan(steps).nfe == steps
    assert student.steps == (1, 2, 4)
    assert torch.equal(student(n=3, seed=0, labels=[1, 2, 3]), fs.load(folder)(n=3, seed=0, labels=[1, 2, 3]))
    # the plans in the folder are those it samples with, and usable alone
    for steps in student.steps:
        assert fs.Plan.load(folder / f"plan-{steps}.json") == student.plan(steps)
    sampler = fs.Sampler(student.denoiser, plan=folder / "plan-2.json")
    same = student(n=2, seed=5, steps=2, labels=[0, 1])
    torch.testing.assert_close(sampler(n=2, seed=5, labels=[0, 1]), same, rtol=0, atol=0)


def test_the_card_says_what_was_measured(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    student = fs.load(folder)
    assert [row["steps"] for row in student.measured] == [1, 2, 4]
    for row in student.measured:
        assert f"{row['fd-digits']:.4g}" in card
        assert row["standard error"] > 0
    assert student.method["name"] == "shortcut"
    assert student.training["classes"] == 10


@pytest.mark.parametrize("name", ["model.safetensors", "student.json", "plan-2.json", "README.md"])
def test_every_file_is_checked(folder: Path, tmp_path: Path, name: str) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{re.escape(name)} is damaged: its sha256"):
        fs.load(copy)
    (copy / name).write_bytes(bytes(content[:-1]))
    with pytest.raises(ValueError, match=f"{re.escape(name)} is damaged: it has"):
        fs.load(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(name)} is missing"):
        fs.load(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not finished; run the same command again"):
        fs.load(copy)
    with pytest.raises(ValueError, match="no folder"):
        fs.load(tmp_path / "nowhere")


class Own(nn.Module):
    """A network of a user's own, which says nothing of how it is built."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.inner = nn.Conv2d(1, width, 3, padding=1)
        self.outer = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_mlp(t.to(x)[:, None] / 1000)
        return self.outer(torch.tanh(self.inner(x) + emb[:, :, None, None]))


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    """Trained and saved; loaded with net= or with its teacher, refused with a remedy without."""
    torch.manual_seed(0)
    teacher = fs.wrap(Own(), fs.Flow(), "flow", sample_shape=SHAPE)
    method = distill.Shortcut(teacher)
    assert isinstance(method.nets["student"], Conditioned)
    assert method.nets["student"].at == ("time_mlp",)
    x = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    student = distill.Trainer(method, x, steps=3, batch_size=4, device="cpu").fit(tmp_path)
    made = student(n=2, seed=0, steps=2)
    with pytest.raises(ValueError, match="give net=, a network of the same architecture"):
        fs.load(tmp_path)
    torch.testing.assert_close(fs.load(tmp_path, teacher)(n=2, seed=0, steps=2), made)
    with pytest.raises(ValueError, match="the weights do not fit"):
        fs.load(tmp_path, Own(8))
    with pytest.raises(TypeError, match=r"net= is 'digits'; give a torch.nn.Module, or the teacher"):
        fs.load(tmp_path, "digits")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="net= is a Denoiser of a function; give"):
        fs.load(tmp_path, teacher.replace(net=lambda x, t: x))


def make_latent(own: bool = True) -> fs.Denoiser:
    """A teacher whose samples are no images yet."""
    torch.manual_seed(0)
    net = Own() if own else UNet(8, 1, channels=8, multipliers=[1], patch=2, num_classes=None)
    return fs.wrap(net, fs.Flow(), "flow", sample_shape=SHAPE, decode=torch.tanh)


@pytest.mark.parametrize("own", [True, False])
def test_a_latent_student_decodes_as_its_teacher(own: bool, tmp_path: Path) -> None:
    teacher = {"_target_": f"{__name__}.make_latent", "own": own}
    Student(make_latent(own), "consistency", training={"teacher": teacher}).save(tmp_path)
    assert fs.load(tmp_path, make_latent(own)).denoiser.decode is torch.tanh
    assert load_model(str(tmp_path)).denoiser.decode is torch.tanh


def test_another_name_for_steps_is_asked_about(folder: Path) -> None:
    """Also "step", which this network is told by its plan and would take from nobody else."""
    for student in (fs.load(folder), Student(fs.zoo.load("digits"), "consistency")):
        for name in ("step", "nfe", "num_steps", "num_inference_steps"):
            with pytest.raises(
                TypeError, match=f"{name}=1 is no condition of the network; did you mean steps=1"
            ):
                student(n=1, labels=[3], **{name: 1})

    class Counted(Own):
        def forward(self, x: Tensor, t: Tensor, nfe: Tensor | None = None) -> Tensor:
            return super().forward(x, t) if nfe is None else 0 * x

    own = Student(fs.wrap(Counted(), fs.Flow(), "x0", sample_shape=SHAPE), "consistency")
    assert not own(n=1, nfe=torch.ones(1)).any()


@pytest.mark.parametrize(
    "process",
    [
        fs.VP.linear(),
        fs.VP.cosine(),
        fs.VP.scaled_linear(),
        fs.VP.from_betas(torch.linspace(1e-3, 0.1, 50)),
        fs.EDM(),
        fs.VE(),
        fs.Flow(3.0),
        fs.TrigFlow(),
        fs.VP.linear().quantized(torch.arange(0, 1000, 10)),
    ],
    ids=lambda p: f"{p!r:.30}",
)
def test_the_meaning_round_trips(process: fs.Process, tmp_path: Path) -> None:
    net = UNet(8, 1, channels=8, multipliers=[1], patch=2, num_classes=None)
    denoiser = fs.wrap(net, process, "v", time_input="t", sample_shape=SHAPE)
    student = Student(denoiser, "consistency", {"grid": "angle", "end": "zero"})
    student.save(tmp_path)
    loaded = fs.load(tmp_path)
    assert loaded.denoiser.process == process
    assert loaded.denoiser.process.fingerprint == process.fingerprint
    assert loaded.denoiser.prediction == "v"
    assert from_description(process.describe()).fingerprint == process.fingerprint
    torch.testing.assert_close(loaded(n=2, seed=1, steps=2), student(n=2, seed=1, steps=2))


def test_exports_to_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    teacher = fs.wrap(net, fs.VP.linear(), "eps", sample_shape=SHAPE)
    x = torch.zeros(8, *SHAPE)
    method = distill.Consistency(teacher, prediction="eps")
    student = distill.Trainer(method, x, steps=2, batch_size=4, device="cpu").fit(tmp_path / "run")
    made = student(n=2, seed=0, steps=2)
    again = diffusers.UNet2DModel.from_pretrained(student.export_diffusers(tmp_path / "exported"))
    denoiser = fs.wrap(again, fs.VP.linear(), "eps", sample_shape=SHAPE)
    plan = tmp_path / "exported" / "plan-2.json"
    torch.testing.assert_close(fs.Sampler(denoiser, plan=plan)(n=2, seed=0), made)
    torch.testing.assert_close(fs.load(tmp_path / "run")(n=2, seed=0, steps=2), made)
    with pytest.raises(ValueError, match="not one of diffusers"):
        Student(tiny_teacher(), "ddim").export_diffusers(tmp_path / "no")
    told = Student(teacher.replace(net=distill.Shortcut(teacher).nets["student"]), "shortcut")
    with pytest.raises(
        ValueError, match="is told its step by an adapter, which a diffusers folder of a UNet2DModel"
    ):
        told.export_diffusers(tmp_path / "no")


def _pipeline() -> Any:
    """A text-conditional pipeline, as far as ``fs.wrap`` looks at it."""
    diffusers = pytest.importorskip("diffusers")
    from types import SimpleNamespace

    unet = text_unet(1)
    return SimpleNamespace(unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False))


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["to_q", "to_k"]}], ids=["whole", "lora"])
def test_the_student_of_a_wrapped_pipeline(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    """Its network is exported as the pipeline's own kind, and a whole one is loaded by itself."""
    if lora is not None:
        pytest.importorskip("peft")
    pipe = _pipeline()
    words = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0))
    data = {"x": torch.zeros(8, *SHAPE), "encoder_hidden_states": words}
    teacher = fs.wrap(pipe)
    method = distill.Consistency(teacher, prediction="eps", lora=lora)
    student = distill.Trainer(method, data, steps=2, batch_size=4, device="cpu").fit(tmp_path / "run")
    made = student(n=2, seed=0, steps=2, encoder_hidden_states=words[:2])
    loaded = fs.load(tmp_path / "run") if lora is None else fs.load(tmp_path / "run", teacher)
    torch.testing.assert_close(loaded(n=2, seed=0, steps=2, encoder_hidden_states=words[:2]), made)
    exported = student.export_diffusers(tmp_path / "exported")
    if lora is None:
        pipe.unet = type(pipe.unet).from_pretrained(exported)
    else:
        pipe.unet.load_lora_adapter(str(exported), prefix=None, use_safetensors=True)
    sampler = fs.Sampler(fs.wrap(pipe), plan=exported / "plan-2.json")
    torch.testing.assert_close(sampler(n=2, seed=0, encoder_hidden_states=words[:2]), made)


# -- adapters ------------------------------------------------------------------------------------------------


def test_the_adapter_starts_at_nothing() -> None:
    """A shortcut student starts as its teacher, whatever step it is told, and learns to tell steps apart."""
    teacher = fs.zoo.load("digits")
    method = distill.Shortcut(teacher, prediction="eps")
    net = method.nets["student"].eval()
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([900.0, 500.0, 100.0, 3.0]), torch.arange(4)
    expected = teacher.net(x, t, labels)
    for step in (torch.zeros(4), torch.tensor([1.0, 0.5, 0.25, 0.1])):
        torch.testing.assert_close(net(x, t, step=step, labels=labels), expected)
    torch.testing.assert_close(net(x, t, labels=labels), expected)
    assert isinstance(net, Conditioned)
    nn.init.normal_(net.adapter[2].weight)  # type: ignore[arg-type]
    told = [net(x, t, step=torch.full((4,), s), labels=labels) for s in (0.25, 0.5)]
    assert not torch.allclose(*told)
    import copy

    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x, t, step=torch.full((4,), 0.25), labels=labels), told[0])
    nn.init.zeros_(twin.adapter[2].weight)  # type: ignore[arg-type]
    torch.testing.assert_close(net(x, t, step=torch.full((4,), 0.25), labels=labels), told[0])


def _diffusers_networks() -> list[Any]:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return [(unet, {}, ["time_embedding"]), (dit, {"class_labels": torch.tensor([1, 2])}, None)]


def test_time_embeddings_are_found_in_other_networks() -> None:
    from fastsample.distill.adapters import conditioned, outputs

    for net, conditions, expected in _diffusers_networks():
        for p in net.parameters():
            nn.init.normal_(p, std=0.2)
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 0])
        found = time_embedding(net, outputs(net, x, t, conditions))
        assert expected is None or found == expected
        adapted = conditioned(net, "step", x, t, conditions).eval()
        before = net.eval()(x, t, **conditions).sample
        torch.testing.assert_close(adapted(x, t, step=torch.ones(2), **conditions).sample, before)
        nn.init.normal_(adapted.adapter[2].weight)
        after = adapted(x, t, step=torch.ones(2), **conditions).sample
        assert not torch.allclose(after, before)


# -- the command line ----------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsample.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_distil_bench_and_sample_from_the_command_line(tmp_path: Path) -> None:
    """The user's path: a student, its folder in the harness beside its teacher, its images."""
    out = str(tmp_path / "student")
    train = (
        "distill", "method=consistency", "teacher=digits", "trainer.steps=4", "trainer.batch_size=16",
        "method.convert=1", "evaluation.samples=40", "evaluation.final_samples=40", "device=cpu", f"out={out}",
    )  # fmt: skip
    done = command(*train)
    assert done.returncode == 0, done.stderr
    assert f"student: {out}" in done.stdout
    assert fs.load(out).training["teacher"] == "digits"
    again = command(*train)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    other = command(*train[:-1], "trainer.batch_size=8", f"out={out}")
    assert other.returncode == 2
    assert "holds another training: trainer.batch_size was 16, is 8" in other.stderr
    bench = command(
        "bench", f"model={out}", "nfe=[2]", "solvers=[ddim]", "n=60", "reference.steps=4", "reference.n=20",
        f"out={tmp_path / 'bench'}",
    )  # fmt: skip
    assert bench.returncode == 0, bench.stderr
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    cells = {(c["solver"], c["steps"]) for c in results["points"]}
    assert {("student", 1), ("student", 2), ("student", 4), ("ddim", 2)} <= cells
    for cell in results["points"]:
        assert cell["nfe"] == cell["steps"]
    sample = command("sample", f"model={out}", "steps=1", "n=4", f"out={tmp_path / 'images'}")
    assert sample.returncode == 0, sample.stderr
    assert (tmp_path / "images" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=consistancy"], "consistency"),
        (["method.intervalls=3"], "did you mean 'intervals'"),
        (["teacher=digit"], "did you mean 'digits'"),
        (["data=nowhere"], "data='nowhere' is unknown"),
        (["trainer.step=3"], "did you mean 'trainer.steps'"),
        (["resume=true"], "has no checkpoint"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command("distill", f"out={tmp_path / 'new'}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


class Calm(Own):
    """Its samples are images, nearly black."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x / t.to(x)[:, None, None, None] + 0.1 * super().forward(x, t)


def make_own(width: int = 8) -> fs.Denoiser:
    """The teacher for ``teacher._target_``."""
    torch.manual_seed(0)
    return fs.wrap(Calm(width), fs.Flow(), "flow", sample_shape=SHAPE)


def make_small() -> fs.Denoiser:
    """A model that does not say the shape of its samples."""
    return make_own().replace(sample_shape=None)


def make_noise() -> Tensor:
    """The dataset for ``data._target_``."""
    return torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@dataclasses.dataclass
class Weighted(distill.Method):
    """A method for ``method._target_``: one setting of its own, and one that the default method has as well."""

    weight: float = 1.0
    intervals: int = 3

    def objective(self, batch: Batch, role: str) -> Tensor:
        t = self.time_of_angle(batch.uniform("t"))
        error = self.predict("student", batch.normal("eps"), t, batch) - batch.data
        return self.weight * error.flatten(1).square().mean(1)


TINY = (
    f"teacher._target_={__name__}.make_own", "teacher.width=4", f"data._target_={__name__}.make_noise", "device=cpu",
    "trainer.steps=2", "trainer.batch_size=4",
)  # fmt: skip


@pytest.mark.usefixtures("keep_argv")
@pytest.mark.parametrize("method", ["shortcut", "consistency"])
def test_a_teacher_of_ones_own_on_the_command_line(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network says nothing of how it is built: its recorded teacher is made again, or the model beside it taken."""
    out, model = str(tmp_path / "student"), [f"model._target_={__name__}.make_own", "model.width=4"]
    main(["distill", f"method={method}", *TINY, f"out={out}"])
    images = f"out={tmp_path / 'images'}"
    main(["sample", f"model={out}", "steps=1", "n=3", images])
    by_itself = (tmp_path / "images" / "grid.png").read_bytes()
    few = ("n=20", "nfe=[2]", "solvers=[ddim]", "reference.steps=4", "reference.n=5", "device=cpu")
    main(["bench", f"model={out}", *few, f"out={tmp_path / 'bench'}"])
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert {("student", k) for k in (1, 2, 4)} <= {(c["solver"], c["nfe"]) for c in results["points"]}

    def moved(**_: Any) -> Any:
        raise AssertionError("the recorded teacher was made")

    # the teacher lives elsewhere now
    monkeypatch.setattr(sys.modules[__name__], "moved", make_own, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "make_own", moved)
    with pytest.raises(ValueError, match="give net=, a network of the same architecture"):
        fs.load(out)
    model[0] = f"model._target_={__name__}.moved"
    main(["sample", *model, f"solver={{student: {out}}}", "steps=1", "n=3", images])
    assert (tmp_path / "images" / "grid.png").read_bytes() == by_itself
    main(["bench", *model, *few, f"solvers=[ddim,{{student: {out}}}]", f"out={tmp_path / 'beside'}"])
    said = fails(capsys, "sample", f"model={out}", "n=1", images)
    assert f"the student's teacher cannot be made: teacher._target_={__name__}.make_own" in said
    assert f"model=... solver={{student: {out}}}" in said
    said = fails(capsys, "sample", model[0], "model.width=6", f"solver={{student: {out}}}", "n=1", images)
    assert "whose network is a copy of that of model=" in said
    assert "the weights do not fit" in said


@pytest.mark.usefixtures("keep_argv")
def test_a_student_without_a_named_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Student(make_own(), "consistency").save(tmp_path / "student")
    said = fails(capsys, "sample", f"model={tmp_path / 'student'}", f"out={tmp_path / 'images'}")
    assert "cannot be loaded without its teacher, which the folder does not name; name its teacher" in said


@pytest.mark.usefixtures("keep_argv")
@pytest.mark.parametrize("command", ["sample", "bench"])
def test_a_student_of_another_shape_is_refused(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sampled; also where the model's shape is only given as a setting."""
    solver = (
        f"solver={{student: {folder}}}" if command == "sample" else f"solvers=[ddim,{{student: {folder}}}]"
    )
    model = f"model._target_={__name__}.make_small"
    said = fails(capsys, command, model, "shape=[1,4,4]", solver, f"out={tmp_path / 'out'}")
    assert f"student={folder} makes samples of shape (1, 8, 8), the model of (1, 4, 4)" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("keep_argv")
def test_a_method_of_ones_own_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "student")
    own = f"method._target_={__name__}.Weighted"
    main(["distill", own, "method.weight=2", *TINY, "trainer.betas=[0.5,0.9]", f"out={out}"])
    student = fs.load(out, make_own(4))
    assert student.method["name"] == "Weighted"
    assert student.method["weight"] == 2
    assert student.method["intervals"] == 3  # not the default method's
    assert student.training["betas"] == [0.5, 0.9]
    assert student(n=2, seed=0, steps=1).shape == (2, *SHAPE)
    main(["sample", f"model={out}", "steps=1", "n=1", f"out={tmp_path / 'images'}"])
    for arguments, message in (
        (
            [own, "method.wieght=2"],
            "method.wieght is no setting of test_distill_student.Weighted; did you mean 'weight'",
        ),
        (
            ["method=ect", own],
            "method=ect and method._target_=test_distill_student.Weighted: give one of them",
        ),
        ([f"method._target_={__name__}.Own"], "Own is no subclass of fastsample.distill.Method"),
        ([f"method._target_={__name__}.Nowhere"], "Nowhere cannot be imported: module"),
        (["method._target_=no.such.Method"], "no.such.Method cannot be imported: No module named 'no'"),
        (["teacher._target_=no.such.make"], "error: teacher._target_=no.such.make"),
        (["trainer.betas=[0.9]"], "betas=[0.9]: give 2 numbers in [0, 1)"),
    ):
        assert message in fails(capsys, "distill", *TINY, *arguments, f"out={tmp_path / 'new'}")
    # a file's settings come on top of the default method's, unless these are taken away
    for defaults, refused in (
        ("[distill, _self_]", True),
        ("[distill, {override method: null}, _self_]", False),
    ):
        file = f"defaults: {defaults}\nmethod: {{_target_: {__name__}.Weighted, weight: 3}}\n"
        (tmp_path / "mine.yaml").write_text(file)
        arguments = [
            "--config-dir",
            str(tmp_path),
            "--config-name",
            "mine",
            *TINY,
            f"out={tmp_path / 'file'}",
        ]
        if refused:
            assert "`override method: null` among its defaults" in fails(capsys, "distill", *arguments)
        else:
            main(["distill", *arguments])
            assert fs.load(tmp_path / "file", make_own(4)).method["weight"] == 3


def test_the_command_line_has_every_setting_of_the_trainer() -> None:
    groups = (DistillConfig, TrainerConfig, EvaluationConfig)
    known = {f.name for group in groups for f in dataclasses.fields(group)}
    renamed = {"evaluate_every": "every"}
    settings = {renamed.get(f.name, f.name) for f in dataclasses.fields(distill.Trainer)}
    assert settings - known == {"progress"}
