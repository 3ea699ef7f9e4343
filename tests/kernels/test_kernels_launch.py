"""Repeated launches skip most of Triton's ``JITFunction.run`` and must end as it does; for a GPU, but run on none."""

import dataclasses
import gc

import kernels_aot as aot
import pytest
import torch
import triton
import triton.language as tl
from fake_driver import FakeDriver, installed
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastsample_kernels import _launch
from fastsample_kernels import _runtime as runtime
from fastsample_kernels._launch import Launch

LAUNCHES = {launch.kernel.fn.__name__: launch for c in aot.configurations().values() for launch in [c.on(90)]}
FAMILIES = (
    "fused", "apply", "statistics", "norm_forward", "norm_backward", "rope_forward", "attention_forward_kernel",
    "update",
)  # fmt: skip


@pytest.fixture(scope="module")
def gpu():
    fake = FakeDriver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*installed(fake))
        yield fake
        forget()
        gc.collect()  # Triton unloads a kernel by the driver of that time


def forget():
    """Other tests must not launch what is compiled here."""
    for known in _launch._kernels.values():
        (known.kernel.device_caches if hasattr(known.kernel, "device_caches") else known.kernel.cache).clear()
    _launch._kernels.clear()


@pytest.fixture
def searches(monkeypatch):
    """The kernels that Triton looked for, one for each launch through ``JITFunction.run``."""
    found, run = [], JITFunction.run

    def spy(self, *args, **kwargs):
        found.append(run(self, *args, **kwargs))
        return found[-1]

    runtime.launcher()  # reads the source of what is patched
    monkeypatch.setattr(JITFunction, "run", spy)
    yield found
    found.clear()


def assert_same_call(mine, triton_s):
    """Hooks apart, which do nothing, and the metadata that is theirs."""
    assert len(mine) == len(triton_s)
    assert mine[:6] == triton_s[:6]
    assert all(a is b for a, b in zip(mine[9:], triton_s[9:], strict=True))
    assert mine[6:9] == (None, None, None)
    assert not any(getattr(hook, "calls", hook) for hook in triton_s[7:9])


def check(launch, gpu, searches):
    """Launch twice, then by Triton; the function that ran."""
    launch()
    searches.clear()
    launch()
    assert not searches
    launch._run()
    assert_same_call(*gpu.calls[-2:])
    assert gpu.calls[-1][4] == searches[-1].function
    return gpu.calls[-1][4]


@pytest.mark.parametrize("name", [pytest.param("glu_forward", marks=pytest.mark.quick), *FAMILIES])
def test_the_launcher_gets_what_triton_gives_it(gpu, searches, name):
    check(LAUNCHES[name], gpu, searches)


@triton.jit(do_not_specialize=["seed", "count"])
def kernel(X, Y, n, seed: tl.int64, count, scale, KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, BLOCK)
    x = tl.load(X + i).to(ACC) * scale + n + seed + count
    if KIND != 0:
        x += 1
    tl.store(Y + i, x, mask=i < n)


def launch_of(num_warps=4, num_stages=2, options=None, **changes):
    x = torch.zeros(64)
    args = {
        "X": x,
        "Y": x,
        "n": 32,
        "seed": 5,
        "count": 3,
        "scale": 0.5,
        "KIND": 1,
        "ACC": tl.float32,
        "BLOCK": 16,
    }
    return Launch(kernel, (3, 2), args | changes, num_warps, num_stages, options or {})


