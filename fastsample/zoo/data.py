"""The zoo's data: scikit-learn's digits, which are embedded, and Fashion-MNIST, which torchvision downloads.

The 1,797 digits (8x8, 17 grey levels, ten classes; E. Alpaydin & C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI 1998) come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
from typing import Literal

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10
SAMPLE_SHAPE = (1, 8, 8)
FASHION_SHAPE = (1, 28, 28)


def digits(split: Literal["train", "heldout", "all"] = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of one split of the digits.

    The split needs no random generator: within each class, in the order of the data set, images 0 and 1 of
    every three are ``"train"`` and image 2 is ``"heldout"``; both have the class frequencies of the whole.
    Everything that the zoo trains sees ``"train"`` alone. The analytic mixture is no trained model: it is
    fitted to ``"all"``.

    Args:
        split: ``"train"`` (1,201 images), ``"heldout"`` (596) or ``"all"`` (1,797).

    Returns:
        Images, float32 ``[N, 1, 8, 8]`` in [-1, 1] (grey level / 8 - 1), and labels, int64 ``[N]``.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split must be 'train', 'heldout' or 'all', got {split!r}")
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32).reshape(-1, *SAMPLE_SHAPE) / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    if split == "all":
        return images, labels
    rank = np.empty(len(labels), dtype=np.int64)  # position of each image within its class
    for k in range(NUM_CLASSES):
        members = np.flatnonzero(data.target == k)
        rank[members] = np.arange(len(members))
    chosen = torch.from_numpy((rank % 3 == 2) == (split == "heldout"))
    return images[chosen], labels[chosen]


def data_folder() -> str:
    """Where torchvision's data sets lie: ``data``, or what the environment variable FASTSAMPLE_DATA names."""
    return os.environ.get("FASTSAMPLE_DATA", "data")


def fashion_mnist(split: Literal["train", "heldout"] = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747).

    Args:
        split: ``"train"`` (60,000 images) or ``"heldout"`` (the 10,000 of its test set).

    Returns:
        Images, float32 ``[N, 1, 28, 28]`` in [-1, 1], and labels, int64 ``[N]``.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: it has not been downloaded; the message has the command.
    """
    return torchvision_images("fashion-mnist", split)


def torchvision_images(name: str, split: Literal["train", "heldout"] = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of a data set that torchvision downloads.

    Args:
        name: ``"fashion-mnist"`` or ``"cifar10"``.
        split: ``"train"`` or ``"heldout"`` (its test set).

    Returns:
        Images, float32 ``[N, C, H, W]`` in [-1, 1], and labels, int64 ``[N]``.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: it has not been downloaded; the message has the command.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    from torchvision import datasets

    root = data_folder()
    kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        raw = kind(root, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name}: not found under {root}/ (FASTSAMPLE_DATA names another folder); "
            f"torchvision.datasets.{kind.__name__}({root!r}, download=True) fetches it"
        ) from error
    x = torch.as_tensor(raw.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.float() / 127.5 - 1, torch.as_tensor(raw.targets).long()


def images_hash(images: Tensor) -> str:
    """Digest of uint8 images."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
