"""Machine code of the shipped kernel configurations, compiled ahead of time for GPUs that are not there.

    python benchmarks/kernels_aot.py           compile all, write results/kernels-aot.json and .md
    python benchmarks/kernels_aot.py --check   compile all, compare with the record, write nothing
    python benchmarks/kernels_aot.py --only "tangent, D=40"     those alone; the others stay as recorded
    python benchmarks/kernels_aot.py --missing                  those that are not recorded yet

What is read out of the code of each: registers and stack a thread, shared memory a block, tensor memory, and
how many instructions are for tensor cores, 16-byte loads from global memory, spills and atomics. A record is
kept for each version of Triton, since another compiler makes other code. The tests in tests/kernels compile some
of the configurations in every run, and all of them with ``-m slow``, and fail where one got worse.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsample_kernels import _attention_kernels as attention_kernels
from fastsample_kernels import _dit_kernels as dit_kernels
from fastsample_kernels import dit
from fastsample_kernels._launch import Launch

# The package's attributes of these names are functions.
attention = importlib.import_module("fastsample_kernels.attention")
group_norm = importlib.import_module("fastsample_kernels.group_norm")
update = importlib.import_module("fastsample_kernels.update")

RESULTS = Path(__file__).parent / "results" / "kernels-aot.json"
TARGETS = (80, 90, 100)
# Bytes a block may have; 8.6 and 8.9 share the tiles of 8.0 and have 99 KiB.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512  # columns
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


# -- compiling and reading -----------------------------------------------------------------------------------

# Counted in the machine code. Wide tensor-core instructions serve four warps (HGMMA) or live in tensor memory.
INSTRUCTIONS = {
    "wide tensor": r"\b(HGMMA|UTC\w*MMA)",
    "tensor": r"\bHMMA",
    "16-byte loads": r"\b(LDG|LDGSTS)\.E(\.\w+)*\.128",
    "16-byte stores": r"\bSTG\.E(\.\w+)*\.128",
    "stores": r"\bSTG\b",
    "spills": r"\b(LDL|STL)\b",
    "atomics": r"\b(ATOM|ATOMG|RED|REDG)\b",  # on global memory
}


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel: what it takes of a thread or a block, and its instructions by kind."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    instructions: dict[str, int]

    def numbers(self) -> dict[str, int]:
        """Everything by name, zeros left out."""
        own = {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "tensor memory": self.tensor_memory,
        }
        return {name: n for name, n in (own | self.instructions).items() if n}


def compile_launch(launch: Launch, target: int) -> Code:
    """Compile as a launch on that target would: integers of 1 become constants, multiples of 16 are known as such."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value, name = launch.args[parameter.name], parameter.name
        specialise = not parameter.do_not_specialize
        is_one = specialise and isinstance(value, int) and value == 1
        if parameter.is_constexpr or is_one:
            signature[name], constants[(position,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = True
        elif isinstance(value, int):
            signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            aligned = specialise and value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()

        def tool(name: str, *options: str) -> str:
            command = [str(_TOOLS / name), *options, cubin.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", tool("cuobjdump", "--dump-resource-usage")))
        lines = [line for line in tool("nvdisasm", "-c").splitlines() if re.match(r"\s+/\*", line)]
    counts = {
        kind: sum(re.search(pattern, line) is not None for line in lines)
        for kind, pattern in INSTRUCTIONS.items()
    }
    return Code(
        int(usage["REG"]),
        int(usage["STACK"]),
        max(int(usage["SHARED"]), built.metadata.shared),
        getattr(built.metadata, "tmem_size", 0) or 0,
        counts,
    )


# -- the shipped configurations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A call, and the launch that it makes on a target.

    Attributes:
        name: of kernel and call.
        on: the launch, by target.
        tensor_cores: whether the code must use them.
        loads: whether the code must load 16 bytes at a time.
        registers, shared: most that a thread and a block may take (shared: None for what the target has).
        narrow_stores: most stores that are narrower than 16 bytes; None for any number.
    """

    name: str
    on: Callable[[int], Launch]
    tensor_cores: bool = False
    loads: bool = True
    registers: int = 255
    shared: int | None = None
    narrow_stores: int | None = None


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_CALLS: dict[str, dict[str, Any]] = {
    "even": {},
    "ragged": {"length": 1000},
    "77 keys": {"keys": 77},
    "causal": {"length": 1000, "causal": True},
    "bias per key": {"length": 1000, "kind": "per_key"},
    "bias per query": {"length": 1024, "keys": 1000, "kind": "per_query"},
    "float32": {"dtype": torch.float32},
}


def attention_launch(
    which: Any,
    target: int,
    dim: int,
    *,
    length: int = 4096,
    keys: int | None = None,
    kind: Any = "none",
    causal: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Launch:
    """What one pass of ``attention`` launches on that target."""
    keys = keys or length
    q, k = (_meta(2, n, 8, dim, dtype=dtype).transpose(1, 2) for n in (length, keys))
    rows = _meta(2, 8, length, dtype=torch.float32)
    bias = None
    if kind == "per_key":
        bias = _meta(2, 1, 1, keys, dtype=torch.bool)
    elif kind == "per_query":
        bias = _meta(2, 8, length, keys, dtype=dtype)
    tiles = attention.tiles(
        which, dim, keys, element_size=q.element_size(), capability=divmod(target, 10), bias=kind
    )
    common = (q, k, k, bias)
    last = (attention._precision(which, q), tiles)
    if which == "forward":
        return attention_kernels.forward_launch(*common, causal, 0.125, q, rows, *last)
    if which == "tangent":
        return attention_kernels.tangent_launch(*common, q, k, k, causal, 0.125, q, rows, q, *last)
    if which == "dq":
        return attention_kernels.dq_launch(*common, causal, 0.125, q, rows, q, rows, q, *last)
    dlogits = _meta(2, 8, length, keys, dtype=torch.float32) if kind == "per_query" else None
    return attention_kernels.dkdv_launch(*common, causal, 0.125, rows, q, rows, k, k, dlogits, *last)


def _attention() -> Iterator[Configuration]:
    for which in ("forward", "tangent", "dq", "dkdv"):
        for dim in (40, 64, 80, 96, 128, 160, 256):
            for call, options in _CALLS.items():

                def on(target: int, which: str = which, dim: int = dim, options: Any = options) -> Launch:
                    return attention_launch(which, target, dim, **options)

                yield Configuration(f"attention {which}, D={dim}, {call}", on, tensor_cores=True)


# A block of Stable Diffusion 1.5, its deepest, and one of an autoencoder.
_SHAPES = {"small": (2, 320, 64, 64), "deep": (2, 1280, 8, 8), "large": (4, 128, 512, 512)}
# Of a thread of the kernels that wait for memory: three blocks of four warps a multiprocessor. On an H200 they are
# faster than more blocks of fewer.
_STREAMED = 168
# Kernels that read or write whole tensors; the others merge a few numbers.
_STREAMING = {"fused", "statistics", "apply", "backward_sums", "backward_apply"}


def _group_norm_launches(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> dict[str, Launch]:
    batch, channels = shape[:2]
    x = _meta(*shape, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    parameter, modulation = _meta(channels, dtype=dtype), _meta(batch, channels, dtype=dtype)
    call = group_norm._Call(x, x, (parameter, parameter, modulation, modulation), 32, True)
    tangent, moments = (_meta(*s, dtype=torch.float32) for s in ((batch, channels), (batch, 2, 32)))
    passes = {
        "forward": group_norm.forward_launches(call, 1e-5)[0],
        "tangent": group_norm.forward_launches(call, 1e-5, x, tangent, tangent)[0],
        "backward": group_norm.backward_launches(call, x, moments)[0],
    }
    return {
        f"{which}, {launch.kernel.fn.__name__}": launch
        for which, launches in passes.items()
        for launch in launches
    }


def _group_norm() -> Iterator[Configuration]:
    for size, shape in _SHAPES.items():
        for channels_last in (False, True):
            for dtype in (
                torch.bfloat16,
                torch.float32,
            ):  # float16 differs from bfloat16 in its conversions alone
                for which, launch in _group_norm_launches(shape, dtype, channels_last).items():
                    kernel = launch.kernel.fn.__name__
                    strip = kernel == "fused" and channels_last  # narrower than 16 bytes (see tiles)
                    stores = kernel in {"fused", "apply", "backward_apply"} and not strip
                    where = "channels last" if channels_last else "channels first"
                    moments = 2 if kernel == "fused" or launch.args.get("MERGED") else 0
                    yield Configuration(
                        f"group_norm {which}, {size}, {where}, {str(dtype).removeprefix('torch.')}",
                        lambda target, launch=launch: launch,
                        loads=kernel in _STREAMING and not strip,
                        registers=_STREAMED,
                        shared=8192,
                        narrow_stores=moments if stores else None,
                    )


def _update() -> Configuration:
    x, index, half = (
        _meta(8, 4, 64, 64, dtype=torch.float32),
        _meta(8, dtype=torch.int64),
        _meta(8, 4, 64, 64),
    )
    launch, _, _ = update.update_launch(
        [x, x, x], half, half, index, [1.0, 2.0, 3.0], 7.5, 1, 0.1, 0.2, 0.3, 5, 4, 0.5, True
    )
    return Configuration("update", lambda target: launch, registers=128, shared=8192, narrow_stores=0)


def _dit_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """A block of DiT-XL/2 at 256 tokens; attention with heads of 128."""
    x, vector, modulation = (_meta(*shape, dtype=dtype) for shape in ((4, 256, 1152), (1152,), (4, 1152)))
    rows = dit.row_tiles(*x.shape, dit._NORM)
    summed = dit.row_tiles(*x.shape, per_thread=dit._SUMMED)
    partial = _meta(4, -(-256 // summed.chunk), 3, 1152, dtype=torch.float32)
    yield (
        "norm",
        dit_kernels.norm_forward_launch(
            x, x, modulation, vector, vector, modulation, modulation, 1e-6, False, x, x, rows
        ),
    )
    yield (
        "norm backward",
        dit_kernels.norm_backward_launch(
            x, x, x, x, modulation, vector, modulation, 1e-6, False, True, x, x, partial, summed
        ),
    )
    heads, angles = _meta(4, 24, 4096, 128, dtype=dtype), _meta(4, 4096, 128, dtype=torch.float32)
    tiles, summed = dit.rope_tiles(4, 24, 4096, 128), dit.row_tiles(4 * 24, 4096, 128, per_thread=16)
    for interleaved in (True, False):
        options = (_meta(128, dtype=dtype), 1e-6, True, interleaved)
        chunks = _meta(4, 24, -(-4096 // summed.chunk), 128, dtype=torch.float32)
        pairs = "interleaved" if interleaved else "halves"
        yield (
            f"norm_rope, {pairs}",
            dit_kernels.rope_forward_launch(heads, angles, angles, *options, heads, tiles),
        )
        yield (
            f"norm_rope backward, {pairs}",
            dit_kernels.rope_backward_launch(heads, heads, angles, angles, *options, heads, chunks, summed),
        )
    wide, narrow, columns = (
        _meta(1024, 10240, dtype=dtype),
        _meta(1024, 5120, dtype=dtype),
        dit.glu_tiles(5120),
    )
    for activation in ("gelu", "gelu_tanh", "silu"):
        yield f"glu, {activation}", dit_kernels.glu_forward_launch(wide, activation, narrow, columns)
        yield (
            f"glu backward, {activation}",
            dit_kernels.glu_backward_launch(narrow, wide, activation, wide, columns),
        )


def _dit() -> Iterator[Configuration]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, launch in _dit_launches(dtype):
            kind = str(dtype).removeprefix("torch.")
            yield Configuration(f"{name}, {kind}", lambda target, launch=launch: launch, registers=_STREAMED)


def configurations() -> dict[str, Configuration]:
    """Every shipped configuration by name."""
    every = [*_attention(), *_group_norm(), *_dit(), _update()]
    return {configuration.name: configuration for configuration in every}


# -- judging -------------------------------------------------------------------------------------------------


def faults(configuration: Configuration, code: Code, target: int) -> list[str]:
    """What no shipped configuration may have, whatever the record says."""
    n = code.instructions
    shared = SHARED[target] if configuration.shared is None else configuration.shared
    narrow = n["stores"] - n["16-byte stores"]
    judged = {
        f"{code.stack} bytes of stack": code.stack,
        f"{n['spills']} instructions that spill": n["spills"],
        f"{n['atomics']} atomic instructions": n["atomics"],
        f"{code.registers} registers, allowed {configuration.registers}": code.registers
        > configuration.registers,
        f"{code.shared} bytes of shared memory, allowed {shared}": code.shared > shared,
        f"{code.tensor_memory} columns of tensor memory": code.tensor_memory > TENSOR_MEMORY,
        "no tensor-core instructions": configuration.tensor_cores and not n["tensor"] + n["wide tensor"],
        "no 16-byte loads": configuration.loads and not n["16-byte loads"],
        f"{narrow} stores narrower than 16 bytes": configuration.narrow_stores is not None
        and narrow > configuration.narrow_stores,
    }
    return [what for what, is_so in judged.items() if is_so]


def worse(now: dict[str, int], recorded: dict[str, int]) -> list[str]:
    """In what the numbers of a code are worse than the recorded ones."""
    found = []
    for name in ("registers", "stack", "shared", "tensor memory", "spills", "atomics"):
        before, after = recorded.get(name, 0), now.get(name, 0)
        # A thread's registers are given out by the eight.
        if (-(-after // 8) > -(-before // 8)) if name == "registers" else after > before:
            found.append(f"{name}: {after}, recorded {before}")
    for name in ("wide tensor", "16-byte loads"):
        if recorded.get(name) and not now.get(name):
            found.append(f"{name}: none, recorded {recorded[name]}")
    return found


def judged(
    configuration: Configuration, target: int, record: dict[str, Any] | None
) -> tuple[Code, list[str]]:
    """The code of a configuration, and everything that is wrong with it.

    Args:
        configuration: what to compile.
        target: compute capability times ten.
        record: of this version of Triton, as :func:`recorded` gives it.
    """
    code = compile_launch(configuration.on(target), target)
    wrong = faults(configuration, code, target)
    row = (record or {}).get(configuration.name)
    if row is not None:
        wrong += worse(code.numbers(), row[str(target)])
    return code, [f"{configuration.name}, sm_{target}: {what}" for what in wrong]


# -- the record ----------------------------------------------------------------------------------------------


def recorded() -> dict[str, Any] | None:
    """Configuration -> target -> numbers as recorded with the running version of Triton; None where it has none."""
    if not RESULTS.exists():
        return None
    return json.loads(RESULTS.read_text())["triton"].get(triton.__version__)


def markdown(versions: dict[str, Any], shown: str) -> str:
    """The record for people: a summary of all versions of Triton, and every number of one of them."""
    lines = [
        "# Machine code of the shipped kernels",
        "",
        "Compiled ahead of time by `python benchmarks/kernels_aot.py`, without a GPU: nothing here is a speed.",
        "",
        f"Recorded with Triton {shown}: {len(versions[shown])} of {len(configurations())} shipped configurations.",
        "",
        "| Triton | target | kernels | with spills | most registers | most shared memory | with tensor cores | wide |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for version, rows in versions.items():
        for target in TARGETS:
            codes = [row[str(target)] for row in rows.values()]
            count = lambda *names, codes=codes: sum(any(c.get(n) for n in names) for c in codes)  # noqa: E731
            most = lambda name, codes=codes: max(c.get(name, 0) for c in codes)  # noqa: E731
            lines.append(
                f"| {version} | sm_{target} | {len(codes)} | {count('spills', 'stack')} | {most('registers')} "
                f"| {most('shared') / 1024:.0f} KiB | {count('tensor', 'wide tensor')} | {count('wide tensor')} |"
            )
    lines += [
        "",
        f"Each kernel with Triton {shown}: registers a thread / KiB of shared memory a block / tensor-core "
        "instructions (w: HGMMA or UTCMMA) / 16-byte loads; spilled bytes follow where there are any.",
        "",
        "| kernel | " + " | ".join(f"sm_{target}" for target in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for name, row in versions[shown].items():
        lines.append(f"| {name} | " + " | ".join(_cell(row[str(target)]) for target in TARGETS) + " |")
    return "\n".join(lines) + "\n"


def _cell(numbers: dict[str, int]) -> str:
    wide = numbers.get("wide tensor", 0)
    tensor = f"{wide}w" if wide else str(numbers.get("tensor", 0))
    parts = [
        str(numbers["registers"]),
        f"{numbers.get('shared', 0) / 1024:.0f}",
        tensor,
        str(numbers.get("16-byte loads", 0)),
    ]
    spilled = f", {numbers['stack']} spilled" if "stack" in numbers else ""
    return " / ".join(parts) + spilled


def _write(rows: dict[str, Any], names: list[str]) -> None:
    """Put rows into the record of the running version of Triton, in the order of ``names``, and drop all others."""
    versions = json.loads(RESULTS.read_text())["triton"] if RESULTS.exists() else {}
    known = versions.get(triton.__version__, {}) | rows
    versions[triton.__version__] = {name: known[name] for name in names if name in known}
    versions = dict(sorted(versions.items()))
    text = json.dumps({"triton": versions}, separators=(",", ":")).replace("},", "},\n")
    RESULTS.write_text(text + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(versions, triton.__version__))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the record instead of writing it")
    parser.add_argument("--only", default="", metavar="REGEX", help="configurations whose names match")
    parser.add_argument("--missing", action="store_true", help="those that the record does not have yet")
    options = parser.parse_args()
    record = recorded() if options.check else None
    if options.check and record is None:
        sys.exit(f"no record of Triton {triton.__version__} in {RESULTS}: run without --check")
    every = configurations()
    known = recorded() or {}
    rows: dict[str, Any] = {}
    wrong = []
    for name, configuration in every.items():
        if re.search(options.only, name) is None or (options.missing and name in known):
            continue
        rows[name] = {}
        for target in TARGETS:
            code, found = judged(configuration, target, record)
            rows[name][str(target)] = code.numbers()
            wrong += found
            print("\n".join(found) or f"{name}, sm_{target}: {code.registers} registers", flush=True)
        if not options.check:
            _write(rows, list(every))
    if wrong:
        sys.exit("\n".join([f"\n{len(wrong)} faults:", *wrong]))


if __name__ == "__main__":
    main()
