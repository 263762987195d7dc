"""The finished cache in the form that transformers, and so NVIDIA's own action expert, takes.

Shapes: S sample, P prompt tokens, T cache entries, L layers, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.target.expert import ActionPrefix


@dataclass(frozen=True)
class Handover:
    """What `generate` of transformers would have left (specification 7).

    Attributes:
        sequences: int64 [S, T + 1], prompt and text, the pad id after a text's end. The reference finds
            each sample's offset in it, the place after `<|traj_future_start|>`, or its length without one.
        past_key_values: transformers' DynamicCache, keys and values [S, K, T, D] a layer; a copy.
        rope_deltas: int64 [S, 1].
        offsets: int64 [S], the count of prompt and text tokens; way-points have the positions
            offset + rope_delta ..., and see the entries before the offset.
    """

    sequences: Tensor
    past_key_values: Any
    rope_deltas: Tensor
    offsets: Tensor


def hand_over(
    prefix: ActionPrefix,
    prompt_ids: Tensor,
    texts: Sequence[Sequence[int]],
    *,
    rope_delta: int,
    pad: int,
    end: int | None,
) -> Handover:
    """Build a handover.

    Args:
        prefix: the cache as the expert reads it.
        prompt_ids: int64 [P].
        texts: the samples' tokens.
        rope_delta: the prompt's.
        pad: the id after a text's end.
        end: id of `<|traj_future_start|>`.

    Raises:
        ValueError: a text without `<|traj_future_start|>` is shorter than another: the reference, which
            knows one length for all, would then read entries that are not the sample's.
    """
    from transformers import DynamicCache

    entries = prefix.keys.shape[2]
    prompt = prompt_ids.tolist()
    sequences = torch.full((len(texts), entries + 1), pad, dtype=torch.int64, device="cpu")
    for index, (text, cached) in enumerate(zip(texts, prefix.lengths.tolist(), strict=True)):
        if text[-1] != end and cached != entries:
            raise ValueError(
                f"sample {index} ended without <|traj_future_start|> after {len(text)} tokens, and another "
                "sample is longer; hand it over alone (samples=[…])"
            )
        whole = [*prompt, *text]
        sequences[index, : len(whole)] = torch.tensor(whole, device="cpu")
    device = prefix.keys.device
    cache = DynamicCache()
    for layer, (keys_STKD, values_STKD) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(*(x.transpose(1, 2).clone() for x in (keys_STKD, values_STKD)), layer)
    offsets = torch.tensor([len(prompt) + len(text) for text in texts], device=device)
    deltas = torch.full((len(texts), 1), rope_delta, device=device)
    return Handover(sequences.to(device), cache, deltas, offsets)
