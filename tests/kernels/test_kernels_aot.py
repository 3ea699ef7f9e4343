"""Machine code without a GPU: no spills, tensor cores, 16-byte accesses, and no worse than what was recorded."""

import dataclasses
import json

import kernels_aot as aot
import pytest
import triton

from fastsample_kernels.attention import Tiles

EVERY = aot.configurations()
RECORD = aot.recorded()
AGAIN = "if that is meant to be, record anew with `python benchmarks/kernels_aot.py` and commit benchmarks/results"

# Each kernel family on each target, and configurations that are close to a limit.
SOME = [
    ("attention forward, D=40, even", 80),
    ("attention forward, D=40, even", 90),
    ("attention forward, D=40, even", 100),
    ("attention forward, D=256, ragged", 100),
    ("attention tangent, D=256, causal", 90),
    ("attention tangent, D=160, even", 100),
    ("attention dq, D=64, even", 80),
    ("attention dkdv, D=128, even", 90),
    ("attention dkdv, D=160, bias per query", 80),
    ("group_norm forward, apply, small, channels first, bfloat16", 80),
    ("group_norm tangent, apply, large, channels last, float32", 90),
    ("group_norm backward, backward_sums, large, channels first, bfloat16", 90),
    ("group_norm backward, backward_apply, large, channels first, bfloat16", 100),
    ("norm, bfloat16", 80),
    ("norm backward, bfloat16", 90),
    ("norm_rope, interleaved, bfloat16", 90),
    ("glu backward, gelu, bfloat16", 100),
    ("update", 90),
]


def check(name: str, target: int) -> None:
    _, wrong = aot.judged(EVERY[name], target, RECORD)
    assert not wrong, "\n".join([*wrong, AGAIN])


@pytest.mark.quick
@pytest.mark.parametrize(("name", "target"), SOME)
def test_some_configurations(name, target):
    check(name, target)


@pytest.mark.parametrize("name", EVERY)
def test_every_configuration(name):
    for target in aot.TARGETS:
        check(name, target)


@pytest.mark.quick
def test_hopper_runs_attention_on_its_wide_tensor_cores():
    code = aot.compile_launch(EVERY["attention forward, D=128, even"].on(90), 90)
    assert code.instructions["wide tensor"] > 0


@pytest.mark.quick
def test_every_record_is_clean():
    versions = json.loads(aot.RESULTS.read_text())["triton"]
    for version, rows in versions.items():
        assert {name for name, _ in SOME} <= set(rows) <= set(EVERY), f"Triton {version}: {AGAIN}"
        for name, row in rows.items():
            for target in aot.TARGETS:
                numbers = row[str(target)]
                assert not {"spills", "stack", "atomics"} & set(numbers), (version, name, target)
                assert numbers.get("shared", 0) <= aot.SHARED[target]
                assert not name.startswith("attention") or {"tensor", "wide tensor"} & set(numbers)


@pytest.mark.quick
def test_the_table_is_that_of_the_record():
    if RECORD is None:
        pytest.skip(f"no record of Triton {triton.__version__}")
    versions = json.loads(aot.RESULTS.read_text())["triton"]
    shown = aot.RESULTS.with_suffix(".md").read_text()
    assert any(aot.markdown(versions, version) == shown for version in versions)


# -- the checks find what they are for -----------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "tiles", "target", "found"),
    [
        ("tangent, D=256", Tiles(64, 16, 8, 1), 90, "instructions that spill"),
        ("tangent, D=256", Tiles(128, 32, 8, 2), 100, "columns of tensor memory"),
        ("forward, D=64", Tiles(64, 128, 4, 6), 80, "bytes of shared memory, allowed"),
    ],
)
def test_tiles_that_are_too_large_are_found(call, tiles, target, found, monkeypatch):
    monkeypatch.setattr(aot.attention, "tiles", lambda *args, **kwargs: tiles)
    _, wrong = aot.judged(EVERY[f"attention {call}, even"], target, None)
    assert any(found in line for line in wrong), wrong


CODE = aot.Code(100, 0, 4096, 0, dict.fromkeys(aot.INSTRUCTIONS, 0) | {"wide tensor": 8, "16-byte loads": 4})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"registers": 105}, "registers: 105, recorded 100"),
        ({"shared": 4097}, "shared: 4097, recorded 4096"),
        ({"stack": 8}, "stack: 8, recorded 0"),
        ({"wide tensor": 0, "tensor": 16}, "wide tensor: none, recorded 8"),
        ({"16-byte loads": 0}, "16-byte loads: none, recorded 4"),
    ],
)
def test_what_got_worse_is_found(change, found):
    instructions = CODE.instructions | {k: n for k, n in change.items() if k in CODE.instructions}
    fields = {k: n for k, n in change.items() if k not in CODE.instructions}
    code = dataclasses.replace(CODE, instructions=instructions, **fields)
    assert found in aot.worse(code.numbers(), CODE.numbers())
    assert aot.worse(CODE.numbers(), CODE.numbers()) == []


@pytest.mark.quick
def test_a_few_registers_of_one_allocation_are_no_change():
    assert aot.worse({"registers": 104}, {"registers": 97}) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"wide tensor": 0}, "no tensor-core instructions"),
        ({"16-byte loads": 0}, "no 16-byte loads"),
        ({"spills": 2}, "2 instructions that spill"),
        ({"atomics": 1}, "1 atomic instructions"),
    ],
)
def test_what_no_configuration_may_have_is_found(change, found):
    configuration = aot.Configuration("attention", lambda target: None, tensor_cores=True)
    assert aot.faults(configuration, CODE, 90) == []
    code = dataclasses.replace(CODE, instructions=CODE.instructions | change)
    assert aot.faults(configuration, code, 90) == [found]
