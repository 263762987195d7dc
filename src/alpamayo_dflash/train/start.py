"""The draft that training begins with: new, or an existing one fitted to the target."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.clips.lists import parse_chunks
from alpamayo_dflash.common.fields import naming, value_of
from alpamayo_dflash.common.identity import Fingerprint, is_made_from
from alpamayo_dflash.common.options import parse_layers
from alpamayo_dflash.draft.config import DEFAULT_PREVIOUS_SIZE, DraftConfig
from alpamayo_dflash.draft.formats import (
    KEPT_IDS,
    PREVIOUS_OUT,
    check_token_ids,
    read_draft,
    resize_vocabulary,
)
from alpamayo_dflash.draft.heads import moved_rows
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.checkpoint import FrozenTarget
from alpamayo_dflash.train.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_NUM_LAYERS,
    DEFAULT_PREVIOUS_HEAD,
    LossOptions,
    TrainConfig,
    decay_gamma,
)
from alpamayo_dflash.train.terms import parse_mix


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens.

    Attributes:
        token_ids: int64 [Vd], ascending.
        counted: how many of them stand in the training responses.
        filled: how many were added only to reach the size: they are no end marks and stand in no response.
    """

    token_ids: Tensor
    counted: int
    filled: int


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
    make = _new if config.draft.init_from is None else _existing
    draft = make(config, manifest, target, token_ids)
    if config.draft.train_embeddings and not draft.config.trained_embeddings:
        draft = _with_embeddings(draft, target)
    draft.bind(target.embedding, target.head, target.num_layers)
    if draft.config.trained_embeddings and not config.draft.train_embeddings:
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
    (vocab_size, hidden_size), text = target.embedding.shape, target.text
    draft = DFlashDraft.random(
        DraftConfig(
            hidden_size=hidden_size,
            num_layers=config.draft.num_draft_layers or DEFAULT_NUM_LAYERS,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            intermediate_size=text.intermediate_size,
            vocab_size=vocab_size,
            block_size=config.draft.block_size or DEFAULT_BLOCK_SIZE,
            context_len=config.draft.context_len or manifest["context_len"],
            target_layer_ids=parse_layers(config.draft.target_layers) or tuple(manifest["taps"]),
            num_target_layers=target.num_layers,
            mask_token_id=vocab_size,
            draft_vocab_size=None if token_ids is None else len(token_ids),
            **_previous(config, None),
        ),
        config.run.seed,
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
    folder = Path(str(config.draft.init_from))
    context_len = config.draft.context_len or manifest["context_len"]
    shape, tensors = read_draft(folder, context_len=context_len, own_mask=False)
    if config.draft.num_draft_layers not in (None, shape.num_layers):
        raise ValueError(
            f"{folder}: has {shape.num_layers} layers, not num_draft_layers {config.draft.num_draft_layers}"
        )
    if parse_layers(config.draft.target_layers) not in (None, shape.target_layer_ids):
        raise ValueError(f"{folder}: taps {list(shape.target_layer_ids)}; target_layers cannot change that")
    if target.embedding.shape[1] != shape.hidden_size:
        raise ValueError(
            f"{folder}: its hidden size is {shape.hidden_size}, the target's {target.embedding.shape[1]}"
        )
    # A draft that took a row of its own target's table as mask starts anew: that row may mean anything here.
    tensors.setdefault("mask_embedding", target.embedding.mean(0))
    if config.draft.full_vocab:
        shape, tensors = resize_vocabulary(shape, tensors, target.embedding, target.head)
    # The head is the target's, so another choice of its rows moves rows of what is added to it at most.
    before, kind = tensors.get(KEPT_IDS), _previous(config, shape)
    if token_ids is not None:
        tensors[KEPT_IDS] = token_ids
    elif config.draft.draft_vocab_size == 0:
        tensors.pop(KEPT_IDS, None)
    if PREVIOUS_OUT in tensors:
        after = tensors.get(KEPT_IDS)
        tensors[PREVIOUS_OUT] = moved_rows(tensors[PREVIOUS_OUT], before, after, shape.vocab_size)
    same_head = kind == {name: getattr(shape, name) for name in kind}
    shape = replace(
        shape,
        **kind,
        block_size=config.draft.block_size or shape.block_size,
        context_len=config.draft.context_len or shape.context_len,
        mask_token_id=shape.vocab_size,
        draft_vocab_size=len(tensors[KEPT_IDS]) if KEPT_IDS in tensors else None,
    )
    check_token_ids(tensors, shape, str(folder))
    if not same_head:  # a new one, which adds nothing yet
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("previous.")}
    draft = DFlashDraft.random(shape, config.run.seed)
    draft.load_state_dict(
        draft.state_dict()
        | {name: tensor if name == KEPT_IDS else tensor.float() for name, tensor in tensors.items()}
    )
    return draft


def _previous(config: TrainConfig, first: DraftConfig | None) -> dict[str, Any]:
    """The kind and size of the head on previous picks that the options ask for, or the first draft has."""
    kind: str | None = first.previous_head if first else DEFAULT_PREVIOUS_HEAD
    if config.draft.previous_head is not None:
        kind = None if config.draft.previous_head == "none" else config.draft.previous_head
    if kind is None:
        return {"previous_head": None, "previous_size": DEFAULT_PREVIOUS_SIZE}
    size = config.draft.previous_size or (first.previous_size if first else DEFAULT_PREVIOUS_SIZE)
    return {"previous_head": kind, "previous_size": size}


