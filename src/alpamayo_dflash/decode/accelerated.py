"""`accelerate`: the decoder on a model that is already loaded."""

from __future__ import annotations

from typing import Any

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.proposer import Proposer
from alpamayo_dflash.decode.rollout import SpeculativeDecoder
from alpamayo_dflash.target.borrow import borrow


def accelerate(
    model: Any,
    draft: Proposer | None = None,
    *,
    tokenizer: Any = None,
    fuse: bool = False,
    config: DecodeConfig | None = None,
) -> SpeculativeDecoder:
    """Make a decoder on a loaded model's weights, without changing a value of them.

    Its `target.prompt_from_inputs(...)` takes what the model's own processor makes; its `generate` writes
    the texts (and, with an Alpamayo, the trajectories); its `handover()` gives the finished cache in the form
    that the model's own expert takes.

    Args:
        model: an `AlpamayoR1` or `Alpamayo1_5` object of NVIDIA's package, or transformers'
            `Qwen3VLForConditionalGeneration`.
        draft: proposes blocks, on the model's device; None decodes one token a pass.
        tokenizer: needed with a bare Qwen3-VL.
        fuse: move weights that read one input into one storage (the same values); False leaves the model
            as it is.
        config: see DecodeConfig.

    Raises:
        ValueError: the model is of another kind, a part is missing or does not fit.
    """
    return SpeculativeDecoder(borrow(model, tokenizer, fuse=fuse), draft, config)
