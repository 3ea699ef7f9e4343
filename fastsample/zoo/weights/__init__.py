"""Weights of the zoo's networks: safetensors files with the constructor's arguments in their metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent


def save_weights(tensors: dict[str, Tensor], config: dict[str, Any], path: Path) -> None:
    """Write a network's tensors, with the arguments that rebuild it, to a safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(contiguous, path, metadata={"config": json.dumps(config, sort_keys=True)})


def load_weights(name: str, folder: Path = FOLDER) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A network's tensors and the arguments that rebuild it.

    Raises:
        FileNotFoundError: no such file; the message names the command that makes it.
    """
    from safetensors import safe_open

    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: reinstall, or run `python -m fastsample.zoo.train_digits`"
        )
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors: dict[str, torch.Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    return tensors, config
