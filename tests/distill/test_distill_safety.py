"""What could go wrong: damaged files, interrupted trainings, teachers and settings that do not fit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distill import SHAPE, log_of, tiny_teacher, tiny_trainer
from torch import Tensor, nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.checkpoint import Checkpoints
from fastsample.distill.pairs import make_pairs
from fastsample.zoo.data import digits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_trainer().fit(folder)
    return folder


class Labelled(nn.Module):
    """A network that cannot be run without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.time = nn.Linear(1, 16)
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        told = self.time(t.to(x)[:, None] / 1000)
        return self.last(torch.relu(self.first(x) + (told + self.embedding(labels))[:, :, None, None]))


@pytest.mark.parametrize("name", ["shortcut", "meanflow", "sid", "dmd2"])
def test_networks_that_need_their_conditions(name: str, tmp_path: Path) -> None:
    kind = getattr(distill, distill.METHODS[name][1])
    teacher = fs.wrap(Labelled(), fs.VP.linear(), "v", sample_shape=SHAPE)
    with pytest.raises(ValueError, match=r"conditions: none.*labels.*example_conditions="):
        kind(teacher)
    method = kind(teacher, example_conditions={"labels": torch.tensor([0, 1])})
    student = distill.Trainer(method, "digits", steps=2, batch_size=8, device="cpu").fit(tmp_path)
    x = student(n=2, seed=0, labels=torch.tensor([3, 4]))
    assert x.shape == (2, *SHAPE)


