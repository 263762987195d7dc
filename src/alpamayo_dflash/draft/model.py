"""The DFlash draft network, with the arithmetic of z-lab's plain DFlash (their package `dflash` 0.1.0).

A block of b tokens, the first known and the rest masks, is filled in at once. In every layer the queries come
from the block; keys and values come from the context features and the block through the same projections, and
the context features skip the layer's input norm. Block tokens see all context and each other.

The draft is stateless: slots are numbered from 0 over [context, block], the context right-aligned, so that
the block always stands at positions X … X+b−1. Rotary scores depend on distances only, so these numbers are
as good as absolute ones. Empty slots at the left, where fewer than X states exist, are masked.

Shapes: S blocks, X context, b block size, U states, F taps·C, C hidden, H heads, K KV heads, D head dim,
V vocabulary, Vd draft vocabulary (V where the head is whole).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.draft.blocks import DraftLogits, attention_mask, block_rows
from alpamayo_dflash.draft.config import FULL_CONTEXT, DraftConfig
from alpamayo_dflash.draft.formats import read_draft, write_draft
from alpamayo_dflash.draft.fused import FusedDraft
from alpamayo_dflash.draft.heads import ChainedLogits, PreviousHead
from alpamayo_dflash.target.qwen3 import rms_norm
from alpamayo_dflash.target.qwen3_fused import why_plain
from alpamayo_dflash.target.weights import share_groups

INITIAL_STD = 0.02
"""Standard deviation of new weights, as in Qwen3."""


class DraftNorm(nn.Module):
    """RMS norm with a weight, in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x, which with wider weights (under autocast) is widened first."""
        return rms_norm(x.to(torch.promote_types(x.dtype, self.weight.dtype)), self.weight, self.eps)


def rotate_signed(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary tables to x [..., T, heads, D] in rotate-half form.

    Args:
        x: queries or keys.
        tables: cos, and sin with its first half negated, [T, 1, D]: the sign that rotate-half gives the
            second half of x sits in the table, which leaves three passes over x instead of five.
    """
    cos, signed_sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


class DraftAttention(nn.Module):
    """Attention of the block over context and block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        q, kv = config.num_heads * d, config.num_kv_heads * d
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(c, q, bias=False)
        self.k_proj = nn.Linear(c, kv, bias=False)
        self.v_proj = nn.Linear(c, kv, bias=False)
        self.o_proj = nn.Linear(q, c, bias=False)
        self.q_norm = DraftNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = DraftNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normed, not rotated) and values [..., K, D] of context features or block tokens [..., C]."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        return self.k_norm(self.k_proj(x).view(heads)), self.v_proj(x).view(heads)

    def forward(
        self,
        x_SbC: Tensor,
        context: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
        seen: Tensor,
        rows_R: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x_SbC: the block's normed tokens.
            context: keys and values [S, X, K, D] of the context, keys not rotated.
            rotary: tables [X + b, 1, D] of all slots, as `rotate_signed` takes them.
            seen: bool [S, 1, 1, X + b].
            rows_R: int64, the tokens whose output is wanted, of the S·b, block by block; None for all.

        Returns:
            [S, b, C], or [R, C] of those rows.
        """
        size = x_SbC.shape[1]
        q = self.q_norm(self.q_proj(x_SbC).view(*x_SbC.shape[:-1], -1, self.head_dim))
        q = rotate_signed(q, (rotary[0][-size:], rotary[1][-size:]))
        k_block, v_block = self.keys_values(x_SbC)
        k = rotate_signed(torch.cat((context[0], k_block), dim=1), rotary)
        v = torch.cat((context[1], v_block), dim=1)
        # All tokens of a block see the same, so the query heads of a key head stand as rows of one attention:
        # the kernels that take a mask would copy keys and values for each of them.
        heads = k.shape[2]
        grouped = q.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = functional.scaled_dot_product_attention(
            grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen
        )
        mixed = mixed.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(2)
        out: Tensor = self.o_proj(_rows(mixed, rows_R))
        return out


