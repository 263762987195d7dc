"""The prompt's pass, beside the one that was before it: every layer whole, no graph, another attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from alpamayo_dflash.bench.clocks import in_turns
from alpamayo_dflash.decode.forward import FLASH_FIRST, FusedModel, TextModel, text_model
from alpamayo_dflash.decode.verify import Verifier
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vision import VisionFeatures


def prompt_pass(verifier: Verifier, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """Raw timings of both, in turns, from features to the first token's logits.

    Args:
        verifier: holds the target and the cache.
        prompt: on the CPU.
        repeats: of each.
    """
    seen = verifier.target.see(prompt)
    calls = {"before": before(verifier, prompt, seen), "now": lambda: verifier.read(prompt, seen)}
    return {"prompt_pass_ms": in_turns(calls, repeats, verifier.target.device)}


def before(verifier: Verifier, prompt: Prompt, seen: VisionFeatures) -> Callable[[], Tensor]:
    """The pass as it was: it computes the whole of the last layer, and attends by flash."""
    target, cache = verifier.target, verifier.cache
    model: TextModel = text_model(target, cache)
    if isinstance(model, FusedModel):
        model = FusedModel(target, cache, attention=FLASH_FIRST)
    ids, positions = prompt.input_ids.to(target.device), prompt.position_ids.to(target.device)
    embeddings = target.placed(ids, target.image_positions(ids, seen), seen)
    after_layer = target.deepstack_after_layer(embeddings)

    def work() -> Tensor:
        normed = model.prompt(embeddings.hidden, target.rotary(positions), after_layer, None)
        return model.logits(normed[-1:])

    return work
