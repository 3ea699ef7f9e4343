"""The trainer: one loop for every method, which never loses work."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import select
from ..distributed import resolve_device
from ..errors import NonFiniteError, unknown
from ..identity import Probe, probe
from . import sharding
from .adapters import REFUSALS
from .batch import Batch
from .checkpoint import Checkpoints
from .data import Data, as_data
from .ema import Averages, PowerAverages, as_decays, as_widths
from .evaluation import Best, Evaluation, weights
from .limits import COUNT, POSITIVE, WEIGHT, Limit, check
from .method import Method
from .student import Student
from .weights import duplicate, load_own, own_parameters, own_state

log = logging.getLogger(__name__)

_LOG = "log.jsonl"
_RUN = "run.json"
_SCHEDULES = ("cosine", "constant")
_EVALUATIONS = 7000  # of the network, to measure one of its averages
_OPTIONAL = Limit(1, whole=True, optional=True)
_LIMITS = {
    **dict.fromkeys(("steps", "batch_size", "samples", "final_samples", "log_every", "keep"), COUNT),
    **dict.fromkeys(("micro_batch", "evaluate_every", "save_every"), _OPTIONAL),
    **dict.fromkeys(("warmup", "workers"), Limit(0, whole=True)),
    "learning_rate": Limit(0, above=True, optional=True),
    "weight_decay": WEIGHT,
    "clip": POSITIVE,
    "seed": Limit(whole=True),
}


@dataclass
class Trainer:
    """Trains a method's student.

    All randomness is a function of (seed, step, global sample index): the same settings give the same student,
    however often the training was killed and started again, and (up to the order of sums) with any micro-batch
    and any number of processes. Under ``accelerate launch`` or ``torchrun`` every process takes its share of
    each batch.

    Args:
        method: what is trained, see :mod:`fastsample.distill`.
        data: a name, a folder, tensors or a dataset, see :func:`fastsample.distill.data.as_data`; only its
            conditions are used by methods that need no data; None where there are none either.
        steps: updates.
        batch_size: samples of an update, over all processes.
        micro_batch: samples at once on one process; by default all of its share. Halved when memory runs out.
        learning_rate, betas, schedule: of AdamW; by default the method's. "cosine" falls to zero.
        weight_decay, warmup, clip: decoupled decay, updates of linear warm-up, largest norm of the gradient (inf
            clips nothing).
        ema: decays of the averages of the student's weights; the best by the metric, of these and of ``power_ema``,
            is the student.
        power_ema: relative widths of power-function averages, below 0.29; by default the method's. Of widths that are
            given here snapshots are written every ``evaluate_every`` updates, which allow any other width afterwards
            (:func:`fastsample.distill.ema.reconstructed`).
        precision: "no", "fp16" or "bf16" (mixed, by accelerate).
        seed: of everything.
        metric: "fd-digits", "fid", ...; the student's distance to the data, at each of its numbers of steps.
        evaluate_every: updates between evaluations; by default a tenth of the training.
        samples: of an evaluation; by default 7,000 evaluations of the network make them, but at least 1,000: 7,000 of
            students of one step, 1,000 where 1, 2 and 4 steps are measured.
        best_at: the numbers of steps that choose the best: of the distances at these the largest counts; by
            default all of the student's.
        final_samples: of the last one, which the model card reports.
        save_every: updates between checkpoints; by default as evaluate_every. One process that is interrupted
            (Ctrl-C, SIGTERM) ends the update it is in and writes one more.
        keep: checkpoints kept.
        log_every: updates between lines of the log.
        workers: processes that read a dataset.
        progress: show a bar.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ValueError: settings that cannot be used; the message names them.
    """

    method: Method
    data: Any = None
    steps: int = 10_000
    batch_size: int = 256
    micro_batch: int | None = None
    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    schedule: str | None = None
    weight_decay: float = 0.0
    warmup: int = 100
    clip: float = 1.0
    ema: Sequence[float] = (0.99, 0.999)
    power_ema: Sequence[float] | None = None
    precision: str = "no"
    seed: int = 0
    metric: str | None = None
    evaluate_every: int | None = None
    samples: int | None = None
    best_at: Sequence[int] = ()
    final_samples: int = 10_000
    save_every: int | None = None
    keep: int = 2
    log_every: int = 50
    workers: int = 0
    progress: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"method is a {type(self.method).__name__}; give one of fastsample.distill, such as Shortcut(teacher)"
            )
        if self.samples is None:
            self.samples = max(1000, _EVALUATIONS // sum(self.method.steps))
        check(self, _LIMITS)
        if self.precision not in ("no", "fp16", "bf16"):
            raise unknown("precision", self.precision, ("no", "fp16", "bf16"))
        self.learning_rate = self.method.learning_rate if self.learning_rate is None else self.learning_rate
        self.betas = as_decays("betas", self.method.betas if self.betas is None else self.betas, 2)  # type: ignore[assignment]
        self.ema = as_decays("ema", self.ema)
        self._snapshots = bool(self.power_ema)
        self.power_ema = as_widths(self.method.power_ema if self.power_ema is None else self.power_ema)
        steps = self.method.steps
        if not isinstance(self.best_at, Sequence) or not all(k in steps for k in self.best_at):
            raise ValueError(
                f"best_at={self.best_at!r}: give numbers of steps that the student is measured at, of {steps}"
            )
        self.best_at = tuple(self.best_at) or steps
        resolve_device(self.device)  # refused here, and not after the method has been moved
        self.schedule = self.schedule or self.method.schedule
        if self.schedule not in _SCHEDULES:
            raise unknown("schedule", self.schedule, _SCHEDULES)
        tenth = max(1, self.steps // 10)
        self.evaluate_every = self.evaluate_every or tenth
        self.save_every = self.save_every or self.evaluate_every
        self._data = self._checked_data()

    def _checked_data(self) -> Data:
        method, shape = self.method, self.method.teacher.sample_shape
        if self.data is None:
            if method.uses_data:
                raise ValueError(
                    f"data is missing: {type(method).__name__} is trained on data; give a name, tensors or a dataset"
                )
            data = Data(torch.zeros(1, *method.sample_shape), name="none")
            self._check_conditions(data)
            return data
        data = as_data(self.data)
        if shape is not None and data.shape != shape:
            raise ValueError(
                f"data: its samples are of shape {data.shape}, the teacher's {shape}; resize or pad the data"
            )
        if shape is None:
            method.teacher = method.teacher.replace(sample_shape=data.shape)
            method._meaning = method._meaning.replace(sample_shape=data.shape)
        probe, _ = data.rows(range(min(64, len(data))), torch.device("cpu"))
        if not bool(torch.isfinite(probe).all()):
            raise ValueError("data: there are samples that are not finite")
        largest = float(probe.abs().max())
        if largest > 30:
            raise ValueError(
                f"data: values reach {largest:g}; diffusion models are trained on [-1, 1]: x / 127.5 - 1 for bytes"
            )
        self._check_conditions(data)
        if float(probe.min()) >= 0:
            data.check_range(method.teacher)
        return data

    def _check_conditions(self, data: Data) -> None:
        """Run the teacher once on data: a wrong condition is found before training, not after."""
        from .prediction import predict, state_dtype

        teacher = self.method.teacher
        extremes = data.extremes
        ends = {k: data.rows(pair, torch.device("cpu"))[1][k].tolist() for k, pair in extremes.items()}
        given = [f"{k} from {ends[k][0]} to {ends[k][1]}" if k in ends else k for k in data.names]
        which = [0, min(1, len(data) - 1), *(i for pair in extremes.values() for i in pair)]
        x, conditions = data.rows(which, teacher.device)
        x = x.to(state_dtype(teacher.dtype))
        t = torch.full((len(x),), teacher.process.t_start, dtype=torch.float64)
        space = "eps" if teacher.prediction in ("eps", "score") else "v"
        try:
            with torch.no_grad():
                predict(teacher, x, t, conditions, space).cpu()  # which waits for a device's own errors
        except REFUSALS as error:
            if isinstance(error, RuntimeError) and _out_of_memory(error):
                raise  # no matter of the data: the teacher does not fit
            reason = str(error) or type(error).__name__
            if self.data is None:
                raise ValueError(
                    f"data=None: the teacher cannot be run without conditions: {reason}; give data=, whose conditions "
                    "are used"
                ) from error
            if not given:
                remedy = "conditions belong with the samples: {'x': samples, 'labels': labels}"
            elif isinstance(error, (IndexError, RuntimeError)):
                remedy = "give conditions of the values, shapes and types that the network takes"
            else:
                remedy = "name them as the network does: {'x': samples, 'labels': labels}"
            raise ValueError(
                f"data: the teacher cannot be run on it (conditions: {', '.join(given) or 'none'}): {reason}; {remedy}"
            ) from error

    # -- training --------------------------------------------------------------------------------------------

    def fit(self, folder: str | Path, resume: bool | None = None) -> Student:
        """Train to the end, or go on where a killed training was; the student's folder is ``folder``.

        Args:
            folder: everything is written here: the student, ``log.jsonl``, ``checkpoints/``, ``samples/``.
            resume: True must find a checkpoint, False must find none; None takes what is there.

        Returns:
            The student with the best average of the weights.

        Raises:
            ValueError: the folder holds another training, or nothing to resume.
            NonFiniteError: the loss or the gradient is not finite; nothing was updated.
            OSError: the folder cannot be written; the last good checkpoint is named.
        """
        run = _Run(self, Path(folder), resume)
        run.train()
        return run.finish()

    def rate(self, step: int, elapsed: float) -> float:
        """The learning rate of an update; ``elapsed`` is the share of its fall that is over."""
        assert self.learning_rate is not None
        factor = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * elapsed))
        return self.learning_rate * factor

    def describe(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        kept = [
            "steps",
            "batch_size",
            "learning_rate",
            "betas",
            "schedule",
            "weight_decay",
            "warmup",
            "clip",
            "ema",
            "power_ema",
            "precision",
            "seed",
            "metric",
            "evaluate_every",
            "samples",
            "best_at",
        ]
        return {k: list(v) if isinstance(v := getattr(self, k), tuple) else v for k in kept}


class _Run:
    """One training in one folder."""

    def __init__(self, trainer: Trainer, folder: Path, resume: bool | None) -> None:
        self.trainer, self.folder = trainer, folder
        self.checkpoints = Checkpoints(folder / "checkpoints", trainer.keep)
        if resume and not self.checkpoints.steps():
            raise ValueError(
                f"resume=True, but {folder} has no checkpoint; leave resume out to start a training"
            )
        if resume is False and (self.checkpoints.steps() or (folder / "student.json").exists()):
            raise ValueError(
                f"resume=False, but {folder} holds a training; give another folder, or delete it"
            )
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        cpu = trainer.device == "cpu" or (launched and not torch.cuda.is_available())
        self.accelerator = sharding.accelerator_for(trainer.precision, cpu)
        self.sharded = bool(self.accelerator.is_fsdp2)
        if self.sharded and trainer.method.lora is not None:
            raise ValueError(
                "lora: the base of LoRA students is shared with the teacher and cannot be sharded; launch without "
                "FSDP, as DDP"
            )
        self.device = (
            self.accelerator.device if trainer.device in ("auto", "cpu") else torch.device(trainer.device)
        )
        self.main = self.accelerator.is_main_process
        self.method = method = copy.copy(trainer.method)
        # the method's own stay as they are
        method.nets = {name: duplicate(net) for name, net in trainer.method.nets.items()}
        method.teacher = _moved(trainer.method.teacher, self.device)
        self.data = trainer._data.near(self.device)
        self.seed = trainer.seed
        self.world = self.accelerator.num_processes
        if trainer.batch_size % self.world:
            raise ValueError(f"batch_size={trainer.batch_size} does not divide among {self.world} processes")
        self.share = trainer.batch_size // self.world
        self.micro = min(self.share, trainer.micro_batch or self.share)
        self.identity = self._identity()
        method.begin(trainer.steps)
        for net in method.nets.values():
            net.to(self.device)
        self.averages = Averages(method.nets["student"], trainer.ema)
        self.power = PowerAverages(method.nets["student"], trainer.power_ema)  # type: ignore[arg-type]
        # an unsharded network for what one process does alone: measuring and writing the student
        self.spare = duplicate(method.nets["student"]).eval().requires_grad_(False) if self.sharded else None
        self.plain = dict(method.nets)  # before any wrapper
        self.wrapped: dict[str, nn.Module] = {}
        self.own: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, Any] = {}
        for role in method.trained:
            net = method.nets[role]
            optimizer = torch.optim.AdamW(
                own_parameters(net),
                lr=trainer.learning_rate,  # type: ignore[arg-type]
                betas=trainer.betas,  # type: ignore[arg-type]
                weight_decay=trainer.weight_decay,
                fused=True,  # one pass over the weights, on the CPU too
            )
            self.wrapped[role], self.optimizers[role] = self.accelerator.prepare(net, optimizer)
            self.own[role] = own_parameters(net)
        if self.sharded:
            self._shard_others()
        # accelerate's own step looks for an optional package every time; it is needed for a scaler and on TPUs
        self.wrapped_step = self.accelerator.scaler is not None or self.accelerator.distributed_type == "XLA"
        self.best = Best(folder / "best.safetensors")
        self.evaluation = Evaluation(
            trainer.metric,
            trainer.samples,  # type: ignore[arg-type]
            self.data,
            self.device,
            decode=method.teacher.decode,
        )
        self.step = 0
        self.stopped: int | None = None
        self.dtype = _state_dtype(method.nets["student"])
        self._claim()  # once nothing is left that could be refused
        self._restore()

    def _shard_others(self) -> None:
        """Shard what is not trained as well: averages and targets follow the shards of the student."""
        followers = (self.averages, self.power)
        others = [net for role, net in self.plain.items() if role not in self.method.trained]
        for net in (*others, *(n for a in followers for n in a.nets.values())):
            sharding.shard(self.accelerator, net)
        for average in followers:
            average.follow(self.plain["student"])

    # -- states, whole ones: in every process, or sharded, in the first --------------------------------------

    def _state(self, net: nn.Module) -> dict[str, Tensor]:
        return sharding.full_state(net) if self.sharded else own_state(net)

    def _load(self, net: nn.Module, state: dict[str, Tensor]) -> None:
        (sharding.load_full if self.sharded else load_own)(net, state)

    def _whole(self, net: nn.Module) -> nn.Module:
        """An average with all its weights, in the first process; all must call this. The next call overwrites it."""
        if self.spare is None:
            return net
        state = sharding.full_state(net)
        if self.main:
            self.spare.load_state_dict(state)
        return self.spare

    # -- the folder ------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        trainer, method = self.trainer, self.method
        data, teacher = trainer._data, method.teacher
        conditions = data.conditions(torch.arange(3), self.device)
        return {
            "method": {"name": type(method).__name__, **method.settings},
            "trainer": trainer.describe(),
            "teacher": probe(teacher, (3, *method.sample_shape), conditions).to_dict(),
            "data": {"name": data.name, "sha256": data.sha256},
        }

    def _claim(self) -> None:
        """Make the folder ours, or refuse it when it holds another training."""
        file = self.folder / _RUN
        own = json.loads(json.dumps(self.identity, default=str))
        # a training that never came to a checkpoint is nobody's
        if file.exists() and (self.checkpoints.steps() or (self.folder / "student.json").exists()):
            try:
                other = json.loads(file.read_text())
                before = Probe.from_dict(other.pop("teacher"))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} is damaged ({error!r}): it says whose the checkpoints beside it are; delete it to go on "
                    "with these settings"
                ) from error
            why = Probe.from_dict(own.pop("teacher")).differs(before)
            if differences := _different(other, own) + ([] if why is None else [f"teacher: {why}"]):
                raise ValueError(
                    f"{self.folder} holds another training: {'; '.join(differences)}; give another folder, or the "
                    "same settings"
                )
            return
        if not self.main:
            return
        from ..plan import write_atomically

        try:
            write_atomically(file, json.dumps(own, indent=1).encode())
        except OSError as error:
            raise OSError(
                error.errno, f"{self.folder} cannot be written: {error.strerror or error}"
            ) from error

    def _restore(self) -> None:
        found = self.checkpoints.load("cpu" if self.sharded else self.device)
        if found is None:
            self._truncate(0)
            return
        self.step, state = found
        for name, net in self.plain.items():
            self._load(net, state["nets"][name])
        for role, optimizer in self.optimizers.items():
            own = state["optimizers"][role]
            if self.sharded:
                sharding.load_full_optimizer(self.plain[role], optimizer.optimizer, own)
            else:
                optimizer.load_state_dict(own)
        for name, net in self.averages.nets.items():
            self._load(net, state["ema"][name])
        for name, net in self.power.nets.items():
            self._load(net, state["power"][name])
        self.best.load_state_dict(state["best"])
        self.method.load_state_dict(state["method"])
        if self.main and self.best.value is not None and self.best.load() is None:
            log.warning(
                "%s is not the one of the checkpoint (damaged, or of a later update); the best is chosen anew from "
                "step %d on",
                self.best.file,
                self.step,
            )
            self.best.forget()
        if (scaler := self.accelerator.scaler) is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self._truncate(self.step)
        message = f"resuming {self.folder} from step {self.step} of {self.trainer.steps}"
        log.info(message)
        if self.main and self.trainer.progress:
            print(message)

    def _truncate(self, step: int) -> None:
        """Drop the log's lines of updates that will be made again."""
        file = self.folder / _LOG
        if not self.main or not file.exists():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by the kill
        from ..plan import write_atomically

        write_atomically(file, "".join(f"{line}\n" for line in kept).encode())

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.main and not self.sharded:
            return
        scaler = self.accelerator.scaler
        state = {
            "nets": {name: self._state(net) for name, net in self.plain.items()},
            "optimizers": {
                role: sharding.full_optimizer(self.plain[role], o.optimizer)
                if self.sharded
                else o.state_dict()
                for role, o in self.optimizers.items()
            },
            "ema": {name: self._state(net) for name, net in self.averages.nets.items()},
            "power": {name: self._state(net) for name, net in self.power.nets.items()},
            "best": self.best.state_dict(),
            "method": self.method.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
        if self.main:
            self.checkpoints.save(self.step, state)

    # -- the loop --------------------------------------------------------------------------------------------

    def train(self) -> None:
        trainer, method = self.trainer, self.method
        if self.step >= trainer.steps:
            return
        method.prepare(trainer._data, self.folder, seed=self.seed, progress=trainer.progress and self.main)
        rank = self.accelerator.process_index
        place = torch.arange(rank * self.share, (rank + 1) * self.share)
        indices = [step * trainer.batch_size + place for step in range(self.step, trainer.steps)]
        batches = self.data.batches(indices, self.device, self.seed, trainer.workers)
        started, first = time.perf_counter(), self.step
        with (
            self._stopping(),
            _bar(trainer, self.main, self.step) as tick,
            _Log(self.folder) if self.main else nullcontext() as lines,
        ):
            for index, (x, conditions) in zip(indices, batches, strict=True):
                batch = Batch(
                    index,
                    method.sample_shape,
                    x.to(self.dtype),
                    conditions,
                    self.seed,
                    self.step,
                    trainer.batch_size,
                    self.device,
                    self.dtype,
                )
                losses = self._update(batch)
                method.after_update(self.step)
                self.averages.update(self.step)
                self.power.update(self.step)
                self.step += 1
                if self.step % trainer.log_every == 0 or self.step == trainer.steps:
                    speed = (self.step - first) * trainer.batch_size / (time.perf_counter() - started)
                    if lines is not None:
                        lines.write(self.step, losses, {"seconds": time.perf_counter() - started})
                    tick(self.step, losses, speed)
                if self.step % trainer.evaluate_every == 0 or self.step == trainer.steps:  # type: ignore[operator]
                    measured = self._evaluate()
                    if lines is not None and measured:
                        lines.write(self.step, measured, {})
                due = self.step % trainer.save_every == 0 or self.step == trainer.steps  # type: ignore[operator]
                if due or self.stopped is not None:
                    self._save()
                if self.stopped is not None:
                    log.warning(
                        "stopped at step %d of %d; the same command goes on", self.step, trainer.steps
                    )
                    raise (
                        KeyboardInterrupt if self.stopped == signal.SIGINT else SystemExit(128 + self.stopped)
                    )

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """An interruption waits for the end of the update; a second one does not."""
        if self.world > 1 or threading.current_thread() is not threading.main_thread():
            yield  # processes that are told at different updates would wait for each other
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def stop(number: int, frame: Any) -> None:
            self.stopped = number
            put_back()

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            put_back()

    def _update(self, batch: Batch) -> dict[str, float]:
        """One update of each of the step's roles."""
        losses: dict[str, float] = {}
        scaled = self.accelerator.scaler is not None  # which leaves out updates that overflow
        rate = self.trainer.rate(batch.step, self.method.elapsed(batch.step, self.trainer.steps))
        for role in self.method.roles(batch.step):
            optimizer = self.optimizers[role]
            for group in optimizer.param_groups:
                group["lr"] = rate
            while True:
                try:
                    loss = self._gradient(batch, role)
                    break
                except RuntimeError as error:
                    if not _out_of_memory(error) or self.micro == 1 or self.world > 1:
                        raise
                    self.micro = max(1, self.micro // 2)
                    optimizer.zero_grad(set_to_none=True)
                    log.warning(
                        "step %d ran out of memory; the micro-batch is %d from here on",
                        batch.step,
                        self.micro,
                    )
            clipped = self._clipped(role)
            # one synchronisation with the device for both
            value, norm = torch.stack([self.accelerator.reduce(loss, "mean"), clipped]).tolist()
            if not math.isfinite(value) or (not math.isfinite(norm) and not scaled):
                what = "loss" if not math.isfinite(value) else "gradient"
                raise NonFiniteError(
                    f"the {what} of {role!r} is not finite at step {batch.step} (seed {self.seed}, samples "
                    f"{batch.step * self.trainer.batch_size} on; loss {value}, gradient norm {norm}); nothing was "
                    f"updated; {self.checkpoints.last_good()}; try a smaller learning_rate or clip"
                )
            (optimizer if self.wrapped_step else optimizer.optimizer).step()
            optimizer.zero_grad(set_to_none=True)
            losses[f"loss.{role}"] = value
            losses[f"norm.{role}"] = norm
        return losses

    def _gradient(self, batch: Batch, role: str) -> Tensor:
        """The gradient of the mean loss, micro-batch by micro-batch."""
        accelerator, method = self.accelerator, self.method
        total = torch.zeros((), device=self.device)
        parts = [slice(i, min(i + self.micro, len(batch))) for i in range(0, len(batch), self.micro)]
        # only the trained role is synchronised between processes
        method.nets = {**self.plain, role: self.wrapped[role]}
        # gathered parameters keep their first requires_grad: the others' gradients are dropped instead
        switched = nullcontext(self.wrapped[role]) if self.sharded else method.training(role)
        with switched as net:
            for i, rows in enumerate(parts):
                part = _rows(batch, rows)
                self._seed(_mixed(self.seed, batch.step, role, int(part.index[0])))
                last = i == len(parts) - 1
                with nullcontext() if last else accelerator.no_sync(net):
                    with accelerator.autocast():
                        loss = method.loss(part, role)
                    if loss.shape != (len(part),):
                        raise ValueError(
                            f"{type(method).__name__}.loss gave shape {tuple(loss.shape)}; give one loss a sample, "
                            f"({len(part)},)"
                        )
                    value = loss.float().sum() / len(batch)
                    accelerator.backward(value)
                total += value.detach()
        method.nets = self.plain
        if self.sharded:
            for other in self.plain.values():
                sharding.reshard(other)
            for name, optimizer in self.optimizers.items():
                if name != role:
                    optimizer.zero_grad(set_to_none=True)
        return total

    def _clipped(self, role: str) -> Tensor:
        """Clip the gradient of a role; its norm."""
        if not self.sharded:
            return self.accelerator.clip_grad_norm_(self.own[role], self.trainer.clip)
        self.accelerator.unscale_gradients()
        norm: Any = torch.nn.utils.clip_grad_norm_(self.own[role], self.trainer.clip)
        return norm.full_tensor()  # of a DTensor

    def _seed(self, seed: int) -> None:
        """Seed torch's own generators, of which dropout draws: the CPU's and that of the training's device."""
        # torch.manual_seed also notes down the stack, for good, where CUDA was not initialised
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    # -- what comes out --------------------------------------------------------------------------------------

    def student(self, net: nn.Module) -> Student:
        """A student with these weights."""
        method = self.method
        dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
        denoiser = method.denoiser().replace(net=net, dtype=dtype)
        name = next(
            (k for k, (_, c) in _methods().items() if c == type(method).__name__), type(method).__name__
        )
        settings = {k: v for k, v in method.settings.items() if v is not None}
        return Student(
            denoiser, method.solver, method.solver_options, method.steps, {"name": name, **settings}
        )

    def candidates(self) -> dict[str, nn.Module]:
        """The averages of which the best is the student, by name; power-function averages last."""
        return {
            f"{kind}{rate}": net
            for kind, averages in (("ema", self.averages), ("power", self.power))
            for rate, net in averages.nets.items()
        }

    def _evaluate(self) -> dict[str, Any]:
        from safetensors.torch import save

        from ..plan import write_atomically

        if not self.main and not self.sharded:
            return {}
        trainer = self.trainer
        results: dict[str, Any] = {}
        candidates = self.candidates()
        for name, average in candidates.items():
            if self.evaluation.metric is None:
                continue
            net = self._whole(average)
            if not self.main:
                continue
            student = self.student(net)
            distances = {k: self.evaluation.distance(student, k).value for k in student.steps}
            results |= {f"{trainer.metric}.{name}.{k}": v for k, v in distances.items()}
            self.best.offer(max(distances[k] for k in trainer.best_at), self.step, name, net)
        if self.evaluation.metric is None:
            # the longest average, by the order in which they are usually given
            name = list(candidates)[-1]
            net = self._whole(candidates[name])
            self.best.value = None
            if self.main:
                self.best.offer(0.0, self.step, name, net)
        shown = self._agreed(self.best.average or name)
        net = self._whole(candidates[shown])
        if self.main:
            self.evaluation.pictures(self.student(net), self.folder / "samples" / f"{self.step:08d}.png")
        for std, average in self.power.nets.items() if trainer._snapshots else ():
            net = self._whole(average)
            if self.main:
                file = self.folder / "snapshots" / f"{self.step:08d}-{std}.safetensors"
                write_atomically(file, save(weights(net)))
        return results

    def _agreed(self, value: Any) -> Any:
        """What the first process says, in all that are here."""
        if not self.sharded:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def finish(self) -> Student:
        """The best student, measured, in its folder."""
        from safetensors.torch import load_file

        from .student import load

        trainer, folder = self.trainer, self.folder
        self.accelerator.wait_for_everyone()
        if self._agreed(self.main and self.best.load() is None):
            log.warning(
                "%s is not the one that was written; the student is the end of the training", self.best.file
            )
            self.best.forget()
            self._evaluate()
            self.accelerator.wait_for_everyone()
        net = duplicate(next(iter(self.averages.nets.values())) if self.spare is None else self.spare)
        load_own(net, load_file(self.best.file))
        student = self.student(net.eval())
        if not self.main:
            return student
        if (folder / "manifest.json").is_file():
            try:
                kept = load(folder, net, device=self.device)
            except ValueError as error:
                log.warning("%s; it is written again", error)
            else:  # functions are in no folder
                given = self.method.teacher
                kept.denoiser = kept.denoiser.replace(encode=given.encode, decode=given.decode)
                return kept
        if self.evaluation.metric is not None:
            final = Evaluation(
                trainer.metric,
                trainer.final_samples,
                self.data,
                self.device,
                decode=self.method.teacher.decode,
            )
            for k in student.steps:
                found = final.distance(student, k, seed=1)
                student.measured.append(
                    {
                        "steps": k,
                        str(trainer.metric): found.value,
                        "standard error": found.se,
                        "samples": found.n,
                    }
                )
        student.training = {
            **self.identity["trainer"],
            "data": trainer._data.name,
            "teacher": self.method.teacher.source,
            "classes": trainer._data.classes,
            "best step": self.best.step,
            "best average": self.best.average,
        }
        student.save(folder)
        return student


def _state_dtype(net: nn.Module) -> torch.dtype:
    """Of the states that a network is trained on: double where it is, else single precision."""
    return torch.float64 if any(p.dtype == torch.float64 for p in net.parameters()) else torch.float32


def _methods() -> dict[str, tuple[str, str]]:
    from . import METHODS

    return METHODS


def _moved(denoiser: Any, device: torch.device) -> Any:
    if isinstance(denoiser.net, nn.Module):
        denoiser.net.to(device)
    return denoiser


def _rows(batch: Batch, rows: slice) -> Batch:
    """A part of a batch."""
    if rows == slice(0, len(batch)):
        return batch
    import dataclasses

    return dataclasses.replace(
        batch,
        index=batch.index[rows],
        x=None if batch.x is None else batch.x[rows],
        conditions=select(dict(batch.conditions), rows, len(batch)),
    )


def _mixed(*parts: Any) -> int:
    """A seed for torch's own generator (dropout), from what it shall depend on."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _different(a: Any, b: Any, name: str = "") -> list[str]:
    """What differs between two nested settings, in words."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            d
            for key in {**a, **b}
            for d in _different(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if a == b else [f"{name} was {a!r}, is {b!r}"]


class _Log:
    """``log.jsonl``: one line for each report; TensorBoard beside it where it is installed."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / _LOG).open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board: Any = SummaryWriter(str(folder / "tensorboard"))
        except ImportError:
            self._board = None

    def write(self, step: int, values: Mapping[str, Any], timing: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values, **timing}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key.replace(".", "/"), value, step)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


@contextmanager
def _bar(trainer: Trainer, main: bool, step: int) -> Iterator[Any]:
    if not (trainer.progress and main):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=trainer.steps, completed=step, state="")

        def tick(step: int, losses: Mapping[str, float], speed: float) -> None:
            loss = " ".join(f"{v:.4g}" for k, v in losses.items() if k.startswith("loss"))
            bar.update(task, completed=step, state=f"loss {loss}  {speed:.0f} images/s")

        yield tick
