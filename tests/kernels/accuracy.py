"""What "as exact as plain torch" means for a kernel."""

import torch
from torch import Tensor


def assert_close_enough(got: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error at most twice that of the same computation in plain torch of the same precision (or what correct
    rounding may cost, where plain torch was luckier than that), and some float32 rounding."""
    for name, wanted in exact.items():
        largest = wanted.abs().max()
        error = (got[name].double() - wanted).abs().max()
        rounding = torch.finfo(got[name].dtype).eps / 2 * largest
        allowed = max(2 * (low[name].double() - wanted).abs().max(), rounding) + 16 * 2**-24 * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
