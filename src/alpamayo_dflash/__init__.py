"""Lossless speculative decoding of Alpamayo's Chain-of-Causation with DFlash block-diffusion drafts.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Alpamayo": "target.alpamayo",
    "BlockDraft": "decode.proposer",
    "ClipSource": "clips.source",
    "DFlashDraft": "draft.model",
    "DecodeConfig": "decode.config",
    "Listed": "decode.proposer",
    "Observer": "decode.observer",
    "Prompt": "target.prompt",
    "Proposed": "decode.proposer",
    "Recorder": "decode.observer",
    "Result": "decode.decoder",
    "SpeculativeDecoder": "decode.decoder",
    "Window": "clips.window",
    "accelerate": "decode.decoder",
}

__all__ = [
    "Alpamayo",
    "BlockDraft",
    "ClipSource",
    "DFlashDraft",
    "DecodeConfig",
    "Listed",
    "Observer",
    "Prompt",
    "Proposed",
    "Recorder",
    "Result",
    "SpeculativeDecoder",
    "Window",
    "__version__",
    "accelerate",
]

if TYPE_CHECKING:
    from alpamayo_dflash.clips.source import ClipSource
    from alpamayo_dflash.clips.window import Window
    from alpamayo_dflash.decode.config import DecodeConfig
    from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder, accelerate
    from alpamayo_dflash.decode.observer import Observer, Recorder
    from alpamayo_dflash.decode.proposer import BlockDraft, Listed, Proposed
    from alpamayo_dflash.draft.model import DFlashDraft
    from alpamayo_dflash.target.alpamayo import Alpamayo
    from alpamayo_dflash.target.prompt import Prompt


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
