"""What "as exact as plain torch" means for a kernel."""

from torch import Tensor


def assert_close_enough(got: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error at most twice that of the same computation in plain torch of the same precision, and some float32
    rounding."""
    for name, wanted in exact.items():
        error = (got[name].double() - wanted).abs().max()
        allowed = 2 * (low[name].double() - wanted).abs().max() + 16 * 2**-24 * wanted.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
