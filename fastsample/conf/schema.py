"""The commands' settings, one dataclass a command."""
# ruff: noqa: RUF009 (these calls make dataclass fields, with a fresh default for each instance)

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A setting with its documentation, which ``--help`` prints."""
    return field(default_factory=lambda: deepcopy(default), metadata={"help": help})


def group(schema: type) -> Any:
    """A group of settings, ``group.setting=value``."""
    return field(default_factory=schema, metadata={"schema": schema})


@dataclass
class SampleConfig:
    """Settings of ``fastsample sample``."""

    model: Any = option(
        "digits",
        "Embedded model by name, or your own: model._target_=my.module.make_model model.ARGUMENT=VALUE.",
    )
    solver: Any = option("auto", "Solver by name, or with options: 'solver={name: ddim, eta: 0.5}'.")
    steps: int = option(8, "Number of grid intervals.")
    grid: str | None = option(None, "Time grid by name; null: the solver's own.")
    end: str | None = option(None, "Where sampling ends: zero or sigma_min; null: the solver's own.")
    n: int = option(64, "Number of images.")
    seed: int = option(0, "Seed of the noise; image i depends on (seed, i) alone.")
    labels: Any = option(
        "auto",
        "Class labels: auto (drawn at random where the model has classes), null (unconditional), one label, "
        "or [0,1,2] (repeated in order).",
    )
    classes: int | None = option(
        None, "Number of classes of your own model, which then takes labels=[B]; embedded models know theirs."
    )
    guidance: float = option(1.0, "Classifier-free guidance scale; 1: none.")
    shape: list[int] | None = option(None, "Shape of one sample (C, H, W); null: what the model says.")
    batch: int = option(256, "Images sampled at once.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads; null: torch's choice.")
    out: str = option("runs/sample", "Folder for the images: 00000.png, ... and grid.png.")


@dataclass
class ReferenceConfig:
    """The model's own converged solution, which RMSE is measured against."""

    solver: Any = option("auto", "Solver of the reference solution; deterministic.")
    steps: int = option(200, "Its number of steps.")
    n: int = option(1000, "RMSE is measured on so many samples, the first ones.")


@dataclass
class BenchConfig:
    """Settings of ``fastsample bench``; the defaults are the demonstration on the embedded digits model."""

    model: Any = option(
        "digits",
        "Embedded model by name, or your own: model._target_=my.module.make_model model.ARGUMENT=VALUE.",
    )
    solvers: list[Any] = option(
        [
            "auto",
            "ddim",
            "lms",
            "ipndm",
            "deis",
            "dpm_solver_2m",
            "dpmpp_2m",
            "dpmpp_3m",
            "unipc",
            "diffusers:ddim",
            "diffusers:dpmpp_2m",
            "diffusers:unipc",
        ],
        "Solvers by name, or with options: 'solvers=[auto,{name: ddim, eta: 1}]'. diffusers:NAME is a scheduler "
        "of diffusers, kdiffusion:NAME a sampler of k-diffusion, {plan: FILE} a tuned plan, "
        "{_target_: my.module.sample} a function "
        "(denoiser, noise, steps, **conditions) -> samples.",
    )
    nfe: list[int] = option(
        [4, 5, 6, 8, 10, 15, 20, 50],
        "Budgets of network evaluations: every solver takes the most steps that stay within each.",
    )
    steps: list[int] | None = option(None, "Numbers of steps instead of budgets.")
    grids: list[str | None] = option([None], "Time grids by name; null: the solver's own.")
    seeds: list[int] = option([0], "Seeds; sample i starts from the noise (seed, i) in every cell.")
    end: str | None = option(
        "zero",
        "Where sampling ends: zero or sigma_min (one end for all is comparable); null: the solver's own.",
    )
    n: int = option(1000, "Number of samples in a cell.")
    metrics: list[str] | None = option(
        None,
        "fid, kid, precision, recall (Inception features), fd-NAME, kd-NAME, precision-NAME, recall-NAME (NAME "
        "registered with torch-fidelity, fd-digits, ...), isc, cmmd, clip-score, swd, psnr; null: that of the "
        "embedded model (fd-digits, ...), none for others. The headline is about the first.",
    )
    train: str | None = option(
        None,
        "Images that the metrics compare with: a folder, an .npz with mu and sigma, or digits:train, "
        "digits:heldout, digits:all; null: the embedded model's training set.",
    )
    heldout: str | None = option(
        None,
        "Images that the model was not trained on, as for train; null: the embedded model's held-out set.",
    )
    labels: Any = option(
        "auto",
        "Class labels: auto (drawn at random where the model has classes), null (unconditional), or one.",
    )
    classes: int | None = option(
        None, "Number of classes of your own model, which then takes labels=[B]; embedded models know theirs."
    )
    guidance: float = option(1.0, "Classifier-free guidance scale; 1: none.")
    reference: ReferenceConfig = group(ReferenceConfig)
    baseline: str = option(
        "ddim", "The solver that the headline compares with, at its largest number of evaluations."
    )
    shape: list[int] | None = option(None, "Shape of one sample (C, H, W); null: what the model says.")
    batch: int = option(500, "Images sampled at once.")
    images: int = option(10, "Images of each cell shown in the report.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads; null: torch's choice.")
    inception_weights: str | None = option(
        None,
        "File with the Inception weights for fid, kid, precision, recall, isc; null: torch-fidelity's cache.",
    )
    weights: dict[str, str] = option(
        {},
        "Local weights of other extractors: weights.clip=FOLDER (transformers' CLIP, for cmmd and clip-score), "
        "weights.dinov2-vit-l-14=FOLDER (a clone of facebookresearch/dinov2 with the weights file in it), "
        "weights.vgg16=FILE, ...",
    )
    feature_samples: int = option(
        10000,
        "kid, kd-NAME, cmmd, precision, recall and swd keep features in memory: those of the first so many samples "
        "and of as many images of train and heldout. All other metrics keep nothing.",
    )
    prompts: str | None = option(
        None,
        "Text file with one prompt a line, for text-to-image models; drawn in balance like labels. clip-score "
        "compares images with them.",
    )
    out: str = option(
        "runs/bench", "Run folder. Start the same command again after a kill: finished cells are kept."
    )


