"""The trainer: it learns, it never loses work, and it says what is wrong before it starts."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distill import SHAPE, STEPS, exact_trainer, final_state, log_of, same, tiny_teacher, tiny_trainer
from torch import Tensor, nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.checkpoint import Checkpoints
from fastsample.distill.ema import PowerAverages, gamma_of_std, weights_of
from fastsample.distill.evaluation import Evaluation
from fastsample.errors import NonFiniteError
from fastsample.metrics.frechet import FrechetEstimate
from fastsample.zoo.data import digits
from fastsample.zoo.mixture import MixtureNet, digits_mixture


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted, with one thread as the killed ones: the network's last bits depend on it."""
    folder = tmp_path_factory.mktemp("whole")
    train_until_killed(str(folder))
    return folder


def test_the_trained_maps_error_falls(tmp_path: Path) -> None:
    """Consistency distillation from the exact mixture: the distance to its exact ODE falls with training."""
    mixture, process = digits_mixture(), fs.VP.linear()
    teacher = fs.wrap(MixtureNet(mixture, process), process, "eps", sample_shape=SHAPE)
    start = fs.zoo.load("digits")
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 10
    sigma = float(process.sigma(process.t_start))
    exact = mixture.reference(sigma * noise.double(), process, t_end=process.t_zero, labels=labels).x

    def error(student: distill.Student) -> float:
        x = student.sampler(1)(noise=noise, labels=labels)
        return float((x - exact.reshape(x.shape)).square().mean().sqrt())

    found = []
    for steps in (1, 40, 160):
        method = distill.Consistency(teacher, start, prediction="v", convert=steps // 4, intervals=8)
        trainer = distill.Trainer(
            method, "digits", steps=steps, batch_size=64, warmup=5, ema=[0.9], device="cpu"
        )
        found.append(error(trainer.fit(tmp_path / str(steps))))
    assert found[2] < 0.8 * found[1] < 0.8 * found[0], found


def train_until_killed(folder: str) -> None:
    torch.set_num_threads(1)
    tiny_trainer().fit(folder)


def kill_and_resume(folder: Path, kills: int, most: int, seed: int) -> list[int]:
    """Start the training again and again, and kill it at random moments; the newest checkpoint at each kill.

    A kill comes up to ``most`` updates after the point of resuming, and a random while later (in an update, a
    checkpoint or an evaluation); or while the training starts.
    """
    context = multiprocessing.get_context("fork")
    rng, lines = random.Random(seed), folder / "log.jsonl"
    checkpoints = Checkpoints(folder / "checkpoints")
    hit: list[int] = []
    while len(hit) < kills:
        old = lines.stat().st_ino if lines.exists() else None  # resuming writes the log anew
        begun = max(checkpoints.steps(), default=0)
        process = context.Process(target=train_until_killed, args=(str(folder),))
        process.start()
        further = rng.randint(0, most)
        while further and process.is_alive():
            if lines.exists() and lines.stat().st_ino != old and _last_step(lines) >= begun + further:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.02 if further else 0.6))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            hit.append(max(checkpoints.steps(), default=0))
        process.join()
        if (folder / "manifest.json").exists():
            break
    train_until_killed(str(folder))
    return hit


def _last_step(lines: Path) -> int:
    whole = [line for line in lines.read_text().split("\n")[:-1] if line]
    return int(json.loads(whole[-1])["step"]) if whole else 0


