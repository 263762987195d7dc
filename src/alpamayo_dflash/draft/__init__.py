"""The draft network: its config, weights, masks and file formats."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.draft.config import DraftConfig

__all__ = ["DFlashDraft", "DraftConfig", "Proposal", "read_draft", "write_draft"]

_LAZY = {
    "DFlashDraft": "alpamayo_dflash.draft.model",
    "Proposal": "alpamayo_dflash.draft.model",
    "read_draft": "alpamayo_dflash.draft.formats",
    "write_draft": "alpamayo_dflash.draft.formats",
}

if TYPE_CHECKING:
    from alpamayo_dflash.draft.formats import read_draft, write_draft
    from alpamayo_dflash.draft.model import DFlashDraft, Proposal


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
