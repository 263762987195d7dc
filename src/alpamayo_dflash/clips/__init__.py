"""Clips of the driving dataset: lists by chunk, and windows read through the devkit `physical_ai_av`."""
