"""torch-fidelity's DINOv2 extractor from local files.

Its network is defined in the repository facebookresearch/dinov2, which torch-fidelity has torch.hub download and
run. Nothing is downloaded and run here: the user gives a clone of the repository and the weights file.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["PREFIX", "find", "load"]

PREFIX = "dinov2-"
_URL = "https://dl.fbaipublicfiles.com/dinov2"


def load(name: str, layers: list[str], folder: str | os.PathLike[str] | None = None) -> Any:
    """The extractor with the network of a local clone.

    Args:
        name: "dinov2-vit-l-14" and so on, as torch-fidelity calls them.
        layers: of the extractor, ["dinov2"].
        folder: a clone of github.com/facebookresearch/dinov2 whose code is run; None takes torch.hub's cached
            one. The weights file lies in it or in torch.hub's cache.

    Raises:
        FileNotFoundError: if either is missing; the message says what to get and where to put it.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA, FeatureExtractorDinoV2

    clone, weights = find(name, folder)

    class Local(FeatureExtractorDinoV2):
        def __init__(self, model: nn.Module) -> None:
            FeatureExtractorBase.__init__(self, name, layers)  # its own constructor downloads
            self.feature_extractor_internal_dtype = torch.float32
            self.model = model

    os.environ["XFORMERS_DISABLED"] = "1"  # as torch-fidelity: the same features whatever is installed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="xFormers is")
        model: Any = torch.hub.load(str(clone), MODEL_METADATA[name], source="local", pretrained=False)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return Local(model).to(torch.float32)


def find(name: str, folder: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """The clone and the weights file that :func:`load` takes; same arguments and errors."""
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

    entry = MODEL_METADATA[name]
    hub = Path(torch.hub.get_dir())
    clone = hub / "facebookresearch_dinov2_main" if folder is None else Path(folder)
    file = f"{entry}_pretrain.pth"
    weights = next((p for p in (clone / file, hub / "checkpoints" / file) if p.is_file()), None)
    if not (clone / "hubconf.py").is_file() or weights is None:
        raise FileNotFoundError(
            f"{name}: {clone} has {'no hubconf.py' if weights else f'no {file}'}; "
            "git clone https://github.com/facebookresearch/dinov2, "
            f"put {_URL}/{entry}/{file} into the clone, and give its path: weights.{name}=FOLDER"
        )
    return clone, weights
