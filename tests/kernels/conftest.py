"""Kernel tests run in processes of their own, one a file.

Triton reads TRITON_INTERPRET when a kernel is defined, and torch and torchvision may import Triton at any
time, so the variable must be right from the start of the process. A file that needs another value than this
process has becomes two tests here, which run its slow tests and the others in a child; with the right value
(``TRITON_INTERPRET=1 pytest tests/kernels/test_kernels_update.py``) its tests are collected as usual.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# What the benchmarks compile ahead of time is what the tests read.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

# Files about compiled kernels or about plain torch; every other file is about interpreted kernels.
NOT_INTERPRETED = (
    "test_kernels_aot",
    "test_kernels_gpu",
    "test_kernels_launch",
    "test_kernels_plumbing",
    "test_kernels_patch",
    "test_kernels_replay",
)


def interpret(path: Path) -> str:
    """The value of TRITON_INTERPRET that a test file needs."""
    return "0" if path.name.startswith(NOT_INTERPRETED) else "1"


class InChild(pytest.Item):
    """The slow tests of a file, or the others."""

    def runtest(self) -> None:
        which = "slow" if self.get_closest_marker("slow") else "not slow"
        expression = self.config.option.markexpr
        which = f"({expression}) and {which}" if expression else which
        command = [sys.executable, "-m", "pytest", str(self.path), "-p", "no:cacheprovider", "--color=no"]
        command += ["-m", which]
        environment = {**os.environ, "TRITON_INTERPRET": interpret(self.path)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=self.config.rootpath
        )
        if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip("the marker expression selects none of the file's tests")
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")

    def repr_failure(self, excinfo):
        return str(excinfo.value) if excinfo.errisinstance(AssertionError) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, f"{self.path.name} with TRITON_INTERPRET={interpret(self.path)}"


class ChildFile(pytest.File):
    def collect(self):
        name = f"TRITON_INTERPRET={interpret(self.path)}"
        yield InChild.from_parent(self, name=name)
        slow = InChild.from_parent(self, name=f"{name}, slow")
        slow.add_marker(pytest.mark.slow)
        yield slow


def pytest_pycollect_makemodule(module_path, parent):
    if os.environ.get("TRITON_INTERPRET", "0") != interpret(module_path):
        return ChildFile.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True, scope="session")
def interpreter_rounds_to_nearest():
    """Triton's interpreter truncates float32 to bfloat16 where GPUs round to nearest: make it round."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield


# Files and tests (``@pytest.mark.quick``) that run every time, each kernel family in each of its modes among them;
# the others, of interpreted and ahead-of-time compiled kernels, take minutes: ``make slow``.
QUICK = ("test_kernels_patch", "test_kernels_fused_models", "test_kernels_plumbing", "test_kernels_sampler")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: a test of a slow file of tests/kernels that runs every time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents or isinstance(item, InChild):
            continue
        if not item.path.name.startswith(QUICK) and item.get_closest_marker("quick") is None:
            item.add_marker(pytest.mark.slow)
