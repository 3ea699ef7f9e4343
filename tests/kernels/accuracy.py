"""What "as exact as plain torch" means for a kernel."""

from torch import Tensor


def assert_close_enough(got: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Root-mean-square error at most twice that of the same computation in plain torch of the same precision, and
    some float32 rounding; the largest error, which is a matter of luck in small tensors, at most four times."""
    for name, wanted in exact.items():
        error, plain = (results[name].double() - wanted for results in (got, low))
        tiny = 16 * 2**-24 * wanted.abs().max()
        for what, size, factor in (
            ("rms", lambda e: e.square().mean().sqrt(), 2),
            ("largest", lambda e: e.abs().max(), 4),
        ):
            allowed = factor * size(plain) + tiny
            assert size(error) <= allowed, f"{name}: {what} error {size(error):.3g}, allowed {allowed:.3g}"
