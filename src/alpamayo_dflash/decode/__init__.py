"""Decoding: one verify pass, one autoregressive and one speculative loop, from a window to a trajectory."""
