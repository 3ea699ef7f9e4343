"""Train the zoo's networks on Fashion-MNIST: the flow teacher and the feature extractor.

    python -m fastsample.zoo.train_fashion                   # both, into the package's weights folder
    python -m fastsample.zoo.train_fashion --part features   # one of them

Both see the training images alone, which torchvision reads from the folder ``data`` (or the environment
variable FASTSAMPLE_DATA names another). The moments of the features of both splits are kept beside the weights, so
that the model can be measured where the images are not. CPU time, one thread: an hour for the UNet, 5 minutes for
the features.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import fashion_mnist, images_hash
from .training import denoising_loss, options, train_classifier, train_unet
from .weights import FOLDER, save_weights

UNET_CONFIG: dict[str, Any] = {
    "image_size": 28,
    "in_channels": 1,
    "channels": 112,
    "multipliers": [1],
    "patch": 4,
    "time_scale": 1000.0,
}
CLASSIFIER_CONFIG: dict[str, Any] = {"image_size": 28, "channels": 24, "num_features": 64, "levels": 2}


def save_moments(path: Path) -> None:
    """Write the moments of the extractor's features of both splits."""
    from ..metrics import FeatureExtractor, GroupedMoments, to_uint8

    extractor = FeatureExtractor("fd-fashion-mnist")
    config: dict[str, Any] = {"extractor": extractor.sha256}
    tensors: dict[str, Tensor] = {}
    for split in ("train", "heldout"):
        images = to_uint8(fashion_mnist(split)[0])  # type: ignore[arg-type]
        moments = GroupedMoments(CLASSIFIER_CONFIG["num_features"])
        for first in range(0, len(images), 1000):
            part = images[first : first + 1000]
            moments.update(extractor(part), range(first, first + len(part)))
        gaussian = moments.gaussian()
        tensors |= {f"{split}.mean": gaussian.mean, f"{split}.cov": gaussian.cov}
        config[split] = {"n": len(images), "sha256": images_hash(images)}
    save_weights(tensors, config, path)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    args = options(
        __doc__, argparse.ArgumentParser(prog="python -m fastsample.zoo.train_fashion"), 12_000, argv
    )
    from ..process import Flow

    images, labels = fashion_mnist("train")
    held_images, held_labels = fashion_mnist("heldout")
    if args.part in ("all", "features"):
        net = train_classifier(images, labels, CLASSIFIER_CONFIG, steps=4000, seed=args.seed)
        save_weights(net.state_dict(), CLASSIFIER_CONFIG, args.out / "fashion_features.safetensors")
        with torch.no_grad():
            found = torch.cat([net(part).argmax(dim=1) for part in held_images.split(1000)])
        print(f"features: held-out accuracy {(found == held_labels).double().mean():.4f}")
        if args.out == FOLDER:  # the extractor of fd-fashion-mnist is the one in that folder
            save_moments(args.out / "fashion_moments.safetensors")
    if args.part in ("all", "unet"):
        process = Flow()
        unet, _ = train_unet(
            images,
            labels,
            process,
            UNET_CONFIG,
            prediction="flow",
            precision=torch.bfloat16,
            steps=args.steps,
            batch_size=64,
            lr=1e-3,
            dropout=0.0,
            seed=args.seed,
        )
        save_weights(unet.state_dict(), UNET_CONFIG, args.out / "fashion_unet.safetensors")
        for split, (x, y) in {"train": (images, labels), "heldout": (held_images, held_labels)}.items():
            loss = denoising_loss(unet, x[:2000], y[:2000], process, "flow", repeats=4)
            print(f"unet: flow loss on {split} {loss:.5f}")


if __name__ == "__main__":
    main()
