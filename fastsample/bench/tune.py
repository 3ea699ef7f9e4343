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
    resolve_device,
)
from fastsample.conf import TuneConfig
from fastsample.errors import NonFiniteError
from fastsample.metrics import FeatureExtractor, GroupedMoments, estimate, parse_metric, to_uint8
from fastsample.metrics.frechet import RELIABLE_RATIO
from fastsample.tuning import tune as fit


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
        select = None if config.select is None else _selection(config, model, device)

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
                trajectories=config.trajectories,
                heldout=config.heldout,
                reference_steps=config.reference_steps,
                objective=config.objective,
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


def _selection(config: TuneConfig, model: Model, device: torch.device) -> Any:
    """The Frechet distance of the held-out samples to the training images."""
    assert config.select is not None
    name = parse_metric(config.select)
    source = config.train or embedded_data(config.model)[0]
    if source is None:
        raise ValueError(f"select={config.select}: images to compare with are needed; give train=FOLDER")
    extractor = FeatureExtractor(name.extractor, device=device)
    dim = extractor.dim(model.shape)
    if (config.heldout or 0) < RELIABLE_RATIO * dim:
        raise ValueError(
            f"select={config.select} has {dim} features: heldout={RELIABLE_RATIO * dim} samples are needed, "
            f"not {config.heldout}"
        )
    reference = load_images(source, model.shape).reference(extractor, Path(config.out) / "statistics", 500)

    def distance(x: Tensor) -> float:
        moments = GroupedMoments(dim)
        moments.update(extractor(to_uint8(x)), range(len(x)))
        return estimate(moments, reference).value

    return distance