def test_a_setting_that_was_refused_does_not_claim_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fd-digist"):
        tiny_trainer(metric="fd-digist", steps=4).fit(tmp_path)
    tiny_trainer(metric=None, steps=4).fit(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged.*delete it to go on"):
        tiny_trainer(metric=None, steps=4).fit(tmp_path)


def test_how_derivatives_are_taken_is_kept(tmp_path: Path) -> None:
    """What "auto" decided on the first batch; a resumed training must not decide again on another."""
    method = {"jvp": "auto", "warmup": 0}
    tiny_trainer("scm", method, steps=8, metric=None).fit(tmp_path)
    state = Checkpoints(tmp_path / "checkpoints").load()
    assert state is not None
    decided = state[1]["method"]["jvp"]
    assert decided != "auto"
    again = distill.SCM(tiny_teacher())
    again.load_state_dict({"jvp": decided})
    assert again._tangent.mode == decided


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_damaged_best_weights_are_not_the_student(
    damage: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "manifest.json").unlink()
    file = folder / "best.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-9])
    student = tiny_trainer().fit(folder)
    assert "is not the one" in caplog.text
    end = Checkpoints(folder / "checkpoints").load()
    assert end is not None
    averages = end[1]["ema"].values()
    own = student.denoiser.net.state_dict()  # type: ignore[attr-defined]
    assert any(all(torch.equal(own[k], v) for k, v in average.items()) for average in averages)


def test_damaged_pairs_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = tiny_teacher()
    teacher.net.eval()  # type: ignore[attr-defined]
    first = make_pairs(teacher, "digits", 20, tmp_path, steps=2)
    file = tmp_path / "00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    assert torch.equal(make_pairs(teacher, "digits", 20, tmp_path, steps=2).x0, first.x0)
    assert "was altered" in caplog.text
    more = make_pairs(teacher, "digits", 30, tmp_path, steps=2)
    torch.testing.assert_close(more.x0[:20], first.x0)


def test_only_the_pairs_that_are_wanted_are_made_each_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return 0.1 * x

    teacher = fs.wrap(net, fs.VP.linear(), "eps", sample_shape=SHAPE)
    make_pairs(teacher, torch.zeros(4, *SHAPE), 8, tmp_path / "few", solver="ddim", steps=1)
    assert rows.count(8) == 1  # the rest are probes of three
    monkeypatch.setattr("fastsample.distill.pairs.SHARD", 4)
    monkeypatch.setattr("fastsample.distill.pairs.rank_and_size", lambda: (1, 2))
    with pytest.raises(ValueError, match="another process did not leave it whole"):
        make_pairs(teacher, torch.zeros(4, *SHAPE), 12, tmp_path / "shared", solver="ddim", steps=1)
    assert [f.name for f in (tmp_path / "shared").glob("*.safetensors")] == ["00001.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["shortcut", "consistency", "ect", "scm", "knowledge", "dmd2"])
def test_teachers_in_half_precision_have_students_in_single(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    net = tiny_teacher().net.eval().to(dtype)  # type: ignore[attr-defined]
    teacher = fs.wrap(net, fs.VP.linear(), "eps", sample_shape=SHAPE)
    options: dict[str, Any] = {"pairs": 16, "pair_steps": 2} if name == "knowledge" else {}
    method = getattr(distill, distill.METHODS[name][1])(teacher, **options)
    assert {p.dtype for p in method.nets["student"].parameters()} == {torch.float32}
    x, labels = digits("train")
    data = (x.double() if dtype == torch.float16 else x.half(), labels)
    student = distill.Trainer(method, data, steps=2, batch_size=8, device="cpu").fit(tmp_path)
    assert bool(torch.isfinite(student(n=2, seed=0, labels=torch.tensor([0, 1]))).all())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            lambda t: distill.Consistency(t, intervals=8, substeps=3),
            "intervals=8, substeps=3: the network knows too few times for so many; the grid has",
        ),
        (lambda t: distill.Progressive(t, first=16), "first=16: the network knows too few times"),
    ],
)
def test_grids_of_more_times_than_the_network_knows_are_refused(kind: Any, message: str) -> None:
    known = torch.arange(20, dtype=torch.float64) * 50
    teacher = tiny_teacher().net
    with pytest.raises(ValueError, match=message):
        kind(fs.wrap(teacher, fs.VP.linear(), "eps", quantize=known, sample_shape=SHAPE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 0.99}, r"ema=0\.99: give some numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"betas=0\.9: give 2 numbers"),
        ({"betas": (2, 3)}, r"betas=\(2, 3\)"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3' must be a number above 0"),
        ({"warmup": -5}, "warmup=-5 must be a whole number of at least 0"),
        ({"samples": 1.5}, r"samples=1\.5 must be a whole number of at least 1"),
        ({"workers": "2"}, "workers='2'"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"clip": 0.0}, r"clip=0\.0 must be a number above 0"),
        ({"device": "cpuu"}, "device='cpuu': give 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_trainer_settings_are_refused_early(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(ValueError, match="this machine has no CUDA device"):
        tiny_trainer(device="cuda")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interruption_writes_a_checkpoint(number: int, code: int, tmp_path: Path) -> None:
    """And the training goes on from there, to the same end."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from helpers_distill import tiny_trainer
            tiny_trainer(steps=400, metric=None, save_every=400, evaluate_every=400).fit(sys.argv[1])
            """
        )
    )
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(log_of(folder) if (folder / "log.jsonl").exists() else []) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (code, -number)
    assert "the same command goes on" in errors
    (step,) = Checkpoints(folder / "checkpoints").steps()
    assert 3 <= step < 400


def test_pairs_of_another_teacher_are_refused(tmp_path: Path) -> None:
    teacher, other = tiny_teacher(), tiny_teacher()
    for denoiser in (teacher, other):
        denoiser.net.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        next(other.net.parameters()).mul_(1.01)  # type: ignore[attr-defined]
    first = make_pairs(teacher, "digits", 20, tmp_path, steps=2)
    assert torch.equal(make_pairs(teacher, "digits", 20, tmp_path, steps=2).x0, first.x0)
    with pytest.raises(ValueError, match="pairs with another plan; give another folder"):
        make_pairs(teacher, "digits", 20, tmp_path, steps=3)
    with pytest.raises(ValueError, match=r"pairs with another teacher \(its weights"):
        make_pairs(other, "digits", 20, tmp_path, steps=2)


