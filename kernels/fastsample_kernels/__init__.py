"""Fused Triton kernels for diffusion and flow networks; usable without fastsample."""