@dataclass
class TuneConfig:
    """Settings of ``fastsample tune``."""

    model: Any = option(
        "digits",
        "Embedded model by name, or your own: model._target_=my.module.make_model model.ARGUMENT=VALUE.",
    )
    steps: Any = option([5], "Network evaluations of the result, a number or a list: one plan for each.")
    seed: int = option(0, "Seed of the trajectories' noise, a stream of its own.")
    start: str | None = option(None, "Solver to start from; null: the best training-free one.")
    end: str | None = option(
        "zero", "Where sampling ends: zero (as in fastsample bench) or sigma_min; null: as solver=auto."
    )
    labels: Any = option(
        "auto",
        "Class labels: auto (drawn at random where the model has classes), null (unconditional), or one.",
    )
    classes: int | None = option(
        None, "Number of classes of your own model, which then takes labels=[B]; embedded models know theirs."
    )
    guidance: float = option(1.0, "Classifier-free guidance scale that the plan is tuned for; 1: none.")
    shape: list[int] | None = option(None, "Shape of one sample (C, H, W); null: what the model says.")
    trajectories: int | None = option(None, "Trajectories to fit to; null: 256, more for small samples.")
    heldout: int | None = option(None, "Trajectories to select on; null: half as many.")
    reference_steps: int = option(100, "Steps of the model's own solution.")
    objective: str = option("huber", "huber (a few samples that end in another mode do not decide) or rmse.")
    select: str | None = option(
        None,
        "Frechet metric of the held-out samples that decides which iteration is the result: fd-digits, ...; "
        "null: the objective.",
    )
    match: str | None = option(
        None,
        "Frechet metric whose features' moments the samples shall have, beside a small error: fd-digits, ...; "
        "null: the error alone.",
    )
    match_weight: float = option(
        1.0, "How much match= counts beside the error, each relative to the best start's."
    )
    train: str | None = option(None, "Images for select= and match=, as in fastsample bench.")
    free: list[str] = option(["grid", "coefficients", "time"], "What is tuned.")
    constraints: list[str] = option([], "consistency: rows stay exact for constant predictions.")
    history: int = option(4, "Predictions that a row may read.")
    relax: float = option(0.0, "How far the fitted trajectories' noise may move (LD3); 0: not.")
    iterations: int = option(30, "At most so many.")
    patience: int = option(6, "Stop after so many without progress on held-out noise.")
    budget: Any = option(None, "Stop each fit after 300 (seconds), '5 min' or '100000 evaluations'.")
    batch: int = option(64, "Trajectories at once.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads; null: torch's choice.")
    out: str = option(
        "runs/tuned", "Folder for tuned-STEPS.json. Start the same command again after a kill: it goes on."
    )


