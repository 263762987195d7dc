"""Lossless speculative decoding of Alpamayo's Chain-of-Causation with DFlash block-diffusion drafts.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Alpamayo": "alpamayo_dflash.target",
    "SpeculativeDecoder": "alpamayo_dflash.decode",
    "DFlashDraft": "alpamayo_dflash.draft",
    "ClipSource": "alpamayo_dflash.clips",
    "Window": "alpamayo_dflash.clips",
    "accelerate": "alpamayo_dflash.decode",
}

__all__ = [
    "Alpamayo",
    "ClipSource",
    "DFlashDraft",
    "SpeculativeDecoder",
    "Window",
    "__version__",
    "accelerate",
]

if TYPE_CHECKING:
    from alpamayo_dflash.clips import ClipSource, Window
    from alpamayo_dflash.decode import SpeculativeDecoder, accelerate
    from alpamayo_dflash.draft import DFlashDraft
    from alpamayo_dflash.target import Alpamayo


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
