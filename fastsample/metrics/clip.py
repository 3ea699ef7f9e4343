"""transformers' CLIP from a local folder: normalised features of images and of texts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clip"]


class Clip:
    """CLIP's features, of unit length.

    Args:
        folder: what ``save_pretrained`` of a CLIP model and of its processor wrote: config.json, safetensors,
            preprocessor_config.json and the tokenizer's files.
        device: where it runs.

    Attributes:
        sha256: digest of the weights and of how images are prepared.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it; the message says which and how to get it.
        ImportError: without transformers.
        ValueError: the folder holds another kind of model.
    """

    name = "clip"

    def __init__(self, folder: str | os.PathLike[str] | None, device: torch.device | str = "cpu") -> None:
        remedy = (
            "save one on a machine with network: hf download openai/clip-vit-large-patch14-336 --local-dir FOLDER, "
            "and give it with weights.clip=FOLDER"
        )
        path = Path(folder) if folder is not None else None
        if path is None or not path.is_dir():
            raise FileNotFoundError(
                f"weights.clip={folder}: a local folder of transformers' CLIP is needed; {remedy}"
            )
        for file in ("config.json", "preprocessor_config.json"):
            if not (path / file).is_file():
                raise FileNotFoundError(f"weights.clip={folder}: no {file} in it; {remedy}")
        try:
            from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel
            from transformers.utils import logging
        except ImportError as error:
            raise ImportError(
                f"CLIP's features need transformers ({error}): pip install 'fastsample[diffusers]'"
            ) from error
        local: dict[str, Any] = {"local_files_only": True}
        kind = AutoConfig.from_pretrained(path, **local).model_type
        if kind != "clip":
            raise ValueError(
                f"weights.clip={folder}: it holds a model of type {kind!r}, clip is needed; {remedy}"
            )
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # logs stay quiet
        try:
            model: Any = CLIPModel.from_pretrained(path, use_safetensors=True, **local)
        except OSError as error:
            raise FileNotFoundError(
                f"weights.clip={folder}: {str(error).splitlines()[0]}; {remedy}"
            ) from error
        finally:
            if shown:
                logging.enable_progress_bar()
        self.device = torch.device(device)
        self._model = model.requires_grad_(False).eval().to(self.device)
        self._processor: Any = CLIPImageProcessor.from_pretrained(path, **local)
        self._folder, self._tokenizer = path, AutoTokenizer
        digest = hashlib.sha256((path / "preprocessor_config.json").read_bytes())
        for key, tensor in sorted(self._model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.sha256 = digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of uint8 images ``[B, 1 or 3, H, W]``, prepared as the folder's config says.

        Returns:
            float64 ``[B, d]`` of unit length, on the device.
        """
        rgb = images.cpu().expand(-1, 3, -1, -1)
        pixels = self._processor(
            images=[image.numpy() for image in rgb], return_tensors="pt", input_data_format="channels_first"
        )
        return _unit(self._model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Features of texts; what is longer than the model takes is cut.

        Returns:
            float64 ``[len(texts), d]`` of unit length, on the device.
        """
        tokenizer: Any = self._tokenizer.from_pretrained(self._folder, local_files_only=True)
        length = self._model.config.text_config.max_position_embeddings
        found = []
        for start in range(0, len(texts), batch):
            tokens = tokenizer(
                list(texts[start : start + batch]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            given = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
            found.append(_unit(self._model.get_text_features(**given)))
        return torch.cat(found)

    def dim(self, image_shape: tuple[int, ...]) -> int:
        """Feature dimension d."""
        return int(self._model.config.projection_dim)


def _unit(output: Any) -> Tensor:
    features = (
        output if isinstance(output, Tensor) else output.pooler_output
    )  # transformers before 5, and since
    features = features.double()
    return features / features.norm(dim=1, keepdim=True)
