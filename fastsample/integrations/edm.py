"""EDM's published networks (NVlabs/edm), converted once to safetensors.

Their files are Python pickles that carry the source code of the network and run it when they are loaded. The
conversion here runs nothing of the file: names outside a fixed list are refused, classes become inert records, the
embedded source is skipped. What is left are tensors and the constructor's arguments; the network's class comes from
the user.

    python -m fastsample.integrations.edm edm-cifar10-32x32-uncond-vp.pkl converted/

    net = fastsample.integrations.edm.load("converted", EDMPrecond)  # from a clone of NVlabs/edm
    denoiser = fs.wrap(net, fs.EDM(), "x0")
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsample.plan import write_atomically

__all__ = ["convert", "load"]

SCHEMA = "fastsample.edm/1"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


class _Record:
    """An object of the pickle, never run: its class's name and its state."""

    name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = {}


def _record(name: str) -> type[_Record]:
    return type("_Record", (_Record,), {"name": name})


class _EasyDict(dict[str, Any]):
    """dnnlib's EasyDict: a dictionary."""


def _persistent(meta: dict[str, Any]) -> _Record:
    """What stands for ``torch_utils.persistence._reconstruct_persistent_obj``: the embedded source stays text."""
    record = _record(str(meta.get("class_name")))()
    record.state = meta.get("state") or {}
    return record


def _storage(content: bytes) -> Any:
    """What stands for ``torch.storage._load_from_bytes``, which would unpickle without restrictions."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_MODULES = {
    "container": ("ModuleDict", "ModuleList", "Sequential", "ParameterList", "ParameterDict"),
    "linear": ("Linear", "Identity"),
    "conv": ("Conv1d", "Conv2d"),
    "normalization": ("GroupNorm", "LayerNorm"),
    "activation": ("SiLU", "ReLU", "GELU"),
    "dropout": ("Dropout",),
    "sparse": ("Embedding",),
}
_ALLOWED: dict[str, Any] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": _EasyDict,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": torch.Size,
    # constants among the layers' arguments, which are not used
    **{
        name: _record(name)
        for name in (
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            "numpy.dtype",
            "_codecs.encode",
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("float16", "bfloat16", "float32", "float64", "int64")
    },
    **{
        f"torch.nn.modules.{file}.{name}": _record(name) for file, names in _MODULES.items() for name in names
    },
}


class _Unpickler(pickle._Unpickler):  # the one in Python, whose opcodes can be restricted
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, path: Path, inert: Collection[str]) -> None:
        super().__init__(file)
        self._path, self._inert = path, frozenset(inert)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full in self._inert:
            return _record(name)
        raise ValueError(
            f"path: {self._path} names {full}, which is refused (nothing of the file was run); if it belongs to "
            f"the network, inert=[{full!r}] keeps it as a record without running it"
        )

    def load_build(self) -> None:
        """Give an object its state: records only, lest the file sets attributes of functions and classes."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state = stack.pop()
        if not isinstance(stack[-1], _Record):
            raise ValueError(
                f"path: {self._path} sets the state of a {type(stack[-1]).__name__}, which is refused "
                "(nothing of the file was run)"
            )
        stack[-1].state = state

    dispatch[pickle.BUILD[0]] = load_build


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    key: str = "ema",
    inert: Collection[str] = (),
) -> Path:
    """Take tensors and constructor arguments out of a pickle of the EDM kind, without running anything of it.

    Args:
        path: the ``.pkl`` file.
        out: folder for model.safetensors and config.json.
        key: which of the file's networks; training snapshots have "ema".
        inert: further names (``"module.Class"``) that the pickle may mention; they too become inert records.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name outside the list (it is named), or a file of another kind.
    """
    path, out = Path(path), Path(out)
    content = path.read_bytes()
    try:
        found = _Unpickler(io.BytesIO(content), path, inert).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise ValueError(f"path: {path} cannot be read as a pickle of tensors ({error})") from error
    networks = (
        sorted(k for k, v in found.items() if isinstance(v, _Record)) if isinstance(found, dict) else []
    )
    if key not in networks:
        raise ValueError(f"key={key!r}: {path} holds no such network; it has {networks or 'none'}")
    network = found[key]
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in _tensors(network, "")}
    if not tensors:
        raise ValueError(f"key={key!r}: {network.name} of {path} has no tensors")
    config = {
        "schema": SCHEMA,
        "class_name": network.name,
        "init_args": _plain(network.state.get("_init_args", ()), path),
        "init_kwargs": _plain(network.state.get("_init_kwargs", {}), path),
        "source": {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "key": key},
    }
    from safetensors.torch import save

    write_atomically(out / _WEIGHTS, save(tensors))
    write_atomically(out / _CONFIG, json.dumps(config, indent=1).encode())
    return out


def load(folder: str | os.PathLike[str], network: Callable[..., nn.Module]) -> nn.Module:
    """The network of a converted folder.

    Args:
        folder: of :func:`convert`.
        network: its class, called with the constructor arguments of the config.

    Raises:
        ValueError: not such a folder, or a class with other tensors.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
        if config["schema"] != SCHEMA:
            raise ValueError(f"its schema is {config['schema']!r}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"folder={folder}: not a converted EDM network ({error}); see edm.convert"
        ) from error
    net = network(*config["init_args"], **config["init_kwargs"])
    try:
        net.load_state_dict(load_file(folder / _WEIGHTS))
    except RuntimeError as error:
        raise ValueError(
            f"network: {config['class_name']} is needed, {type(net).__name__} does not fit ({error})"
        ) from error
    return net.eval().requires_grad_(False)


def _tensors(record: _Record, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by the names of ``state_dict``."""
    state = record.state
    if not isinstance(state, dict):
        raise ValueError(
            f"path: the state of {prefix or record.name} is a {type(state).__name__}; a dict is needed"
        )
    transient = state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in state.get(kind, {}).items():
            if isinstance(value, Tensor) and name not in transient:
                yield prefix + name, value
    for name, child in state.get("_modules", {}).items():
        if isinstance(child, _Record):
            yield from _tensors(child, f"{prefix}{name}.")


def _plain(value: Any, path: Path) -> Any:
    """Constructor arguments as JSON values."""
    if isinstance(value, dict):
        return {str(k): _plain(v, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, path) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"path: {path} has a constructor argument of type {type(value).__name__}, which is refused"
    )


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastsample.integrations.edm",
        description="Convert an EDM network's pickle to safetensors without running anything of it.",
    )
    parser.add_argument("path", help="the .pkl file")
    parser.add_argument("out", help="folder for model.safetensors and config.json")
    parser.add_argument("--key", default="ema", help="which of the file's networks (default: ema)")
    parser.add_argument("--inert", nargs="*", default=(), help="further names to keep as inert records")
    given = parser.parse_args()
    try:
        print(f"wrote {convert(given.path, given.out, key=given.key, inert=given.inert)}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()
