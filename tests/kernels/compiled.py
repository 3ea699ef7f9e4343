"""What compiling the solver update must give, whichever path runs."""

import torch

from fastsample_kernels import Noise, update


def assert_compiles_once() -> None:
    """For more values of its numbers than the compiler makes graphs for."""
    x, index = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2)

    def step(a, w, seed):
        noise = Noise(a, seed, 0, index)
        given = {"output": x, "null": 2 * x, "guidance": w, "weight": w, "convert": (a, w), "state": 1}
        y, m = update([x, 2 * x], [a, 1 - a], noise=noise, **given)
        return y + m

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(12):
        numbers = (0.1 * i, 0.3 + 0.5 * i, (1, 2**40, 2**64 - 1)[i % 3])
        torch.testing.assert_close(compiled(*numbers), step(*numbers), rtol=1e-5, atol=1e-5)
