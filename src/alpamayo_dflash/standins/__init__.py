"""Targets that are not NVIDIA's: random ones of any size, and the tiny one that is trained on the world."""