@dataclass
class TrainerConfig:
    """The training."""

    steps: int = option(3000, "Updates.")
    batch_size: int = option(256, "Samples of an update, over all processes.")
    micro_batch: int | None = option(None, "Samples at once; null: all. Halved when memory runs out.")
    learning_rate: float | None = option(None, "Of AdamW; null: the method's.")
    betas: list[float] | None = option(None, "Of AdamW, two numbers; null: the method's.")
    schedule: str | None = option(None, "cosine or constant; null: the method's.")
    weight_decay: float = option(0.0, "Decoupled weight decay.")
    warmup: int = option(100, "Updates of linear warm-up.")
    clip: float = option(1.0, "Largest norm of the gradient.")
    ema: list[float] = option([0.99, 0.999], "Decays of the averages; the best is the student.")
    power_ema: list[float] | None = option(
        None, "Relative widths of power-function averages, with snapshots; null: the method's, without."
    )
    precision: str = option("no", "no, fp16 or bf16.")
    save_every: int | None = option(None, "Updates between checkpoints; null: as evaluation.every.")
    keep: int = option(2, "Checkpoints kept.")
    log_every: int = option(50, "Updates between lines of log.jsonl.")
    workers: int = option(0, "Processes that read a dataset.")


@dataclass
class EvaluationConfig:
    """What is measured during the training."""

    metric: str | None = option(
        "auto", "fd-digits, fid, ...; null: none; auto: fd-digits for the embedded digits, none for others."
    )
    every: int | None = option(None, "Updates between evaluations; null: a tenth of the training.")
    samples: int | None = option(
        None, "Samples of an evaluation; null: those of 7,000 evaluations of the network, at least 1,000."
    )
    best_at: list[int] = option(
        [], "The best has the least distance at these numbers of steps (the largest counts); empty: at all."
    )
    final_samples: int = option(10000, "Samples of the last one, which the model card reports.")


@dataclass
class DistillConfig:
    """Settings of ``fastsample distill``."""

    method: Any = option(
        "consistency",
        "consistency, ict, ect, scm, shortcut, meanflow, progressive, reflow, knowledge, sid, dmd2 or lcm; its "
        "own settings are method.NAME=VALUE (fastsample distill method=NAME --cfg job prints them). Or your own: "
        "method._target_=my.module.MyMethod, a subclass of fastsample.distill.Method.",
    )
    teacher: Any = option(
        "digits",
        "Embedded model by name, or your own: teacher._target_=my.module.make_model teacher.ARGUMENT=VALUE.",
    )
    data: Any = option(
        "auto",
        "digits, fashion-mnist, cifar10, a folder of images, or your own dataset: "
        "data._target_=my.module.make_dataset; auto: the embedded teacher's; null: none.",
    )
    guidance: float = option(1.0, "Classifier-free guidance scale of the teacher; 1: none.")
    shape: list[int] | None = option(None, "Shape of one sample (C, H, W); null: what the teacher says.")
    trainer: TrainerConfig = group(TrainerConfig)
    evaluation: EvaluationConfig = group(EvaluationConfig)
    seed: int = option(0, "Seed of everything.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads; null: torch's choice.")
    out: str = option(
        "runs/student", "Folder of the student. Start the same command again after a kill: it goes on."
    )
    resume: bool | None = option(None, "true: there must be something to resume; false: there must not.")


@dataclass
class ReportConfig:
    """Settings of ``fastsample report``."""

    run: str = option("runs/bench", "Run folder of ``fastsample bench``.")
    runs: list[str] | None = option(
        None, "Several run folders on one axis, instead of run=; they need the same metrics and images."
    )
    out: str | None = option(
        None,
        "Folder for report.html, results.json and results.csv; null: the run folder (runs=: runs/merged).",
    )


@dataclass
class CompareConfig:
    """Settings of ``fastsample compare``."""

    a: str | None = option(None, "Run folder, before.")
    b: str | None = option(None, "Run folder, after.")
    gate: bool = option(False, "Exit with status 1 when any distance got worse beyond two standard errors.")


@dataclass
class DoctorConfig:
    """Settings of ``fastsample doctor``: none."""
