"""Where a block's context and labels lie, and what its tokens see. Pure functions of indices.

A response's tapped states are kept as one list: first those of the last prompt positions, then those of the
response's tokens, so that the state of response token i is entry (prompt states) + i.

Shapes: S blocks, X context length, b block size, R masks that are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def anchors(length: int, stride: int = 1) -> Tensor:
    """Response positions that can be a block's known token.

    Every position that has a token after it, so that the block has a label: 0, stride … up to length − 2.
    """
    return torch.arange(0, max(length - 1, 0), stride)


def context_slots(anchors_S: Tensor, prompt_states_S: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Entries of the list of states that an anchor's context consists of: those *strictly before* it.

    The context is right-aligned: its last slot is the state just before the anchor. Where there are fewer
    than X states, the slots at the left are empty and point to entry 0; the attention mask hides them.

    Args:
        anchors_S: response position of each block's known token.
        prompt_states_S: how many prompt states lie before the response's own.
        context_len: X.

    Returns:
        entries [S, X] and filled slots [S], both int64.
    """
    end_S = prompt_states_S + anchors_S  # the anchor's own entry, which is not seen
    slots_SX = end_S[:, None] - context_len + torch.arange(context_len, device=anchors_S.device)
    return slots_SX.clamp_min(0), end_S.clamp_max(context_len)


def label_positions(anchors_S: Tensor, lengths_S: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Response positions a block predicts, and which of them lie inside the response.

    Args:
        anchors_S: response position of each block's known token.
        lengths_S: tokens of each block's response.
        block_size: b.

    Returns:
        positions [S, b−1] (anchor + 1 …, those outside set to 0) and a bool mask of the same shape.
    """
    positions = anchors_S[:, None] + torch.arange(1, block_size, device=anchors_S.device)
    inside = positions < lengths_S[:, None]
    return positions.where(inside, torch.zeros_like(positions)), inside


def block_rows(masks_R: Tensor, block_size: int) -> Tensor:
    """Where masks stand among the blocks' tokens.

    Args:
        masks_R: int64, of the S·(b−1) masks, block by block.
        block_size: b.

    Returns:
        int64 [R], of the S·b tokens: each block's known token is passed over.
    """
    blocks_R = masks_R.div(block_size - 1, rounding_mode="floor")
    return masks_R + blocks_R + 1


def attention_mask(context_lengths_S: Tensor, context_len: int, block_size: int) -> Tensor:
    """What the tokens of each block see: the filled context slots and the whole block, in both directions.

    All tokens of a block see the same, so one row serves them.

    Returns:
        bool [S, 1, 1, X + b], True where a key is seen.
    """
    slots = torch.arange(context_len + block_size, device=context_lengths_S.device)
    return (slots >= context_len - context_lengths_S[:, None])[:, None, None]


@dataclass(frozen=True)
class DraftLogits:
    """What the draft predicts for a block's masks.

    Attributes:
        logits: [S, b−1, Vd].
        token_ids: int64 [Vd], the target's id of each column of a reduced head; None where it is whole.
    """

    logits: Tensor
    token_ids: Tensor | None = None
