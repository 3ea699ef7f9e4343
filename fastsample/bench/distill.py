"""``fastsample distill``: train a student from settings."""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsample import distill as methods
from fastsample.bench.errors import UserError, checking
from fastsample.bench.model import load_model
from fastsample.conf import DistillConfig
from fastsample.distill.data import as_data
from fastsample.distill.method import NO_SETTINGS
from fastsample.distributed import rank_and_size, resolve_device
from fastsample.errors import NonFiniteError, nearest
from fastsample.zoo import MODELS


def distill(config: DistillConfig) -> Path:
    """Train the student and write it to the folder ``config.out``.

    Returns:
        The folder.

    Raises:
        UserError: on settings that cannot be used (before training), or a training that cannot go on; what was
            trained so far is kept.
    """
    if rank_and_size()[0] == 0:
        logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    with checking():
        if config.threads is not None:
            if config.threads < 1:
                raise ValueError(f"threads={config.threads}: at least 1 is needed")
            torch.set_num_threads(config.threads)
        device = resolve_device(config.device)
        model = load_model(
            config.teacher, shape=config.shape, guidance=config.guidance, device=device, setting="teacher"
        )
        teacher = model.denoiser.replace(sample_shape=model.shape)
        data = make_data(config)
        data = data if data is None else as_data(data)
        example = None if data is None else data.conditions(torch.arange(2), device)
        try:
            method = make_method(config.method, teacher, example)
        except TypeError as error:
            raise ValueError(str(error)) from error
        settings = dict(vars(config.trainer))
        metric = config.evaluation.metric
        if metric == "auto":
            own = MODELS.get(config.teacher) if isinstance(config.teacher, str) else None
            metric = own.metric if own is not None and config.data == "auto" else None
        trainer = methods.Trainer(
            method,
            data,
            **settings,
            seed=config.seed,
            metric=metric,
            evaluate_every=config.evaluation.every,
            samples=config.evaluation.samples,
            best_at=config.evaluation.best_at,
            final_samples=config.evaluation.final_samples,
            progress=True,
            device=config.device,
        )
        try:
            trainer.fit(config.out, resume=config.resume)
        except NonFiniteError as error:
            raise UserError(str(error)) from error
    return Path(config.out)


def make_method(settings: Any, teacher: Any, example: Mapping[str, Any] | None = None) -> Any:
    """A method from ``"shortcut"``, ``{"name": "shortcut", "finest": 64}`` or ``{"_target_": "my.module.MyMethod"}``.

    Raises:
        ValueError: an unknown method or setting (the message has the nearest one), or a target that is no method.
    """
    import dataclasses

    given = dict(settings) if isinstance(settings, Mapping) else {"name": settings}
    name = given.pop("name", None)
    if "_target_" in given:
        target = given.pop("_target_")
        if name is not None:
            raise ValueError(
                f"method={name} and method._target_={target}: give one of them (in a configuration file, "
                "`override method: null` among its defaults takes the first away)"
            )
        name, kind = target, own_method(target)
    elif name not in methods.METHODS:
        raise ValueError(f"method={name!r} is unknown; {nearest(name, methods.METHODS)}")
    else:
        kind = getattr(methods, methods.METHODS[name][1])
    known = [f.name for f in dataclasses.fields(kind) if f.name not in NO_SETTINGS]
    for key in given:
        if key not in known:
            raise ValueError(f"method.{key} is no setting of {name}; {nearest(key, known)}")
    return kind(teacher, example_conditions=example, **given)


def own_method(target: Any) -> type[methods.Method]:
    """The class that ``method._target_=`` names.

    Raises:
        ValueError: there is none of this name, or it is no method.
    """
    try:
        kind = pkgutil.resolve_name(str(target))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method._target_={target} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, methods.Method)):
        raise ValueError(f"method._target_={target} is no subclass of fastsample.distill.Method")
    return kind


def make_data(config: DistillConfig) -> Any:
    """What ``data=`` names; a ``_target_`` is called.

    Raises:
        ValueError: a target that fails, or auto for a teacher of one's own.
    """
    if isinstance(config.data, Mapping) and "_target_" in config.data:
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        try:
            return instantiate(dict(config.data))
        except InstantiationException as error:
            raise ValueError(f"data._target_={config.data['_target_']}: {error}") from error
    if config.data != "auto":
        return config.data
    if not isinstance(config.teacher, str) or config.teacher not in MODELS:
        raise ValueError(
            "data=auto: your own teacher has no data of its own; give data=FOLDER, a name, or null"
        )
    return MODELS[config.teacher].data
