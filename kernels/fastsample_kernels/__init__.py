"""Fused Triton kernels for diffusion and flow networks; usable without fastsample.

Every function here takes and returns ordinary tensors, has one fallback in plain torch (its reference, and
what runs on a CPU), and :func:`explain` says which of the two a call would take and why. Importing this
package does not import Triton: the first launch does.
"""

from ._runtime import explain
from .group_norm import group_norm
from .update import Noise, update

__all__ = ["Noise", "explain", "group_norm", "update"]
