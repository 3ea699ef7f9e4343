"""``fastsample tune``: plans fitted to a model, written beside the progress of the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample.bench.data import embedded_data, load_images
from fastsample.bench.errors import UserError, checking
from fastsample.bench.model import (
    Model,
    check_conditions,
    check_names,
    draw_labels,
    load_model,
)
from fastsample.conf import TuneConfig
from fastsample.distributed import resolve_device
from fastsample.errors import NonFiniteError
from fastsample.metrics import FeatureExtractor, GroupedMoments, estimate, parse_metric, to_uint8
from fastsample.metrics.frechet import RELIABLE_RATIO
from fastsample.tuning import Moments
from fastsample.tuning import tune as fit
from fastsample.tuning.fit import default_trajectories

_MATCHED_RATIO = 40  # trajectories a feature: the moments of fewer are mostly their own noise


def tune(config: TuneConfig) -> list[Path]:
    """Fit the plans and write them to the folder ``config.out``; each is printed.

    Returns:
        The files, one for each number of steps.

    Raises:
        UserError: on settings that cannot be used (before the fit), or a network that fails.
    """
    with checking():
        if config.threads is not None:
            if config.threads < 1:
                raise ValueError(f"threads={config.threads}: at least 1 is needed")
            torch.set_num_threads(config.threads)
        if config.start is not None:
            check_names(config.start, None)
        if isinstance(config.labels, list):
            raise ValueError(f"labels={config.labels!r}: tuning takes auto, null or one label")
        device = resolve_device(config.device)
        model = load_model(
            config.model, shape=config.shape, classes=config.classes, guidance=config.guidance, device=device
        )
        one = draw_labels(config.labels, model.classes, config.seed, torch.arange(1))
        check_conditions(model, () if one is None else ("labels",))
        trajectories, heldout = config.trajectories, config.heldout
        match = select = None
        if config.match is not None:
            judge = _Judge("match", config, model, device)
            reference = judge.reference.gaussian
            match = Moments(judge.features, reference.mean, reference.cov, config.match_weight)
            trajectories = trajectories or max(default_trajectories(model.shape), _MATCHED_RATIO * judge.dim)
            heldout = judge.enough(heldout)
        if config.select is not None:
            judge = _Judge("select", config, model, device)
            select, heldout = judge.distance, judge.enough(heldout)

    def conditions(index: Tensor) -> dict[str, Any]:
        labels = draw_labels(config.labels, model.classes, config.seed, index.to(device))
        return {} if labels is None else {"labels": labels}

    steps = [config.steps] if isinstance(config.steps, int) else list(config.steps)
    out = Path(config.out)
    with checking():
        try:
            plans = fit(
                model.denoiser,
                steps,
                model.shape,
                seed=config.seed,
                start=config.start,
                end=config.end,
                conditions=conditions,
                trajectories=trajectories,
                heldout=heldout,
                reference_steps=config.reference_steps,
                objective=config.objective,
                match=match,
                select=select,
                free=config.free,
                constraints=config.constraints,
                history=config.history,
                relax=config.relax,
                iterations=config.iterations,
                patience=config.patience,
                budget=config.budget,
                batch_size=config.batch,
                folder=out,
                progress=True,
            )
        except NonFiniteError as error:
            raise UserError(str(error)) from error
    for plan in plans.values():
        print(plan, end="\n\n")
    return [out / f"tuned-{n}.json" for n in plans]


class _Judge:
    """An extractor's features, and their moments over the training images."""

    def __init__(self, option: str, config: TuneConfig, model: Model, device: torch.device) -> None:
        wanted = getattr(config, option)
        name = parse_metric(wanted)
        source = config.train or embedded_data(config.model)[0]
        if source is None:
            raise ValueError(f"{option}={wanted}: images to compare with are needed; give train=FOLDER")
        self.said = f"{option}={wanted}"
        self.extractor = FeatureExtractor(name.extractor, device=device)
        self.dim = self.extractor.dim(model.shape)
        images = load_images(source, model.shape)
        self.reference = images.reference(self.extractor, Path(config.out) / "statistics", 500)

    def enough(self, heldout: int | None) -> int:
        """The number of held-out samples: as given, or as many as a reliable distance needs."""
        needed = RELIABLE_RATIO * self.dim
        if heldout is not None and heldout < needed:
            raise ValueError(
                f"{self.said} has {self.dim} features: heldout={needed} samples are needed, not {heldout}"
            )
        return heldout or needed

    def features(self, x: Tensor) -> Tensor:
        """Of samples in [-1, 1], as 8-bit images."""
        return self.extractor(to_uint8(x))

    def distance(self, x: Tensor) -> float:
        """The Frechet distance of samples in [-1, 1]."""
        moments = GroupedMoments(self.dim)
        moments.update(self.features(x), range(len(x)))
        return estimate(moments, self.reference).value
