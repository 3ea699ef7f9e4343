"""Compile launches ahead of time for GPUs that are not there, and read the code that came out."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsample_kernels._launch import Launch

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    Attributes:
        registers, stack, shared: registers a thread, bytes of stack a thread and of shared memory a block.
        sass: the instructions, one a line.
        ptx: the intermediate code.
    """

    registers: int
    stack: int
    shared: int
    sass: Sequence[str]
    ptx: str

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return sum(re.search(pattern, line) is not None for line in self.sass)


def compile_launch(launch: Launch, architecture: int, directory: Path) -> Code:
    """Compile as a launch there would: integers of 1 become constants, multiples of 16 are known as such."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value, name = launch.args[parameter.name], parameter.name
        specialise = not parameter.do_not_specialize
        is_one = specialise and isinstance(value, int) and value == 1
        if parameter.is_constexpr or is_one:
            signature[name], constants[(position,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
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
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = directory / f"{kernel.fn.__name__}_{architecture}.cubin"
    cubin.write_bytes(built.asm["cubin"])

    def tool(name: str, *options: str) -> str:
        command = [str(_TOOLS / name), *options, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", tool("cuobjdump", "--dump-resource-usage")))
    sass = [line for line in tool("nvdisasm", "-c").splitlines() if re.match(r"\s+/\*", line)]
    return Code(
        int(usage["REG"]),
        int(usage["STACK"]),
        max(int(usage["SHARED"]), built.metadata.shared),
        sass,
        built.asm["ptx"],
    )
