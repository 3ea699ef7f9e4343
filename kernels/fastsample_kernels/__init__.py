"""Fused Triton kernels for diffusion and flow networks; usable without fastsample.

Every function here takes and returns ordinary tensors, has one fallback in plain torch (its reference, and
what runs on a CPU), and :func:`explain` says which of the two a call would take and why. Importing this
package does not import Triton: the first launch does.
"""

from ._runtime import explain, supported
from .attention import attention
from .dit import gated_residual_norm, geglu, layer_norm, norm_rope, qk_norm_rope, rms_norm, swiglu
from .group_norm import group_norm
from .patching import Report, patch, unpatch
from .update import Noise, update

__all__ = [
    "Noise",
    "Report",
    "attention",
    "explain",
    "gated_residual_norm",
    "geglu",
    "group_norm",
    "layer_norm",
    "norm_rope",
    "patch",
    "qk_norm_rope",
    "rms_norm",
    "supported",
    "swiglu",
    "unpatch",
    "update",
]
