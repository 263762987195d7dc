"""The shape of a draft network, and what of the target it was made for."""

from __future__ import annotations

from dataclasses import dataclass

from alpamayo_dflash.common.options import (
    MOST_BLOCK,
    check_above_zero,
    check_at_least,
    check_positive,
    check_range,
)
from alpamayo_dflash.draft.heads import KINDS, PreviousKind

DEFAULT_PREVIOUS_SIZE = 64
_MOST_CODE = 65_536
_MOST_LAYERS = 1024  # each has tensors by name, which are listed before any is read
FULL_CONTEXT = 2**31 - 1
"""A `context_len` beyond any prompt: the draft sees every state before the anchor, as z-lab's drafts do."""


@dataclass(frozen=True)
class DraftConfig:
    """A plain DFlash draft.

    Attributes:
        hidden_size: C, of the draft and of the target's text decoder; they share embedding and head.
        num_layers: decoder layers of the draft.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: D, even.
        intermediate_size: width of the gated MLP.
        vocab_size: rows of the target's embedding and head.
        block_size: tokens of a block, the known one included.
        context_len: how many tapped states before the anchor the draft sees; FULL_CONTEXT for all.
        target_layer_ids: the taps; index i is the *output* of the target's decoder layer i.
        num_target_layers: decoder layers of the target; None where a published file does not say, and then
            any target with the tapped layers fits.
        mask_token_id: the id that stands for the mask; one past the target's vocabulary, with an embedding of
            the draft's own. (Drafts of z-lab reuse a row of their target's table and name an id inside.)
        rms_norm_eps: of every RMS norm.
        rope_theta: base of the plain 1-D rotary positions.
        trained_embeddings: the draft holds its own embedding and head and uses them in place of the target's.
        draft_vocab_size: Vd, rows of the target's head that the draft uses, its `draft_token_ids`; None for
            all. Tokens outside are never proposed; the target writes them all the same. The embedding is
            whole in any case.
        previous_head: what the pick of one place adds to the logits of the next (`draft.heads`): bigram, mlp
            or gru; None for nothing.
        previous_size: r, the size of its code.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_size: int
    context_len: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    mask_token_id: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    trained_embeddings: bool = False
    draft_vocab_size: int | None = None
    previous_head: PreviousKind | None = None
    previous_size: int = DEFAULT_PREVIOUS_SIZE

    def __post_init__(self) -> None:
        """Check every value against the others."""
        counts = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        more = ("vocab_size", "context_len", "num_target_layers")
        check_positive(**{name: getattr(self, name) for name in (*counts, *more)})
        check_range(1, _MOST_LAYERS, num_layers=self.num_layers)
        check_above_zero(rms_norm_eps=self.rms_norm_eps, rope_theta=self.rope_theta)
        check_range(2, MOST_BLOCK, block_size=self.block_size)  # a known token and a mask at least
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        check_at_least(0, mask_token_id=self.mask_token_id)
        if self.previous_head not in (None, *KINDS):
            raise ValueError(
                f"previous_head is {self.previous_head!r}; it must be {', '.join(KINDS)}, or left out"
            )
        check_range(1, _MOST_CODE, previous_size=self.previous_size)
        self._check_head()
        self._check_taps()

    def _check_head(self) -> None:
        size = self.draft_vocab_size
        if size is None:
            return
        if not 0 < size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {size}; it must be 1 to the vocabulary's {self.vocab_size}, "
                "or left out for all"
            )
        if self.trained_embeddings:
            raise ValueError(
                f"draft_vocab_size is {size}, rows of the target's head; a draft with trained_embeddings has "
                "a whole head of its own"
            )

    def _check_taps(self) -> None:
        taps = self.target_layer_ids
        if not taps:
            raise ValueError("target_layer_ids is empty; the draft needs at least one tap")
        if len(set(taps)) != len(taps):
            raise ValueError(f"target_layer_ids {list(taps)} names a layer twice")
        layers = self.num_target_layers
        wrong = [tap for tap in taps if tap < 0 or (layers is not None and tap >= layers)]
        if wrong:
            known = "" if layers is None else f"; the target's {layers} layers are 0 to {layers - 1}"
            raise ValueError(f"target_layer_ids {wrong} out of range{known}")

    @property
    def columns(self) -> int:
        """Vd, columns of the draft's logits."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def feature_size(self) -> int:
        """F, the width of one context entry: the tapped states side by side."""
        return len(self.target_layer_ids) * self.hidden_size