# What Triton compiles anew, one change at a time.
COMPILED_ANEW = {
    "as it is": launch_of(),
    "alignment": launch_of(X=torch.zeros(64)[1:]),
    "alignment of both": launch_of(X=torch.zeros(64)[1:], Y=torch.zeros(64)[1:]),
    "dtype": launch_of(X=torch.zeros(64, dtype=torch.bfloat16)),
    "another dtype": launch_of(X=torch.zeros(64, dtype=torch.float16)),
    "one": launch_of(n=1),
    "not a multiple of 16": launch_of(n=33),
    "64 bits": launch_of(n=2**31),
    "64 bits, not a multiple of 16": launch_of(n=2**31 + 1),
    "unspecialised, 64 bits": launch_of(count=2**40),
    "integer for a float": launch_of(scale=2),
    "bool for an integer": launch_of(n=True),
    "constexpr": launch_of(KIND=0),
    "dtype of a constexpr": launch_of(ACC=tl.bfloat16),
    "size": launch_of(BLOCK=32),
    "warps": launch_of(num_warps=2),
    "stages": launch_of(num_stages=3),
    "options": launch_of(options={"maxnreg": 64}),
    "other options": launch_of(options={"maxnreg": 128}),
}
# What Triton does not; a launch of a new size is looked up once.
COMPILED_ONCE = {
    "a multiple of 16": launch_of(n=48),
    "parameter": launch_of(X=torch.nn.Parameter(torch.zeros(64))),
    "unspecialised, one": launch_of(count=1),
}


def test_whatever_triton_compiles_for_is_told_apart(gpu, searches):
    functions = {name: check(launch, gpu, searches) for name, launch in COMPILED_ANEW.items()}
    assert len(set(functions.values())) == len(functions)
    for name, launch in COMPILED_ONCE.items():
        assert check(launch, gpu, searches) == functions["as it is"], name
    searches.clear()
    for name, launch in reversed(COMPILED_ANEW.items()):  # all of them are known now
        launch()
        assert gpu.calls[-1][4] == functions[name], name
    assert not searches


def test_values_that_python_takes_for_equal_are_told_apart(gpu, searches):
    for value in (True, 1, False, 0):
        check(launch_of(KIND=value), gpu, searches)
    launch_of(KIND=0.0)()
    searches.clear()
    launch_of(KIND=-0.0)()
    assert len(searches) == 1


def test_seeds_and_floats_are_looked_up_once(gpu, searches):
    launch_of()()
    searches.clear()
    for i in range(1, 5):
        launch_of(seed=2**40 * i, scale=0.25 * i)()
        assert gpu.calls[-1][:3] == (3, 2, 1)
    assert not searches
    assert len({call[4] for call in gpu.calls[-4:]}) == 1


def test_each_device_and_stream(gpu, searches, monkeypatch):
    first = check(launch_of(), gpu, searches)
    monkeypatch.setattr(gpu, "stream", 9)
    assert check(launch_of(), gpu, searches) == first
    monkeypatch.setattr(gpu, "device", 101)
    assert check(launch_of(), gpu, searches) != first
    assert gpu.calls[-1][3] == 9 + 101


def test_triton_launches_where_somebody_watches(gpu, searches, monkeypatch):
    launch = launch_of()
    check(launch, gpu, searches)
    searches.clear()
    knobs = getattr(triton, "knobs", None)
    owner = CompiledKernel if knobs is None else knobs.runtime
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, print)
            launch()
            assert print in gpu.calls[-1][7:9]
    with monkeypatch.context() as patch:
        if knobs is None:
            patch.setenv("TRITON_DEBUG", "1")
        else:
            patch.setattr(knobs.runtime, "debug", True)
        launch()
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: None])
        launch()
    assert len(searches) == 4
    launch()
    assert len(searches) == 4


@pytest.mark.parametrize("name", ["missing", "unknown", "subclass"])
def test_triton_gets_what_is_unusual(gpu, searches, name):
    launch = launch_of()
    check(launch, gpu, searches)
    searches.clear()
    if name == "subclass":
        x = torch.zeros(64).as_subclass(type("Sub", (torch.Tensor,), {}))
        launch_of(X=x)()
        launch_of(X=x)()
        assert len(searches) == 2
        return
    args = dict(launch.args)
    del args["BLOCK"]
    args |= {"BLOCKS": 16} if name == "unknown" else {}
    with pytest.raises(TypeError):
        dataclasses.replace(launch, args=args)()


def test_an_unknown_version_of_triton(gpu, searches, monkeypatch):
    monkeypatch.setattr(runtime, "launcher", lambda: None)
    launch_of()()
    searches.clear()
    launch_of()()
    assert len(searches) == 1
