"""Kernel tests run in processes of their own, one a file.

Triton reads TRITON_INTERPRET when a kernel is defined, and torch and torchvision may import Triton at any
time, so the variable must be right from the start of the process. A file that needs another value than this
process has becomes one test here that runs the file in a child; with the right value (``TRITON_INTERPRET=1
pytest tests/kernels/test_kernels_update.py``) its tests are collected as usual.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Files about compiled kernels or about plain torch; every other file is about interpreted kernels.
NOT_INTERPRETED = ("test_kernels_aot", "test_kernels_plumbing", "test_kernels_patch")


def interpret(path: Path) -> str:
    """The value of TRITON_INTERPRET that a test file needs."""
    return "0" if path.name.startswith(NOT_INTERPRETED) else "1"


class InChild(pytest.Item):
    def runtest(self) -> None:
        options = self.config.option
        command = [sys.executable, "-m", "pytest", str(self.path), "-p", "no:cacheprovider", "--color=no"]
        command += ["-m", options.markexpr] if options.markexpr else []
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
        yield InChild.from_parent(self, name=f"TRITON_INTERPRET={interpret(self.path)}")


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


# Files that are quick enough for every run; the others, of interpreted and ahead-of-time compiled kernels, take
# minutes: ``make slow``.
QUICK = ("test_kernels_patch", "test_kernels_fused_models")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not item.path.name.startswith(QUICK):
            item.add_marker(pytest.mark.slow)
