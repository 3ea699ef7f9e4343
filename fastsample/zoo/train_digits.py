"""Train the zoo's networks on the digits: the diffusion teacher and the feature extractor.

    python -m fastsample.zoo.train_digits                    # both, into the package's weights folder
    python -m fastsample.zoo.train_digits --part features    # one of them
    python -m fastsample.zoo.train_digits --out /tmp/w --seed 1

Both see the "train" split alone. One thread is used by default: the networks are too small to gain much from
more. CPU time, one thread: 5 minutes for the UNet, 1 for the features.
"""

from __future__ import annotations

import argparse
from typing import Any

from .data import digits
from .training import denoising_loss, options, train_classifier, train_unet
from .weights import save_weights

UNET_CONFIG: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 1,
    "channels": 32,
    "multipliers": [1, 2],
    "patch": 2,
}
CLASSIFIER_CONFIG: dict[str, Any] = {"channels": 32, "num_features": 24}


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    args = options(__doc__, argparse.ArgumentParser(prog="python -m fastsample.zoo.train_digits"), 4000, argv)
    from ..process import VP

    images, labels = digits("train")
    held_images, held_labels = digits("heldout")
    if args.part in ("all", "features"):
        net = train_classifier(images, labels, CLASSIFIER_CONFIG, seed=args.seed)
        save_weights(net.state_dict(), CLASSIFIER_CONFIG, args.out / "digits_features.safetensors")
        accuracy = (net(held_images).argmax(dim=1) == held_labels).double().mean()
        print(f"features: held-out accuracy {accuracy:.4f}")
    if args.part in ("all", "unet"):
        process = VP.linear()
        unet, _ = train_unet(images, labels, process, UNET_CONFIG, steps=args.steps, seed=args.seed)
        save_weights(unet.state_dict(), UNET_CONFIG, args.out / "digits_unet.safetensors")
        for split, (x, y) in {"train": (images, labels), "heldout": (held_images, held_labels)}.items():
            print(f"unet: eps loss on {split} {denoising_loss(unet, x, y, process):.5f}")


if __name__ == "__main__":
    main()
