"""Triton kernels, each the fast form of plain operations elsewhere; importing them needs Triton."""
