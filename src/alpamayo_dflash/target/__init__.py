"""The target model: an Alpamayo checkpoint in the official layout, its prompts and its trajectories."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.target.config import AlpamayoConfig

if TYPE_CHECKING:
    from alpamayo_dflash.target.expert import ActionPrefix
    from alpamayo_dflash.target.model import Alpamayo
    from alpamayo_dflash.target.prompt import Prompt, PromptEmbeddings
    from alpamayo_dflash.target.tokenizer import SpecialTokens

_LAZY = {
    "ActionPrefix": "expert",
    "Alpamayo": "model",
    "Prompt": "prompt",
    "PromptEmbeddings": "prompt",
    "SpecialTokens": "tokenizer",
}

__all__ = ["ActionPrefix", "Alpamayo", "AlpamayoConfig", "Prompt", "PromptEmbeddings", "SpecialTokens"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
