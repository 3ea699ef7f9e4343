"""The GPU benchmark suite without a GPU: the same code at tiny sizes, with the kernels in the interpreter."""

import json
import subprocess
import sys
from importlib.metadata import version

import bench_kernels_gpu as bench
import pytest
import torch

PLACE = bench.dry()
# Peers of the CPU, which has neither PyTorch's GPU attention nor the packages made for it.
RUN = {
    "group_norm + silu": {"eager", "torch.compile"},
    "pieces of a DiT block": {"eager", "torch.compile"},
    "attention": {"sdpa math", "eager"},
    "solver update": {"eager", "torch.compile"},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", bench.GROUPS)
def test_a_group_runs_and_writes_its_table(name, tmp_path):
    found = bench.rows(bench.GROUPS[name], PLACE)
    path = tmp_path / "results" / "kernels-gpu.json"
    bench.record(path, name, found, PLACE)
    assert json.loads(path.read_text())[name]["rows"].keys() == found["rows"].keys()
    shown = path.with_suffix(".md").read_text()
    assert f"torch {version('torch')}" in shown
    for case, made in found["rows"].items():
        assert made["seconds"] > 0
        ran = {peer for peer, result in made["peers"].items() if isinstance(result, float)}
        assert RUN[name] & ran, (case, made["peers"])
        assert all(result for result in made["peers"].values())  # a time, or why there is none
        assert f"| {case} |" in shown


@pytest.mark.parametrize("name", bench.networks(PLACE))
def test_a_network_runs_in_every_variant(name, tmp_path):
    network = bench.networks(PLACE)[name]
    found = bench.network_row(network, PLACE)
    path = tmp_path / "kernels-gpu.json"
    bench.record(path, "networks", {"rows": {name: found}}, PLACE)
    assert set(found["variants"]) == set(bench.VARIANTS)
    assert all(t > 0 for t in found["variants"].values())
    assert f"| {name} |" in path.with_suffix(".md").read_text()


@pytest.mark.quick
def test_a_kernel_that_computes_something_else_is_found():
    x = torch.ones(4)
    case = bench.Case("wrong", lambda: 1.1 * x, {"eager": lambda: x})
    with pytest.raises(AssertionError, match="wrong: relative error"):
        bench.warm(case)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (("copy", 0.8), True),
        (("tflops", 100), False),
        (("us", 2.0), False),
        (("us", 3.0), True),
        (("torch.compile", 3.0), True),
        (("torch.compile", 4.0), False),
        (("sdpa", 1.5), True),
        (("sdpa", 2.0), False),
        (("apex", 1.0), "no such peer ran"),
    ],
)
def test_goals(goal, met):
    peers = {"torch.compile": 8e-6, "sdpa math": 9e-6, "sdpa flash": 4e-6, "apex": "apex is not installed"}
    made = {"seconds": 2.5e-6, "copy": 0.9, "tflops": 99.0, "peers": peers}
    assert bench._met(goal, made) == met


def test_one_command_collects_the_suite():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-m",
        "gpu",
        "--collect-only",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.RESULTS.parents[2], check=True)
    assert done.stdout.count("bench_kernels_gpu.py::test_") == len(bench.GROUPS) + 1