def test_pairs_by_a_plan(tmp_path: Path) -> None:
    """A tuned plan samples the teacher's pairs; one that draws noise or is of another process is refused."""
    teacher = tiny_teacher()
    teacher.net.eval()  # type: ignore[attr-defined]
    quick = {"trajectories": 16, "heldout": 8, "reference_steps": 8, "iterations": 1}

    def saved(plan: fs.Plan) -> str:
        plan.save(tmp_path / "plan.json")
        return str(tmp_path / "plan.json")

    tuned = saved(fs.tune(teacher, 2, **quick))
    method = distill.Knowledge(teacher, pairs=20, pair_plan=tuned)
    method.prepare("digits", tmp_path)
    assert method.made is not None
    own = fs.Sampler(teacher, plan=tuned)(noise=method.made.noise(torch.arange(20)), **method.made.conditions)
    torch.testing.assert_close(method.made.x0, own)
    other = distill.Knowledge(teacher, pairs=20, pair_steps=2)
    with pytest.raises(ValueError, match="pairs with another plan; give another folder"):
        other.prepare("digits", tmp_path)
    with pytest.raises(ValueError, match="draws noise; a pair is"):
        distill.ReFlow(teacher, pair_plan=saved(fs.Sampler(teacher, "ddim", 2, eta=1.0).plan))
    flow = fs.wrap(teacher.net, fs.Flow(), "flow", sample_shape=SHAPE)
    with pytest.raises(ValueError, match="was written for Flow"):
        distill.Knowledge(teacher, pair_plan=saved(fs.Sampler(flow, steps=2).plan))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ECT", {"q": 1.0}, r"q=1\.0 must be a number above 1"),
        ("ECT", {"stages": 0}, "stages=0"),
        ("ICT", {"s0": 0}, "s0=0"),
        ("ICT", {"s0": 100, "s1": 10}, "s1=10 is less than s0=100"),
        ("SCM", {"p_std": -1.0}, r"p_std=-1\.0"),
        ("Shortcut", {"target_decay": 2.0}, r"target_decay=2\.0 must be a number of at least 0 and below 1"),
        ("Shortcut", {"finest": 8.0}, r"finest=8\.0 must be a whole number"),
        ("MeanFlow", {"different": 2}, "different=2"),
        ("SiD", {"gan": -1}, "gan=-1"),
        ("DMD2", {"ratio": 2.5}, r"ratio=2\.5"),
        ("ReFlow", {"rectifications": 1.5}, r"rectifications=1\.5"),
        ("Consistency", {"intervals": "24"}, "intervals='24'"),
        ("Consistency", {"convert": -5}, "convert=-5"),
        ("LCM", {"skip": 2.5}, r"skip=2\.5"),
        ("Knowledge", {"pair_solver": "nope"}, "nope"),
        (
            "Knowledge",
            {"pair_plan": "no/such/plan.json"},
            "pair_plan='no/such/plan.json': there is no such file",
        ),
        ("Progressive", {"grid": "nope"}, "nope"),
    ],
)
def test_method_settings_are_refused_early(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(distill, name)(tiny_teacher(), **settings)


def test_the_command_line_knows_what_a_network_needs(tmp_path: Path) -> None:
    """Conditions of the data stand for those that a method runs the network with."""
    from fastsample.bench.distill import make_method
    from fastsample.distill.data import as_data

    teacher = fs.wrap(Labelled(), fs.VP.linear(), "v", sample_shape=SHAPE)
    example = as_data("digits").conditions(torch.arange(2), torch.device("cpu"))
    method = make_method({"name": "shortcut", "finest": 4}, teacher, example)
    assert "example_conditions" not in method.settings
    with pytest.raises(ValueError, match="example_conditions"):
        make_method("shortcut", teacher)
