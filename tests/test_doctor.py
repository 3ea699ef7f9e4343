"""``fastsample doctor`` says what is true here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastsample.cli import main
from fastsample.doctor import _package, examine
from fastsample.metrics.extractors import inception_file


def test_findings_are_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = {f.what: f for f in examine().findings}
    assert found["torch"].detail == torch.__version__.split("+")[0] or found["torch"].works
    assert found["diffusers"].works == (importlib.util.find_spec("diffusers") is not None)
    assert ("cuda:0" in found) == torch.cuda.is_available()
    assert found["kernel group_norm"].works == ("Triton" in found["kernel group_norm"].detail)
    assert found["metric fd-digits"].works
    assert found["metric fid"].works == inception_file().is_file()
    assert str(inception_file()) in found["metric fid"].detail
    main(["doctor"])
    printed = capsys.readouterr().out
    assert all(what in printed for what in found)


def test_what_is_missing_has_a_remedy() -> None:
    missing = _package("no-such-distribution", "pip install it")
    assert not missing.works
    assert missing.detail == "not installed; pip install it"


def test_energy_and_metrics_without_weights_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    found = {f.what: f for f in examine().findings}
    if not torch.cuda.is_available():
        assert not found["energy"].works
        assert found["energy"].detail == "NVML measures NVIDIA GPUs, not cpu"
    assert "git clone https://github.com/facebookresearch/dinov2" in found["metric fd-dinov2-vit-l-14"].detail
    assert not found["metrics kid, precision, recall, isc"].works
    assert found["metrics swd, psnr"].works


def test_energy_on_a_gpu_needs_nvml() -> None:
    from fastsample.bench.cost import EnergyMeter

    meter = EnergyMeter(torch.device("cuda"))
    if importlib.util.find_spec("pynvml") is None:
        assert meter.why == "nvidia-ml-py is not installed: pip install 'fastsample[energy]'"
    elif not torch.cuda.is_available():
        assert "NVML does not count this device's energy" in (meter.why or "")
    assert (meter.joules() is None) == (meter.why is not None)


@pytest.mark.gpu
def test_energy_grows_with_work() -> None:
    from fastsample.bench.cost import EnergyMeter

    meter = EnergyMeter(torch.device("cuda"))
    assert meter.why is None
    before, x = meter.joules(), torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        x = x @ x / 64
    torch.cuda.synchronize()
    after = meter.joules()
    assert before is not None
    assert after is not None
    assert after > before
