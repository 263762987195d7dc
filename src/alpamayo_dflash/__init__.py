"""Lossless speculative decoding of Alpamayo's Chain-of-Causation with DFlash block-diffusion drafts.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Alpamayo": "alpamayo_dflash.target.alpamayo",
    "SpeculativeDecoder": "alpamayo_dflash.decode.decoder",
    "DFlashDraft": "alpamayo_dflash.draft.model",
    "ClipSource": "alpamayo_dflash.clips.source",
    "Window": "alpamayo_dflash.clips.window",
    "accelerate": "alpamayo_dflash.decode.decoder",
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
    from alpamayo_dflash.clips.source import ClipSource
    from alpamayo_dflash.clips.window import Window
    from alpamayo_dflash.decode.decoder import SpeculativeDecoder, accelerate
    from alpamayo_dflash.draft.model import DFlashDraft
    from alpamayo_dflash.target.alpamayo import Alpamayo


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
