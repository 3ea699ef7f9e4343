"""Machine code of group_norm and update without a GPU: no spills, 16-byte accesses, no atomics."""

import importlib

import pytest
import torch
from compiled import ARCHITECTURES, compile_launch

norm = importlib.import_module("fastsample_kernels.group_norm")
solver = importlib.import_module("fastsample_kernels.update")

# Kernels that read or write whole tensors; the others merge a few numbers.
STREAMING = {"fused", "statistics", "apply", "backward_sums", "backward_apply", "update"}


def check(launches, architecture, directory):
    for launch in launches:
        name = launch.kernel.fn.__name__
        code = compile_launch(launch, architecture, directory)
        assert code.stack == 0, f"{name}: {code.stack} bytes of stack"
        assert code.count(r"\b(LDL|STL)\b") == 0, f"{name}: spills"
        assert code.count(r"\b(ATOM|ATOMG|ATOMS|RED)\b") == 0, f"{name}: atomics"
        assert code.registers <= 128, f"{name}: {code.registers} registers"
        assert code.shared <= 8192, f"{name}: {code.shared} bytes of shared memory"
        strip = name == "fused" and launch.args["CHANNELS_LAST"]  # narrower than 16 bytes (see tiles)
        if name in STREAMING and not strip:
            assert code.count(r"LDG\.E(\.\w+)*\.128") > 0, f"{name}: no 16-byte loads"
        if name in {"fused", "apply", "backward_apply", "update"} and not strip:
            narrow = code.count(r"\bSTG\b") - code.count(r"STG\.E(\.\w+)*\.128")
            assert narrow <= (2 if name == "fused" else 0), (
                f"{name}: {narrow} narrow stores"
            )  # fused: the moments


def meta(*shape, dtype=torch.bfloat16, channels_last=False):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def group_norm_launches(shape, dtype, channels_last, *passes):
    batch, channels = shape[:2]
    x = meta(*shape, dtype=dtype, channels_last=channels_last)
    parameter, modulation = meta(channels, dtype=dtype), meta(batch, channels, dtype=dtype)
    call = norm._Call(x, x, (parameter, parameter, modulation, modulation), 32, True)
    launches = []
    if "forward" in passes:
        launches += norm.forward_launches(call, 1e-5)[0]
    if "jvp" in passes:
        tangent = meta(batch, channels, dtype=torch.float32)
        launches += norm.forward_launches(call, 1e-5, x, tangent, tangent)[0]
    if "backward" in passes:
        moments = meta(batch, 2, 32, dtype=torch.float32)
        launches += norm.backward_launches(call, x, moments)[0]
    return launches


SMALL, DEEP, LARGE = (2, 320, 64, 64), (2, 1280, 8, 8), (4, 128, 512, 512)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_group_norm(architecture, tmp_path):
    launches = group_norm_launches(SMALL, torch.bfloat16, False, "forward")
    assert [launch.kernel.fn.__name__ for launch in launches] == ["fused"]
    launches += group_norm_launches(LARGE, torch.bfloat16, True, "forward")
    check(launches, architecture, tmp_path)


def test_group_norm_backward_and_jvp(tmp_path):
    check(group_norm_launches(LARGE, torch.bfloat16, False, "backward", "jvp"), 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [SMALL, DEEP, LARGE])
def test_group_norm_every_configuration(shape, dtype, channels_last, architecture, tmp_path):
    check(
        group_norm_launches(shape, dtype, channels_last, "forward", "backward", "jvp"), architecture, tmp_path
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_update(architecture, tmp_path):
    x, index = meta(8, 4, 64, 64, dtype=torch.float32), meta(8, dtype=torch.int64)
    half = meta(8, 4, 64, 64)
    launch, _, _ = solver.update_launch(
        [x, x, x], half, half, index, [1.0, 2.0, 3.0], 7.5, 1, 0.1, 0.2, 0.3, 5, 4, 0.5, True
    )
    check([launch], architecture, tmp_path)
