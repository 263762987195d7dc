"""Triton's kernels, in its interpreter."""
