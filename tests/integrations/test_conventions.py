"""Models of other conventions in a line: each samples what the same model in our own convention samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsample as fs
from fastsample.zoo.mixture import GaussianMixture

MIXTURE = GaussianMixture(
    torch.tensor([[1.0, 0.2], [-0.8, 0.6]]),
    torch.stack([0.05 * torch.eye(2), torch.tensor([[0.09, 0.02], [0.02, 0.03]])]),
    torch.tensor([0.6, 0.4]),
)


def samples(denoiser: fs.Denoiser, steps: int = 60, n: int = 64) -> Tensor:
    return fs.Sampler(denoiser, steps=steps, end="zero")(shape=(n, 2), seed=3)


def exact(process: fs.Process) -> Tensor:
    """The same samples by the exact x0-prediction."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        return MIXTURE.x0(x, process.alpha(t[0].double()), process.sigma(t[0].double()))

    return samples(fs.wrap(net, process, "x0"))


def test_k_diffusion_denoisers() -> None:
    """D(x, sigma), with sigma in the variance-exploding convention."""

    def d(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE.x0(x, torch.tensor(1.0), sigma[0].double())

    process = fs.VE(sigma_min=0.01, sigma_max=50.0)
    torch.testing.assert_close(samples(fs.wrap(d, process, "x0")), exact(process), rtol=1e-3, atol=2e-3)


def test_edm_networks_with_class_labels() -> None:
    """EDM's preconditioned network net(x, sigma, class_labels) returns the clean sample."""

    class Precond(nn.Module):
        sigma_data = 0.5

        def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
            s = sigma[0].double()
            c_skip = self.sigma_data**2 / (s**2 + self.sigma_data**2)
            c_out = s * self.sigma_data / (s**2 + self.sigma_data**2).sqrt()
            raw = (MIXTURE.x0(x, torch.tensor(1.0), s) - c_skip * x) / c_out  # what its inner network learns
            shift = 0 if class_labels is None else 0.1 * class_labels.sum(1, keepdim=True)
            return (c_skip * x + c_out * raw + shift).to(x.dtype)

    denoiser = fs.wrap(Precond(), fs.EDM(), "x0")
    torch.testing.assert_close(samples(denoiser), exact(fs.EDM()), rtol=1e-3, atol=2e-3)
    labels = torch.eye(4).repeat(16, 1)
    moved = fs.Sampler(denoiser, steps=60, end="zero")(shape=(64, 2), seed=3, class_labels=labels)
    assert float((moved - samples(denoiser)).mean()) > 0.05


def test_guided_diffusion_with_learned_variance() -> None:
    process = fs.VP.linear()

    def net(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        eps = MIXTURE.eps(x, process.alpha(t[0].double()), process.sigma(t[0].double()))
        return torch.cat([eps, torch.full_like(eps, 7.0)], dim=1)

    learned = fs.wrap(net, process, learned_variance=True)
    torch.testing.assert_close(samples(learned), exact(process), rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="learned_variance=True"):
        samples(fs.wrap(net, process))


def test_velocity_models_with_the_opposite_time() -> None:
    """torchcfm, flow_matching: x_t = (1 - t) noise + t data, v = data - noise."""

    def v(t: Tensor, x: Tensor) -> Tensor:
        s = 1 - t.reshape(-1)[0].double()
        return -MIXTURE.flow(x, 1 - s, s)

    denoiser = fs.wrap(lambda x, t: -v(t, x), fs.Flow(), "flow", time_input="1-t")
    torch.testing.assert_close(samples(denoiser), exact(fs.Flow()), rtol=1e-3, atol=2e-3)


class Small(nn.Module):
    """A network that can be exported."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(torch.cat([x, (t / 1000)[:, None]], dim=1))


def test_exported_programs(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=512)
    example = (torch.randn(4, 2), torch.full((4,), 3.0))
    program = torch.export.export(Small(), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    ours, theirs = (samples(fs.wrap(net, fs.VP.linear(), "v"), 6) for net in (Small(), loaded))
    torch.testing.assert_close(ours, theirs)


def _onnx(path: Path, net: Small) -> Path:
    """The small network as an ONNX file, written node by node."""
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    helper, kind = onnx.helper, onnx.TensorProto

    def constant(name: str, value: Any) -> Any:
        return onnx.numpy_helper.from_array(np.asarray(value), name)

    first, last = net.inner[0], net.inner[2]
    weights = {
        "w1": first.weight.detach().numpy().T.copy(),
        "b1": first.bias.detach().numpy(),
        "w2": last.weight.detach().numpy().T.copy(),
        "b2": last.bias.detach().numpy(),
        "thousand": np.float32(1000.0),
        "axis": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Div", ["t", "thousand"], ["s"]),
        helper.make_node("Unsqueeze", ["s", "axis"], ["column"]),
        helper.make_node("Concat", ["x", "column"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "w1"], ["h0"]),
        helper.make_node("Add", ["h0", "b1"], ["h1"]),
        helper.make_node("Sigmoid", ["h1"], ["g"]),
        helper.make_node("Mul", ["h1", "g"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["h3"]),
        helper.make_node("Add", ["h3", "b2"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", kind.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("t", kind.FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("out", kind.FLOAT, ["batch", 2])],
        [constant(k, v) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def test_onnx_programs_sample_and_are_tuned(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
    from fastsample.integrations.onnx import OnnxNetwork

    net = OnnxNetwork(_onnx(tmp_path / "net.onnx", Small()))
    denoiser = fs.wrap(net, fs.VP.linear(), "v", sample_shape=(2,))
    ours = samples(fs.wrap(Small(), fs.VP.linear(), "v"), 6)
    torch.testing.assert_close(samples(denoiser, 6), ours, rtol=1e-4, atol=1e-5)
    plan = fs.tune(denoiser, 2, trajectories=32, heldout=32, reference_steps=20, iterations=2)
    assert plan.options["record"]["heldout_rmse"] <= plan.options["record"]["start_rmse"]
    with pytest.raises(ValueError, match="condition='labels' is unknown"):
        net(torch.zeros(1, 2), torch.zeros(1), labels=1)