def _rows(x_SbC: Tensor, rows_R: Tensor | None) -> Tensor:
    """Some rows of the S·b, [R, C]; without a choice x as it is."""
    return x_SbC if rows_R is None else x_SbC.flatten(0, 1).index_select(0, rows_R)


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """A Qwen3 decoder layer whose attention also reads the context features."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)
        self.input_layernorm = DraftNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DraftNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_SbC: Tensor,
        context: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
        seen: Tensor,
        rows_R: Tensor | None = None,
    ) -> Tensor:
        """One layer over the block; arguments and result as in `DraftAttention.forward`."""
        attended = self.self_attn(self.input_layernorm(x_SbC), context, rotary, seen, rows_R)
        x = _rows(x_SbC, rows_R) + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DFlashDraft(nn.Module):
    """A DFlash draft, which the decoder drives as its `BlockDraft`.

    The embedding and the head are the target's: `bind` hands them in, nothing stores them. A draft with
    `trained_embeddings` holds its own and only lets `bind` check the target. A draft with a reduced head
    copies the rows `draft_token_ids` of the target's head when it is bound.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.hidden_norm = DraftNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = DraftNorm(config.hidden_size, config.rms_norm_eps)
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        if config.trained_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.draft_vocab_size is not None:
            self.draft_token_ids: Tensor
            self.register_buffer("draft_token_ids", torch.arange(config.draft_vocab_size))
        self.previous: PreviousHead | None = None
        if config.previous_head is not None:
            sizes = config.hidden_size, config.previous_size, config.columns
            self.previous = PreviousHead(config.previous_head, *sizes)
        self._bound: tuple[Tensor, Tensor] | None = None
        # Whether the mask embedding is to be a copy of a row of the target's table, which `bind` takes.
        self._mask_from_target = self._mask_is_targets = False
        self._tables: tuple[Tensor, Tensor] | None = None

    @classmethod
    def random(cls, config: DraftConfig, seed: int = 0) -> DFlashDraft:
        """A new draft: normal weights of standard deviation 0.02, norms 1, the same for the same seed."""
        draft = cls(config)
        generator = torch.Generator().manual_seed(generator_seed(seed))
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                if name.startswith("previous."):
                    continue  # after the rest, so that this is the same without a head
                if parameter.ndim == 2 or name == "mask_embedding":
                    parameter.normal_(0.0, INITIAL_STD, generator=generator)
        if draft.previous is not None:
            draft.previous.reset(generator)
        return draft

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        context_len: int | None = None,
    ) -> DFlashDraft:
        """Read a draft folder.

        Args:
            folder: in our layout, z-lab's or FlashDrive's (see `draft.formats`). A draft of z-lab's gets its
                mask embedding, a copy of a row of the target's table, when it is bound.
            dtype: of the weights; the file's own where it is left out.
            device: where to put them. (`bind` moves the draft to the target's device and dtype.)
            context_len: for a folder that names none; left out, such a draft sees every state.

        Raises:
            ValueError: something is missing, surplus, misshapen, corrupt or would have to be guessed.
        """
        config, tensors = read_draft(folder, context_len=context_len or FULL_CONTEXT, own_mask=False)
        draft = cls(config)
        draft._mask_from_target = draft._mask_is_targets = "mask_embedding" not in tensors
        draft.load_state_dict(tensors, assign=True, strict=not draft._mask_from_target)
        return draft.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the draft folder, atomically.

        Raises:
            ValueError: the folder holds something other than a draft, or the draft has no mask embedding yet.
        """
        if self._mask_from_target or self.config.num_target_layers is None:
            raise ValueError(
                "the draft takes its mask embedding or the number of layers from its target; "
                "bind it to that first"
            )
        write_draft(folder, self.config, self.state_dict(), provenance=provenance)

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs the draft reads, in the order of their concatenation."""
        return self.config.target_layer_ids

    @property
    def context_len(self) -> int:
        """X, how many states before the anchor the draft sees."""
        return self.config.context_len

    @property
    def block_size(self) -> int:
        """B, tokens of a block, the known one included."""
        return self.config.block_size

    @property
    def embedding(self) -> Tensor:
        """[V, C], the target's, or the draft's own."""
        return self.embed_tokens.weight if self.config.trained_embeddings else self._target()[0]

    @property
    def token_ids(self) -> Tensor | None:
        """int64 [Vd], the target's id of each row of a reduced head; None where the head is whole."""
        return None if self.config.draft_vocab_size is None else self.draft_token_ids

    @property
    def head(self) -> Tensor:
        """[Vd, C], the target's or its rows `token_ids`, or the draft's own."""
        return self.lm_head.weight if self.config.trained_embeddings else self._target()[1]

    def _target(self) -> tuple[Tensor, Tensor]:
        if self._bound is None:
            raise ValueError("the draft has no embedding and head yet; bind it to a target first")
        return self._bound

    def apart(self, embedding: Tensor) -> DFlashDraft:
        """This draft, or where it is bound to another embedding a copy that can be bound beside it.

        The copy shares the weights where device and dtype are the same.
        """
        if self._bound is None or self._bound[0].data_ptr() == embedding.data_ptr():
            return self
        bound = self._bound[0]
        if bound.device != embedding.device or bound.dtype != embedding.dtype:
            other = copy.deepcopy(self)
        else:
            other = copy.copy(self)
            other._parameters = self._parameters.copy()
        other._bound, other._tables = None, None
        other._mask_from_target = self._mask_is_targets
        return other

    def bind(self, embedding: Tensor, head: Tensor, num_layers: int) -> None:
        """Take the target's embedding and head, and move the draft to their device and dtype.

        Args:
            embedding: [V, C].
            head: [V, C].
            num_layers: decoder layers of the target.

        Raises:
            ValueError: the draft was made for another width, vocabulary or number of layers.
        """
        config = self.config
        if embedding.shape != head.shape:
            raise ValueError(f"embedding {list(embedding.shape)} and head {list(head.shape)} differ in shape")
        rows, width = embedding.shape
        if width != config.hidden_size:
            raise ValueError(f"the draft's hidden size is {config.hidden_size}, the target's {width}")
        if rows != config.vocab_size:
            raise ValueError(
                f"the draft's vocabulary has {config.vocab_size} tokens, the target's {rows}; "
                "train from this draft with --init-from and --full-vocab to resize it"
            )
        if config.num_target_layers is None and max(config.target_layer_ids) >= num_layers:
            raise ValueError(
                f"the draft taps layers {list(config.target_layer_ids)}; this target has {num_layers} layers"
            )
        if config.num_target_layers not in (None, num_layers):
            raise ValueError(
                f"the draft taps layers {list(config.target_layer_ids)} of a target with "
                f"{config.num_target_layers} layers; this target has {num_layers}"
            )
        self.to(device=embedding.device, dtype=embedding.dtype)
        if embedding.is_cuda:
            share_groups(self)  # so that the fused form can run them as one product
        self.config = replace(config, num_target_layers=num_layers)
        ids = self.token_ids
        self._bound = (embedding.detach(), head.detach() if ids is None else head.detach()[ids])
        if self._mask_from_target:
            self.mask_embedding = nn.Parameter(embedding.detach()[config.mask_token_id].clone())
            self._mask_from_target = False

    def tables(self, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tables [count, 1, D] of slots 0 …, in the dtype of `like`, kept from call to call."""
        tables = self._tables
        if (
            tables is None
            or tables[0].device != like.device
            or tables[0].dtype != like.dtype
            or len(tables[0]) < count
        ):
            config = self.config
            with torch.inference_mode(False):  # a draft that has decoded can still be trained
                slots = torch.arange(count, device=like.device)
                exponents = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
                angles = slots[:, None].float() / config.rope_theta**exponents
                cos, sin = angles.cos(), angles.sin()
                both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
                tables = self._tables = (both[0][:, None].to(like.dtype), both[1][:, None].to(like.dtype))
        return tables[0][:count], tables[1][:count]

    @property
    def has_static_block(self) -> bool:
        """Whether the fused form runs where the draft is (`decode.proposer.StaticDraft`)."""
        return why_plain(self.layers, self.mask_embedding) is None

    def static_block(
        self, taps: Tensor, *, context: int, samples: int, per_sample: int, slots: int
    ) -> FusedDraft:
        """The fused form for one shape."""
        return FusedDraft(self, taps, context=context, samples=samples, per_sample=per_sample, slots=slots)

    def features(self, states: Tensor) -> Tensor:
        """Context features [..., C] of tapped states [..., F]."""
        features: Tensor = self.hidden_norm(self.fc(states.to(self.fc.weight.dtype)))
        return features

    def forward(
        self,
        states: Tensor,
        context_lengths_S: Tensor,
        anchors_S: Tensor,
        entries_SX: Tensor | None = None,
        wanted_R: Tensor | None = None,
    ) -> Tensor:
        """Predict the masks of one block for each anchor.

        Args:
            states: tapped states, [S, X, F] (right-aligned), or [U, F] if `entries_SX` is given.
            context_lengths_S: int64 [S], filled context slots of each block.
            anchors_S: int64 [S], token ids of the blocks' known tokens.
            entries_SX: int64 [S, X], which of the U states each context slot holds. Blocks of one response
                share most of their context: so its features and keys are computed once.
            wanted_R: int64 [R], the masks whose prediction is wanted, ascending, of the S·(b−1), block by
                block; None for all. Numbers and no bool mask: the host would wait for their count.

        Returns:
            [S, b−1, C] at the masks, or [R, C] at the wanted ones, after the final norm:
            `x @ head.T` are the logits.
        """
        config = self.config
        features = self.features(states)
        known = functional.embedding(anchors_S, self.embedding)[:, None]
        masks = self.mask_embedding.to(known.dtype).expand(len(anchors_S), config.block_size - 1, -1)
        x = torch.cat((known, masks), dim=1)
        slots = (states if entries_SX is None else entries_SX).shape[1]
        seen = attention_mask(context_lengths_S, slots, config.block_size)
        rotary = self.tables(x, slots + config.block_size)
        # Every layer but the last needs all tokens, for the next one's keys and values.
        rows_R = None if wanted_R is None else block_rows(wanted_R, config.block_size)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer)
            keys, values = layer.self_attn.keys_values(features)
            if entries_SX is not None:
                keys, values = keys[entries_SX], values[entries_SX]
            last = index == config.num_layers - 1
            x = layer(x, (keys, values), rotary, seen, rows_R if last else None)
        hidden: Tensor = self.norm(x[:, 1:] if wanted_R is None else x)
        return hidden

    def shift_codes(
        self, hidden_RC: Tensor, anchors_S: Tensor, labels_SB: Tensor, wanted_R: Tensor | None = None
    ) -> Tensor:
        """The head's codes where the picks are known, [R, r]: `@ previous.out.weight.T` are the shifts.

        Args:
            hidden_RC: from `forward`, of the wanted masks.
            anchors_S: int64, the known tokens.
            labels_SB: int64, the tokens of the masks.
            wanted_R: as in `forward`.
        """
        assert self.previous is not None
        before_SB = torch.cat((anchors_S[:, None], labels_SB[:, :-1]), dim=1)
        return self.previous.codes(hidden_RC, functional.embedding(before_SB, self.embedding), wanted_R)

    @torch.no_grad()
    def propose(
        self, context_SXF: Tensor, context_lengths_S: Tensor, anchors_S: Tensor
    ) -> DraftLogits | ChainedLogits:
        """Propose the b−1 tokens after each anchor.

        Args:
            context_SXF: tapped states strictly before the anchor, right-aligned; finite numbers, such as
                zeros, in the empty slots at the left.
            context_lengths_S: int64 [S].
            anchors_S: int64 [S], the known tokens.
        """
        hidden = self(context_SXF, context_lengths_S, anchors_S)
        return self.block_logits(hidden, functional.linear(hidden, self.head))

    def block_logits(self, hidden_SBC: Tensor, logits: Tensor) -> DraftLogits | ChainedLogits:
        """A block's logits, with what shifts them."""
        if self.previous is None:
            return DraftLogits(logits, self.token_ids)
        return ChainedLogits(
            logits,
            self.token_ids,
            hidden_SBC=hidden_SBC,
            embedding=self.embedding,
            previous=self.previous,
        )