def _with_embeddings(draft: DFlashDraft, target: FrozenTarget) -> DFlashDraft:
    """The same draft with trainable copies of the target's embedding and head."""
    tensors = draft.state_dict() | {"embed_tokens.weight": target.embedding, "lm_head.weight": target.head}
    grown = DFlashDraft(replace(draft.config, trained_embeddings=True, vocab_size=len(target.embedding)))
    grown.load_state_dict(tensors)
    return grown


def acting_options(
    values: Mapping[str, Any], manifest: Mapping[str, Any], first: DraftConfig | None, where: str
) -> dict[str, Any]:
    """A run's options with those that were left out filled in: a default may be given by name.

    A mix of losses is the same in any order.

    Args:
        values: the options as they were given.
        manifest: of the distillation data.
        first: the shape of the draft that training starts from, if there is one.
        where: whose options they are, for messages.

    Raises:
        ValueError: a value of another kind than it must be.
    """

    def given(key: str, kind: type, otherwise: Any) -> Any:
        return value_of(values, key, kind, otherwise, where=where)

    block = given("block_size", int, first.block_size if first else DEFAULT_BLOCK_SIZE)
    layers = first.num_layers if first else DEFAULT_NUM_LAYERS
    taps = first.target_layer_ids if first else tuple(manifest["taps"])
    previous = (first.previous_head or "none") if first else DEFAULT_PREVIOUS_HEAD
    chunks = given("held_out_chunks", str, "")
    with naming(where):
        wanted = parse_layers(given("target_layers", str, ",".join(map(str, taps))))
        held_out_chunks = parse_chunks(chunks or None)
        terms = parse_mix(given("loss_type", str, LossOptions.loss_type))
    return {
        **values,
        # Where the dataset lies is free; whether clips are decoded decides which draft is the best.
        "real_acceptance": values.get("real_acceptance") is not None,
        "loss_type": "+".join(term.name for term in terms),
        "block_size": block,
        "num_draft_layers": given("num_draft_layers", int, layers),
        "context_len": given("context_len", int, first.context_len if first else manifest["context_len"]),
        "target_layers": wanted,
        "draft_vocab_size": given("draft_vocab_size", int, (first.draft_vocab_size if first else 0) or 0),
        "previous_head": given("previous_head", str, previous),
        "previous_size": given("previous_size", int, first.previous_size if first else DEFAULT_PREVIOUS_SIZE),
        "prefix_weight_gamma": given("prefix_weight_gamma", float, decay_gamma(block, None)),
        "held_out_chunks": held_out_chunks,
        "held_out": None if chunks else values.get("held_out"),
    }


def check_data(
    manifest: Mapping[str, Any], target: FrozenTarget, where: Path, *, identity: Fingerprint | None
) -> None:
    """Raise ValueError if the distillation data was not made with this target.

    Args:
        manifest: of the data.
        target: its shape is compared,
        where: the data's folder, for messages.
        identity: and its identity, unless this is None.
    """
    vocab_size, width = target.embedding.shape
    found = {"hidden_size": width, "vocab_size": vocab_size, "num_target_layers": target.num_layers}
    for key, value in found.items():
        if manifest[key] != value:
            raise ValueError(f"{where}: made with a target of {key} {manifest[key]}; this target has {value}")
    settings = manifest["settings"]
    made_with = settings["target"]
    if identity is not None and not is_made_from("target", made_with, settings, identity, where):
        raise ValueError(
            f"{where}: made with another target (hash {made_with[:12]}) than {target.folder}; "
            "--other-target goes on all the same"
        )


def end_token_ids(target: FrozenTarget) -> set[int]:
    """Ids of `<|cot_end|>`, `<|traj_future_start|>`, eos and, where it is a single token, the period.

    Raises:
        ValueError: the tokenizer is not found or does not fit the checkpoint.
    """
    special = target.special()
    period = [] if special.period is None else [special.period]
    return {special.cot_end, *special.stops, *period}


def choose_tokens(
    counts: Mapping[int, int], size: int, *, vocab_size: int, always: Collection[int], masked: range
) -> Vocabulary:
    """Choose the tokens of a reduced head: `always`, then the commonest (of equals the lower id).

    Where there are fewer different tokens than `size`, the lowest unmasked ids fill up.

    Args:
        counts: how often each token stands in the training responses.
        size: Vd.
        vocab_size: V of the target.
        always: kept however rare.
        masked: ids that the target never writes in text; none of them is kept.

    Raises:
        ValueError: `size` is below the number of `always`, or above that of unmasked tokens.
    """
    allowed = vocab_size - len(masked)
    first = sorted(set(always) - set(masked))
    if not len(first) <= size <= allowed:
        raise ValueError(
            f"draft_vocab_size is {size}; it must be {len(first)} (the end marks) to {allowed} (the tokens "
            "that the target may write)"
        )
    ranked = sorted(counts.keys() - set(masked) - set(first), key=lambda token: (-counts[token], token))
    kept = {*first, *ranked[: size - len(first)]}
    counted = sum(counts.get(token, 0) > 0 for token in kept)
    others = (token for token in range(vocab_size) if token not in masked and token not in kept)
    fill = [token for token, _ in zip(others, range(size - len(kept)), strict=False)]
    return Vocabulary(torch.tensor(sorted(kept.union(fill))), counted, len(fill))
