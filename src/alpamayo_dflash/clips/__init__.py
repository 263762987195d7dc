"""Clips of the driving dataset: lists by chunk, and windows read through the devkit `physical_ai_av`."""

from __future__ import annotations

from alpamayo_dflash.clips.lists import parse_cameras, parse_chunks, read_clip_list
from alpamayo_dflash.clips.prefetch import iterate_windows
from alpamayo_dflash.clips.source import ClipError, ClipSource
from alpamayo_dflash.clips.window import CAMERAS, DEFAULT_CAMERAS, DEFAULT_T0_US, Window

__all__ = [
    "CAMERAS",
    "DEFAULT_CAMERAS",
    "DEFAULT_T0_US",
    "ClipError",
    "ClipSource",
    "Window",
    "iterate_windows",
    "parse_cameras",
    "parse_chunks",
    "read_clip_list",
]
