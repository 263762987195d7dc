"""Triton kernels, each the fused form of plain operations elsewhere; importing them needs Triton."""
