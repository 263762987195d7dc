"""The `distill` command: the data stage, with the draft that it proposes with."""

from __future__ import annotations

from typing import Any

from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.run import WritingDraft
from alpamayo_dflash.distill.run import run as distill
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.draft.model import DFlashDraft


def run(config: DistillConfig) -> dict[str, Any]:
    """Open the draft of `draft_path`, if one is given, and run the stage; see `distill.run.run`.

    Raises:
        ValueError: the folder holds no draft, or as the stage does.
    """
    draft = None
    if config.draft_path is not None:
        identity = draft_identity(config.draft_path)
        draft = WritingDraft(DFlashDraft.from_pretrained(config.draft_path), identity)
    return distill(config, draft)
