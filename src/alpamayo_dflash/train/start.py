"""The draft that training begins with: new, or an existing one fitted to the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.draft import DFlashDraft, DraftConfig, read_draft
from alpamayo_dflash.draft.formats import KEPT_IDS, check_token_ids, resize_vocabulary
from alpamayo_dflash.layers.config import parse_layers
from alpamayo_dflash.train.config import DEFAULT_BLOCK_SIZE, DEFAULT_NUM_LAYERS, TrainConfig
from alpamayo_dflash.train.frozen import FrozenTarget


def first_draft(
    config: TrainConfig, manifest: Mapping[str, Any], target: FrozenTarget, token_ids: Tensor | None = None
) -> DFlashDraft:
    """Build the draft in float32 and bind it to the target.

    Args:
        config: the options.
        manifest: of the distillation data.
        target: the target's shared parts.
        token_ids: int64 [Vd] that a reduced head keeps; None where the options ask for no such choice.

    Raises:
        ValueError: the existing draft does not fit the target or the options.
    """
    make = _new if config.init_from is None else _existing
    draft = make(config, manifest, target, token_ids)
    if config.train_embeddings and not draft.config.trained_embeddings:
        draft = _with_embeddings(draft, target)
    draft.bind(target.embedding, target.head, target.num_layers)
    if draft.config.trained_embeddings and not config.train_embeddings:
        draft.embed_tokens.requires_grad_(False)
        draft.lm_head.requires_grad_(False)
    return draft


def _new(
    config: TrainConfig, manifest: Mapping[str, Any], target: FrozenTarget, token_ids: Tensor | None
) -> DFlashDraft:
    """A draft of the target's layer shape with random weights.

    Its last norm starts as the target's, for the head that follows is the target's too; its mask embedding
    starts as the mean of the target's table.
    """
    vocab_size, hidden_size = target.embedding.shape
    draft = DFlashDraft.random(
        DraftConfig(
            hidden_size=hidden_size,
            num_layers=config.num_draft_layers or DEFAULT_NUM_LAYERS,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            intermediate_size=target.intermediate_size,
            vocab_size=vocab_size,
            block_size=config.block_size or DEFAULT_BLOCK_SIZE,
            context_len=config.context_len or manifest["context_len"],
            target_layer_ids=parse_layers(config.target_layers) or tuple(manifest["taps"]),
            num_target_layers=target.num_layers,
            mask_token_id=vocab_size,
            draft_vocab_size=None if token_ids is None else len(token_ids),
        ),
        config.seed,
    )
    with torch.no_grad():
        draft.norm.weight.copy_(target.final_norm)
        draft.mask_embedding.copy_(target.embedding.mean(0))
        if token_ids is not None:
            draft.draft_token_ids.copy_(token_ids)
    return draft


def _existing(
    config: TrainConfig, manifest: Mapping[str, Any], target: FrozenTarget, token_ids: Tensor | None
) -> DFlashDraft:
    """The draft of `init_from`, with the options' block size, context, taps and head, in float32."""
    folder = Path(str(config.init_from))
    context_len = config.context_len or manifest["context_len"]
    shape, tensors = read_draft(folder, context_len=context_len, own_mask=False)
    if config.num_draft_layers not in (None, shape.num_layers):
        raise ValueError(
            f"{folder}: has {shape.num_layers} layers, not num_draft_layers {config.num_draft_layers}"
        )
    if parse_layers(config.target_layers) not in (None, shape.target_layer_ids):
        raise ValueError(f"{folder}: taps {list(shape.target_layer_ids)}; target_layers cannot change that")
    if target.embedding.shape[1] != shape.hidden_size:
        raise ValueError(
            f"{folder}: its hidden size is {shape.hidden_size}, the target's {target.embedding.shape[1]}"
        )
    # A draft that took a row of its own target's table as mask starts anew: that row may mean anything here.
    tensors.setdefault("mask_embedding", target.embedding.mean(0))
    if config.full_vocab:
        shape, tensors = resize_vocabulary(shape, tensors, target.embedding, target.head)
    # The head is the target's, so another choice of its rows changes no weight of the draft.
    if token_ids is not None:
        tensors[KEPT_IDS] = token_ids
    elif config.draft_vocab_size == 0:
        tensors.pop(KEPT_IDS, None)
    shape = replace(
        shape,
        block_size=config.block_size or shape.block_size,
        context_len=config.context_len or shape.context_len,
        mask_token_id=shape.vocab_size,
        draft_vocab_size=len(tensors[KEPT_IDS]) if KEPT_IDS in tensors else None,
    )
    check_token_ids(tensors, shape, str(folder))
    draft = DFlashDraft(shape)
    draft.load_state_dict(
        {name: tensor if name == KEPT_IDS else tensor.float() for name, tensor in tensors.items()}
    )
    return draft


def _with_embeddings(draft: DFlashDraft, target: FrozenTarget) -> DFlashDraft:
    """The same draft with trainable copies of the target's embedding and head."""
    tensors = draft.state_dict() | {"embed_tokens.weight": target.embedding, "lm_head.weight": target.head}
    grown = DFlashDraft(replace(draft.config, trained_embeddings=True, vocab_size=len(target.embedding)))
    grown.load_state_dict(tensors)
    return grown
