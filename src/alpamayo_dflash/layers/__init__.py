"""Scores of target layers over what the target itself writes, and the choice of taps made from them."""

from __future__ import annotations

from alpamayo_dflash.layers.choice import CHOICE_FILE, choose, read_choice
from alpamayo_dflash.layers.config import LayersConfig, check_layers, parse_layers
from alpamayo_dflash.layers.ranks import own_device, require_same, share_of

__all__ = [
    "CHOICE_FILE",
    "LayersConfig",
    "check_layers",
    "choose",
    "own_device",
    "parse_layers",
    "read_choice",
    "require_same",
    "share_of",
]
