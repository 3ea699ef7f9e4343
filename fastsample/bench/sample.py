"""``fastsample sample``: images and a grid of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample.bench.errors import UserError, checking
from fastsample.bench.model import (
    check_conditions,
    check_names,
    draw_labels,
    load_model,
    make_sampler,
    student_folder,
)
from fastsample.conf import SampleConfig
from fastsample.distributed import resolve_device
from fastsample.errors import NonFiniteError
from fastsample.metrics import to_uint8

_GRID_PIXELS = 1024  # small images are enlarged, by a whole factor, to about so many pixels in the grid


def sample(config: SampleConfig) -> Path:
    """Write ``n`` PNG images and ``grid.png`` to the folder ``config.out``; the plan is printed.

    Returns:
        Path of the grid.

    Raises:
        UserError: on settings that cannot be used (before any work), or a network that fails.
    """
    with checking():
        for name in ("n", "batch"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: at least 1 is needed")
        if config.threads is not None:
            if config.threads < 1:
                raise ValueError(f"threads={config.threads}: at least 1 is needed")
            torch.set_num_threads(config.threads)
        solver = config.solver
        if student_folder(config.model) and solver == "auto":
            solver = {"student": config.model}
        check_names(solver, config.grid)
        device = resolve_device(config.device)
        model = load_model(
            config.model, shape=config.shape, classes=config.classes, guidance=config.guidance, device=device
        )
        sampler = make_sampler(model.denoiser, solver, config.steps, config.grid, config.end)
        index = torch.arange(config.n, device=device)
        labels = draw_labels(config.labels, model.classes, config.seed, index)
        check_conditions(model, () if labels is None else ("labels",))
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
    print(sampler.plan)
    conditions: dict[str, Any] = {} if labels is None else {"labels": labels}
    try:
        x = sampler(
            shape=(config.n, *model.shape),
            seed=config.seed,
            batch_size=config.batch,
            device=device,
            progress=True,
            **conditions,
        )
    except NonFiniteError as error:
        raise UserError(str(error)) from error
    images = to_uint8(model.images(x)).cpu()
    with checking(f"out={folder}"):
        digits = max(5, len(str(config.n - 1)))
        for i, image in enumerate(images):
            _save(image, folder / f"{i:0{digits}d}.png")
        columns = len(config.labels) if isinstance(config.labels, list) else None
        _save(grid(images, columns), folder / "grid.png")
    return folder / "grid.png"


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images side by side.

    Args:
        images: uint8 ``[N, C, H, W]``.
        columns: images in a row; None makes the grid about as wide as high.

    Returns:
        uint8 ``[C, rows * (H + 1) - 1, columns * (W + 1) - 1]``, enlarged by a whole factor if small.
    """
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = torch.full((c, rows * (h + 1), columns * (w + 1)), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + 1), i % columns * (w + 1)
        sheet[:, y : y + h, x : x + w] = image
    sheet = sheet[:, :-1, :-1]
    factor = max(1, _GRID_PIXELS // max(sheet.shape[1:]))
    return sheet.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _save(image: Tensor, path: Path) -> None:
    from PIL import Image

    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(path)