@pytest.mark.parametrize(
    ("kills", "most"), [(4, 12), pytest.param(22, 4, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_resume_after_sigkill_is_bit_identical(kills: int, most: int, tmp_path: Path, whole: Path) -> None:
    """Weights, optimiser, averages, best and log are those of the training that was not killed."""
    hit = kill_and_resume(tmp_path, kills, most, seed=0)
    assert len(hit) == kills, f"only {len(hit)} kills before the training was over"
    assert len(set(hit)) >= min(kills, 8) // 2, f"the kills hit a few moments only: {hit}"
    assert hit[-1] > 0
    same(final_state(tmp_path, STEPS), final_state(whole, STEPS))
    assert log_of(tmp_path) == log_of(whole)
    for file in ("model.safetensors", "student.json", "plan-1.json"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("name", ["dmd2", "progressive", "reflow", "consistency"])
def test_every_role_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods with several networks and optimisers, stages and pairs: stopped in the middle and gone on."""
    settings: dict[str, Any] = {"steps": 12, "metric": None}
    method: dict[str, Any] = {
        "dmd2": {"ratio": 2},
        "progressive": {"first": 4, "convert": 2},
        "reflow": {"pairs": 48, "pair_steps": 2, "rectifications": 2},
        "consistency": {"convert": 3},
    }[name]
    tiny_trainer(name, method, **settings).fit(tmp_path / "whole")

    class Stopped(Exception):
        pass

    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, step: int, state: Any) -> Path:
        path = save(self, step, state)
        if step == 8:
            raise Stopped
        return path

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Stopped):
        tiny_trainer(name, method, **settings).fit(tmp_path / "parts")
    monkeypatch.undo()
    tiny_trainer(name, method, **settings).fit(tmp_path / "parts")
    same(final_state(tmp_path / "parts", 12), final_state(tmp_path / "whole", 12))


def test_resume_says_from_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_trainer(steps=4, metric=None).fit(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with caplog.at_level(logging.INFO):
        tiny_trainer(steps=4, metric=None).fit(tmp_path, resume=True)
    assert "from step 4 of 4" in caplog.text
    with pytest.raises(ValueError, match="resume=False, but"):
        tiny_trainer(steps=4, metric=None).fit(tmp_path, resume=False)
    with pytest.raises(ValueError, match="has no checkpoint"):
        tiny_trainer(steps=4, metric=None).fit(tmp_path / "nothing", resume=True)
    with pytest.raises(ValueError, match=r"another training: trainer\.batch_size was 16, is 8"):
        tiny_trainer(steps=4, metric=None, batch_size=8).fit(tmp_path)
    with pytest.raises(ValueError, match=r"method\.bootstrap was 0\.75, is 0\.25"):
        tiny_trainer("shortcut", {"bootstrap": 0.25}, steps=4, metric=None).fit(tmp_path)


def test_resume_with_another_number_of_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its kernels give the teacher's outputs other last bits: it is the same training all the same."""
    before = torch.get_num_threads()

    def fit() -> None:
        tiny_trainer(steps=4, metric=None).fit(
            tmp_path
        )  # the last bits of this teacher's outputs depend on it

    try:
        torch.set_num_threads(1)
        fit()
        (tmp_path / "manifest.json").unlink()
        torch.set_num_threads(2)
        with caplog.at_level(logging.INFO):
            fit()
    finally:
        torch.set_num_threads(before)
    assert "from step 4 of 4" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "missing"])
def test_damaged_checkpoints_are_passed_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Path
) -> None:
    """The newest checkpoint is damaged: it is named, the one before is used, and the result is the same."""
    import shutil

    for item in ("checkpoints", "run.json", "log.jsonl", "best.safetensors"):
        source = whole / item
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / item)
    newest = tmp_path / "checkpoints" / f"{STEPS:08d}"
    state = newest / "state.pt"
    if damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(bytes(content))
    elif damage == "truncate":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "missing":
        state.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with caplog.at_level(logging.INFO):
        tiny_trainer().fit(tmp_path)
    assert f"{STEPS:08d}" in caplog.text
    assert f"from step {STEPS - 4} of {STEPS}" in caplog.text
    same(final_state(tmp_path, STEPS), final_state(whole, STEPS))


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    tiny_trainer(steps=4, metric=None).fit(tmp_path)
    for file in (tmp_path / "checkpoints").glob("*/state.pt"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        tiny_trainer(steps=4, metric=None).fit(tmp_path)


def _full_disk(folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    trainer = tiny_trainer(steps=8, metric=None, save_every=2, evaluate_every=8)
    save = Checkpoints.save

    def limited(self: Checkpoints, step: int, state: Any) -> Path:
        if step == 6:  # no file may grow beyond 10 kB from here on
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return save(self, step, state)

    Checkpoints.save = limited  # type: ignore[method-assign]
    try:
        trainer.fit(folder)
        queue.put("no error")
    except OSError as error:
        queue.put(str(error))


def test_a_write_that_fails_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on file sizes stops the third checkpoint: a clear error, the second one whole, then gone on."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_full_disk, args=(str(tmp_path), queue))
    process.start()
    message = queue.get(timeout=120)
    process.join()
    assert "checkpoint of step 6 could not be written" in message
    assert "the last good checkpoint is" in message
    assert "00000004" in message
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [2, 4]
    found = checkpoints.load()
    assert found is not None
    assert found[0] == 4
    tiny_trainer(steps=8, metric=None, save_every=2, evaluate_every=8).fit(tmp_path)
    tiny_trainer(steps=8, metric=None, save_every=2, evaluate_every=8).fit(tmp_path.parent / "other")
    same(final_state(tmp_path, 8), final_state(tmp_path.parent / "other", 8))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        tiny_trainer(steps=4).fit(tmp_path / "file" / "run")


def test_non_finite_stops_before_the_update(tmp_path: Path) -> None:
    """An infinite sample: the step and the last good checkpoint are named, and nothing was updated."""
    x, labels = digits("train")
    x = x.clone()
    from fastsample.distill.data import shuffled

    which = int(shuffled(torch.tensor([16 * 9 + 3]), len(x), 0))  # of the tenth update
    x[which] = math.inf
    trainer = tiny_trainer(steps=12, metric=None, evaluate_every=12)
    trainer._data = distill.Data(x, {"labels": labels})
    with pytest.raises(NonFiniteError, match=r"loss of 'student' is not finite at step 9 .*00000008"):
        trainer.fit(tmp_path)
    found = Checkpoints(tmp_path / "checkpoints").load()
    assert found is not None
    assert found[0] == 8
    assert all(bool(torch.isfinite(v).all()) for v in found[1]["nets"]["student"].values())


class Hungry(nn.Module):
    """A network that has no memory for more than ``limit`` samples while gradients are kept."""

    def __init__(self, net: nn.Module, limit: int) -> None:
        super().__init__()
        self.net, self.limit = net, limit

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if len(x) > self.limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.net(x, t, labels)


def test_out_of_memory_halves_the_micro_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same mathematics with fewer samples at once."""
    results = []
    for limit in (16, 5):
        trainer = exact_trainer("consistency", {"convert": 0}, lambda net, limit=limit: Hungry(net, limit))
        trainer.fit(tmp_path / str(limit))
        results.append(final_state(tmp_path / str(limit), 6))
    assert "micro-batch is 8" in caplog.text
    assert "micro-batch is 4" in caplog.text
    for key, value in results[0].items():
        if key.startswith("/nets/student"):
            torch.testing.assert_close(results[1][key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("micro", [1, 3, 16])
def test_micro_batches_have_the_same_gradient(micro: int, tmp_path: Path) -> None:
    """Bootstrap shares and step sizes belong to samples, not to places in a micro-batch."""
    from fastsample.distill.trainer import _rows

    teacher = tiny_teacher()
    teacher.net.eval()  # type: ignore[attr-defined]
    x, labels = digits("train")
    for name in ("shortcut", "ect", "dmd2", "scm"):
        method = getattr(distill, distill.METHODS[name][1])(teacher, convert=0)
        method.begin(10)
        for net in method.nets.values():
            net.eval()
        batch = distill.Batch.of(x[:16], 1, labels=labels[:16])
        whole = method.loss(batch)
        parts = [method.loss(_rows(batch, slice(i, min(16, i + micro)))) for i in range(0, 16, micro)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    teacher = fs.zoo.load("digits")
    method = distill.Consistency(teacher)
    x, labels = digits("train")
    for data, message in (
        (torch.zeros(10, 1, 16, 16), r"shape \(1, 16, 16\), the teacher's \(1, 8, 8\)"),
        ((x * 127.5 + 127.5, labels), "values reach 255"),
        ((x.mul(127.5).byte(), labels), "floating-point samples"),
        ({"x": x, "classes": labels}, "name them as the network does"),
        ((x, labels + 20), "the teacher cannot be run"),
        ({"x": x, "labels": labels[:5]}, "5 values for 1201 samples"),
        (torch.full((4, 1, 8, 8), math.nan), "not finite"),
        (x[:0], "empty"),
        ("fashion-mnits", "did you mean 'fashion-mnist'"),
        ("no/such/folder", "no such folder"),
        (None, "data is missing"),
        (7, "give a name"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.Trainer(method, data)
    for settings, message in (
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"best_at": (1, 3)}, r"best_at=\(1, 3\).*of \(1, 2, 4\)"),
        ({"best_at": 1}, "best_at=1"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.Trainer(method, "digits", **settings)
    with pytest.raises(TypeError, match="method is a Denoiser"):
        distill.Trainer(teacher, "digits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples=5: fd-digits has 24 features"):
        distill.Trainer(method, "digits", metric="fd-digits", samples=5, device="cpu").fit(tmp_path)


def test_what_a_training_leaves(whole: Path) -> None:
    """Pictures of each evaluation, the best weights by the metric, and TensorBoard's events where it is installed."""
    evaluations = range(8, STEPS + 1, 8)
    assert sorted(f.name for f in (whole / "samples").iterdir()) == [f"{k:08d}.png" for k in evaluations]
    worst = {
        (line["step"], average): max(line[f"fd-digits.{average}.{k}"] for k in (1, 2, 4))
        for line in log_of(whole)
        if "fd-digits.ema0.99.1" in line
        for average in ("ema0.99", "ema0.999")
    }
    assert len(worst) == 2 * len(evaluations)
    best = min(worst, key=lambda key: worst[key])
    training = fs.load(whole).training
    assert (training["best step"], training["best average"]) == best
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(whole / "tensorboard")).Reload()
    assert "loss/student" in found.Tags()["scalars"]
    losses = [line["loss.student"] for line in log_of(whole) if "loss.student" in line]
    assert [e.value for e in found.Scalars("loss/student")] == pytest.approx(losses)


@pytest.mark.parametrize(
    ("best_at", "step"), [((), 2), ((1, 2, 4), 2), ((1,), 3), ((2,), 1), ((1, 2), 2), ((4,), 1)]
)
def test_the_best_is_the_best_at_its_worst_number_of_steps(
    best_at: tuple[int, ...], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances that disagree: the first is the best by arithmetic and geometric means, and bad in one step."""
    table = [{1: 0.43, 2: 0.06, 4: 0.03}, {1: 0.2, 2: 0.24, 4: 0.15}, {1: 0.13, 2: 0.3, 4: 0.15}]
    rows = iter([row[k] for row in table for k in (1, 2, 4)] + [0.0] * 3)

    def distance(self: Evaluation, student: distill.Student, steps: int, seed: int = 0) -> FrechetEstimate:
        return FrechetEstimate(next(rows), 0.0, 0.0, self.samples, None, (), ())

    monkeypatch.setattr(Evaluation, "distance", distance)
    trainer = tiny_trainer(steps=3, evaluate_every=1, save_every=1, ema=[0.5], best_at=best_at)
    assert trainer.fit(tmp_path).training["best step"] == step


@pytest.mark.parametrize(
    ("name", "method", "samples"),
    [("ect", {}, 1000), ("sid", {}, 7000), ("dmd2", {"jumps": 4}, 1750), ("dmd2", {"jumps": 64}, 1000)],
)
def test_evaluations_cost_the_same_at_any_number_of_steps(
    name: str, method: dict[str, Any], samples: int
) -> None:
    assert tiny_trainer(name, method, samples=None).samples == samples


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(precision: str, tmp_path: Path) -> None:
    """Weights stay float32, move and are finite; on a GPU fp16 keeps its loss scale in the checkpoint."""
    trainer = tiny_trainer(steps=4, metric=None, precision=precision)
    student = trainer.fit(tmp_path)
    assert student(n=2, seed=0, labels=[0, 1]).dtype == torch.float32
    state = final_state(tmp_path, 4)
    start = trainer.method.nets["student"].state_dict()
    assert all(bool(torch.isfinite(v).all()) for k, v in state.items() if isinstance(v, Tensor))
    assert any(not torch.equal(state[f"/nets/student/{k}"], v) for k, v in start.items())
    assert state["/nets/student/net.time_mlp.0.weight"].dtype == torch.float32
    assert ("/scaler/scale" in state) == (precision == "fp16" and torch.cuda.is_available())


def test_datasets_and_workers_give_the_same_order(tmp_path: Path) -> None:
    """A map-style dataset with random augmentation: samples are a function of (seed, index), with any workers."""

    class Jittered(torch.utils.data.Dataset[Any]):
        random = True  # not to be kept in memory

        def __init__(self) -> None:
            self.x, self.y = digits("train")

        def __len__(self) -> int:
            return 50

        def __getitem__(self, i: int) -> Any:
            return self.x[i] + 0.1 * torch.randn(SHAPE), int(self.y[i])

    indices = [torch.arange(8 * k, 8 * k + 8) for k in range(8)]
    device = torch.device("cpu")
    data = distill.Data(Jittered())
    runs = [list(data.batches(indices, device, 3, workers)) for workers in (0, 0, 2)]
    for run in runs[1:]:
        for (x, c), (y, d) in zip(runs[0], run, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(c["labels"], d["labels"])
    later = next(iter(data.batches(indices[5:], device, 3)))
    assert torch.equal(later[0], runs[0][5][0])
    other = next(iter(data.batches(indices, device, 4)))
    assert not torch.equal(other[0], runs[0][0][0])


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from helpers_distill import exact_trainer
for name in ("consistency", "dmd2", "shortcut"):
    method = {"dmd2": {"ratio": 2}, "consistency": {"convert": 2}}.get(name, {})
    exact_trainer(name, method).fit(f"{sys.argv[1]}/{name}")
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batch on two processes (gloo): the same weights, up to the order of sums."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    helpers = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for count, command in ((1, [sys.executable]), (2, launch)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / str(count)), helpers],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for name in ("consistency", "dmd2", "shortcut"):
        one, two = (final_state(tmp_path / str(count) / name, 6) for count in (1, 2))
        for key, value in one.items():
            if key.startswith(("/nets", "/ema")):
                torch.testing.assert_close(two[key], value, rtol=1e-8, atol=1e-10)


# -- averages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sid", "dmd2"])
def test_a_long_average_is_among_the_candidates_of_score_distillation(name: str, tmp_path: Path) -> None:
    """Power-function averages can be the student, and leave snapshots where they were asked for alone."""
    trainer = tiny_trainer(name, steps=4, evaluate_every=2)
    assert trainer.power_ema == (0.25,)
    training = trainer.fit(tmp_path / "measured").training
    found = {
        (line["step"], average): line[key]
        for line in log_of(tmp_path / "measured")
        for average in ("ema0.99", "ema0.999", "power0.25")
        if (key := f"fd-digits.{average}.1") in line
    }
    assert len(found) == 2 * 3
    assert (training["best step"], training["best average"]) == min(found, key=lambda key: found[key])
    assert not (tmp_path / "measured" / "snapshots").exists()
    # without a metric the longest average is the student
    student = tiny_trainer(name, steps=4, metric=None).fit(tmp_path / "unmeasured")
    assert student.training["best average"] == "power0.25"
    state = final_state(tmp_path / "unmeasured", 4)
    for key, value in student.denoiser.net.state_dict().items():
        assert torch.equal(value, state[f"/power/0.25/{key}"]), key
    tiny_trainer(name, steps=2, evaluate_every=2, power_ema=(0.1,)).fit(tmp_path / "given")
    assert [f.name for f in (tmp_path / "given" / "snapshots").iterdir()] == ["00000002-0.1.safetensors"]
    assert tiny_trainer(name, power_ema=()).power_ema == ()
    for wrong in ((0.3,), (0.0,), "0.1", ("wide",)):
        with pytest.raises(ValueError, match=r"power_ema=.*give some numbers in \(0, 0.29\)"):
            tiny_trainer(name, power_ema=wrong)


def test_power_averages_and_their_reconstruction() -> None:
    """Averages of another width, from snapshots, against the average itself (Karras et al. 2024)."""
    assert gamma_of_std(0.05) == pytest.approx(16.97, abs=0.01)  # the paper's 16.97 and 6.94
    assert gamma_of_std(0.10) == pytest.approx(6.94, abs=0.01)
    assert weights_of([(100, 0.05), (100, 0.1)], 100, 0.1).tolist() == pytest.approx([0, 1], abs=1e-9)
    net = nn.Linear(1, 1).double()
    averages = PowerAverages(net, (0.05, 0.1))
    direct = PowerAverages(net, (0.08,))
    path = torch.cumsum(torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0)
    keys, values = [], []
    for step, value in enumerate(path):
        with torch.no_grad():
            net.weight.fill_(value)
        for average in (averages, direct):
            average.update(step)
        if (step + 1) % 50 == 0:
            for name, kept in averages.nets.items():
                keys.append((step + 1, float(name)))
                values.append(float(kept.weight))
    made = float((weights_of(keys, 400, 0.08) * torch.tensor(values, dtype=torch.float64)).sum())
    assert made == pytest.approx(float(direct.nets["0.08"].weight), abs=0.02 * float(path.std()))
