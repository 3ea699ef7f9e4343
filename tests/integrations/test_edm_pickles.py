"""EDM's pickles become safetensors without running anything of them."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsample as fs
from fastsample.integrations import edm

# -- the format: NVlabs' torch_utils.persistence and dnnlib.util, as they pickle


class EasyDict(dict[str, Any]):
    """A dictionary whose keys are attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("the embedded source would run here")


class Persistent(nn.Module):
    """Pickled as the decorator of ``persistence.persistent_class`` does: its own source, its name, its state."""

    source = "raise RuntimeError('embedded source was run')"

    def __reduce__(self) -> Any:
        meta = EasyDict(
            type="class",
            version=6,
            module_src=self.source,
            class_name=type(self).__name__,
            state=object.__reduce__(self)[2],  # type: ignore[index]
        )
        return _reconstruct_persistent_obj, (meta,), None


class Layer(Persistent):
    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (width,), {"gain": np.float64(gain)}
        self.weight = nn.Parameter(torch.randn(width, width))
        self.register_buffer("filter", torch.arange(3.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Precond(Persistent):
    """D(x, sigma) of a small network."""

    def __init__(self, width: int, *, label_dim: int = 0, channel_mult: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self._init_args = (width,)
        self._init_kwargs = EasyDict(label_dim=label_dim, channel_mult=list(channel_mult))
        self.blocks = nn.ModuleDict({"a": Layer(width, 0.5), "b": nn.Linear(width, width)})
        self.narrow = nn.Linear(width, width).half()

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.blocks["b"](self.blocks["a"](x)) / sigma[:, None]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names that the published files mention."""
    for name, value in (
        ("torch_utils.persistence", _reconstruct_persistent_obj),
        ("dnnlib.util", EasyDict),
    ):
        module = types.ModuleType(name)
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setattr(value, "__module__", name)


def write(path: Path, net: nn.Module, **more: Any) -> Path:
    path.write_bytes(
        pickle.dumps({"ema": net, "dataset_kwargs": EasyDict(path="x", use_labels=False), **more})
    )
    return path


def test_tensors_and_arguments_come_over(tmp_path: Path, names: None) -> None:
    torch.manual_seed(0)
    net = Precond(4, label_dim=3)
    net.blocks["b"].weight = nn.Parameter(net.blocks["a"].weight.data.T)  # not contiguous
    out = edm.convert(write(tmp_path / "net.pkl", net), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["class_name"] == "Precond"
    assert config["init_args"] == [4]
    assert config["init_kwargs"] == {"label_dim": 3, "channel_mult": [1, 2]}
    loaded = edm.load(out, Precond)
    expected = net.state_dict()
    assert "blocks.a.filter" in expected
    assert "blocks.a.scratch" not in expected
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[key].to(value.dtype), rtol=0, atol=0)
    x, sigma = torch.randn(2, 4), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(loaded(x, sigma), net(x, sigma).detach())
    denoiser = fs.wrap(loaded, fs.EDM(), "x0", sample_shape=(4,))
    assert fs.Sampler(denoiser, steps=3)(n=2, seed=0).shape == (2, 4)


def test_the_command(tmp_path: Path, names: None) -> None:
    write(tmp_path / "net.pkl", Precond(4))
    command = [sys.executable, "-m", "fastsample.integrations.edm", str(tmp_path / "net.pkl")]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    failed = subprocess.run([*command, str(tmp_path / "b"), "--key", "net"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "key='net'" in failed.stderr
    assert "it has ['ema']" in failed.stderr


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _attacks(mark: Path) -> dict[str, Any]:
    touch = f"touch {mark}"
    inner = io.BytesIO()
    torch.save({"x": Evil(os.system, touch)}, inner, _use_new_zipfile_serialization=False)
    from torch.storage import _load_from_bytes

    return {
        "posix.system": Evil(os.system, touch),
        "builtins.eval": Evil(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.exec": {"a": [Evil(exec, f"open({str(mark)!r}, 'w')")]},
        "builtins.getattr": Evil(getattr, "text", "upper"),
        "torch.serialization.load": Evil(torch.load, str(mark)),
        "cannot be read": Evil(_load_from_bytes, inner.getvalue()),
    }


@pytest.mark.parametrize("name", list(_attacks(Path("x"))))
def test_what_would_run_is_refused_and_not_run(name: str, tmp_path: Path, names: None) -> None:
    mark = tmp_path / "ran"
    attack = _attacks(mark)[name]
    content = pickle.dumps({"ema": Precond(2), "extra": attack})
    net = Precond(2)
    net._init_kwargs["hidden"] = attack
    for body in (content, pickle.dumps({"ema": net})):
        (tmp_path / "net.pkl").write_bytes(body)
        with pytest.raises(ValueError, match=rf"net.pkl.*{name}"):
            edm.convert(tmp_path / "net.pkl", tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_attacks_would_have_run(tmp_path: Path) -> None:
    """Python's own unpickler runs them: the test above tests something."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(_attacks(mark)["posix.system"]))
    assert mark.exists()
    mark.unlink()
    pickle.loads(pickle.dumps(_attacks(mark)["cannot be read"]))
    assert mark.exists()


def test_attributes_of_functions_are_not_set(tmp_path: Path) -> None:
    """By hand: GLOBAL torch._utils _rebuild_parameter, an empty dict, BUILD."""
    before = copy.copy(vars(torch._utils._rebuild_parameter))
    (tmp_path / "net.pkl").write_bytes(b"\x80\x02ctorch._utils\n_rebuild_parameter\n}U\x01xK\x01sb.")
    with pytest.raises(ValueError, match="sets the state of a function, which is refused"):
        edm.convert(tmp_path / "net.pkl", tmp_path / "out")
    assert vars(torch._utils._rebuild_parameter) == before


def test_a_name_of_the_network_can_be_let_through_as_a_record(tmp_path: Path, names: None) -> None:
    net = Precond(3)
    net.blocks["c"] = nn.Bilinear(3, 3, 2)
    file = write(tmp_path / "net.pkl", net)
    with pytest.raises(ValueError, match=r"names torch.nn.modules.linear.Bilinear.*inert=\["):
        edm.convert(file, tmp_path / "out")
    out = edm.convert(file, tmp_path / "out", inert=["torch.nn.modules.linear.Bilinear"])
    with pytest.raises(ValueError, match=r"(?s)Precond is needed, Precond does not fit .*blocks.c.weight"):
        edm.load(out, Precond)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "cannot be read as a pickle"),
        (pickle.dumps([1, 2]), "it has none"),
        (pickle.dumps({"ema": 3}), "it has none"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        edm.convert(tmp_path / "net.pkl", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        edm.convert(tmp_path / "none.pkl", tmp_path / "out")
    with pytest.raises(ValueError, match="not a converted EDM network"):
        edm.load(tmp_path, Precond)
