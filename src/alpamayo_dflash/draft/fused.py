"""The draft in its fused form: buffers for one shape, features and their keys computed once.

The plain form, `DFlashDraft.forward`, computes the features of all context states in every round and numbers
its slots from the block backwards. Here a state's features become keys and values once, when the state is
new, and stay in a cache whose entries are numbered as the states are; rotary scores depend on distances only.
In each layer one product serves the new features and the block, since both go through the same projections.

Shapes: S sample, b block, X context, E entries (X prompt states, the slots, one for what nobody reads),
F taps·C, C hidden, D head dim, K KV heads, V columns of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.draft.blocks import DraftLogits
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.heads import ChainedLogits
from alpamayo_dflash.target.qwen3_fused import FusedDecoder, FusedLayer
from alpamayo_dflash.target.weights import Linear, Rows, padded


class DraftState(Protocol):
    """What of the decoder's state the draft reads, int64 on the device."""

    tokens: Tensor
    lengths: Tensor
    previous: Tensor
    bases: Tensor


class BoundDraft(Protocol):
    """What of a `DFlashDraft` that is bound to a target its fused form reads."""

    config: DraftConfig
    mask_embedding: nn.Parameter
    layers: Any
    fc: Any
    hidden_norm: Any
    norm: Any

    @property
    def context_len(self) -> int:
        """X, or more than any prompt."""
        ...

    @property
    def embedding(self) -> Tensor:
        """[V, C]."""
        ...

    @property
    def head(self) -> Tensor:
        """[Vd, C]."""
        ...

    def block_logits(self, hidden_SBC: Tensor, logits: Tensor, /) -> DraftLogits | ChainedLogits:
        """A block's logits, with what shifts them."""
        ...

    def tables(self, like: Tensor, count: int, /) -> tuple[Tensor, Tensor]:
        """Rotary tables of the first positions."""
        ...


@dataclass(frozen=True)
class DraftPlaces:
    """Where a round's rows stand: first those of the new features, then those of the block, sample by sample.

    Attributes:
        anchors: int64 [S], token ids.
        entries: int64 [2·S·b], where keys and values go.
        positions: int64 [2·S·b], of the rotary table.
        new: int64 [S·b], the new states' rows in the taps.
        seen: uint8 [S·b, X + slots], what each of the block's tokens sees.
    """

    anchors: Tensor
    entries: Tensor
    positions: Tensor
    new: Tensor
    seen: Tensor


def places(
    state: DraftState, first_1: Tensor, *, block: int, context: int, window: int, slots: int
) -> DraftPlaces:
    """The plain form of what a round begins with.

    Args:
        state: the samples.
        first_1: int64 [1], the number of the oldest prompt state; states are numbered from the sample's first
            token on, and the prompt's have negative numbers.
        block: b.
        context: X.
        window: how many states before the anchor the draft sees; X, or more where it sees every state.
        slots: of all samples.
    """
    device = first_1.device
    anchor = state.lengths[:, None] - 1
    steps = torch.arange(block, device=device)
    bases = state.bases[:, None] + context
    fresh, own = state.previous[:, None] + steps, anchor + steps
    # From the anchor on the states of the last pass are those of rejected tokens.
    kept = torch.where(fresh < anchor, bases + fresh, context + slots)
    numbers = torch.arange(-context, slots, device=device)
    number = torch.where(numbers < 0, numbers, numbers - state.bases[:, None])
    oldest = torch.maximum(anchor - window, first_1)
    seen = (number >= oldest) & (number < anchor + block) & ((numbers < 0) | (number >= 0))
    return DraftPlaces(
        state.tokens.gather(1, anchor)[:, 0],
        torch.cat((kept.flatten(), (bases + own).flatten())),
        torch.cat((fresh.flatten(), own.flatten())) + context,
        (bases + fresh).flatten(),
        seen.to(torch.uint8).repeat_interleave(block, 0),
    )


class FusedDraft:
    """A draft bound to a target, for one shape. It is called as `decode.proposer.StaticBlock`.

    Args:
        draft: bound, on a GPU.
        taps: [X + slots or more, F], the decoder's tapped states.
        context: X.
        samples: S.
        per_sample: slots of one sample.
        slots: of all.
    """

    def __init__(
        self, draft: BoundDraft, taps: Tensor, *, context: int, samples: int, per_sample: int, slots: int
    ) -> None:
        config, like = draft.config, draft.mask_embedding
        self._draft, self._taps = draft, taps
        self._block, self._context, self._slots = config.block_size, context, slots
        self._eps = config.rms_norm_eps
        self._fc = Linear(draft.fc.weight.detach())
        self._head = Linear(padded(draft.head))
        self._decoder = FusedDecoder(draft.layers, draft.norm)
        shape = (config.num_layers, context + slots + 1, config.num_kv_heads, config.head_dim)
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)
        rows = samples * self._block
        # The new features, and after them the block's tokens.
        self._inputs = like.new_zeros(2 * rows, config.hidden_size)
        self._tokens = like.new_zeros(samples, self._block, config.hidden_size)
        self._tokens[:, 1:] = draft.mask_embedding.detach()
        cos, signed_sin = draft.tables(like, context + per_sample)
        # The plain form keeps rotate-half's sign in the table, the kernel does not.
        sin = signed_sin[:, 0, config.head_dim // 2 :].repeat(1, 2)
        self._rotary = cos[:, 0].contiguous(), sin
        device = like.device
        steps = torch.arange(1, self._block, device=device)
        self._predicting = (torch.arange(samples, device=device)[:, None] * self._block + steps).flatten()

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._places = DraftPlaces(
            zeros(samples),
            zeros(2 * rows),
            zeros(2 * rows),
            zeros(rows),
            zeros(rows, context + slots, dtype=torch.uint8),
        )
        self._first = torch.zeros(1, dtype=torch.int64, device=device)
        self._nothing = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self, prompt_length: int) -> None:
        """Compute keys and values of the prompt's last states."""
        from alpamayo_dflash.kernels.rows import add_norm

        context, count = self._context, min(self._context, prompt_length)
        self._first.fill_(-count)
        # What nobody sees counts for nothing only if it is finite, and an earlier sample may have left a NaN.
        self._keys.zero_()
        self._values.zero_()
        if not count:
            return
        states = self._fc.parts(self._taps[context - count : context])
        _, features = add_norm(None, states, self._draft.hidden_norm.weight.detach(), self._eps)
        entries = torch.arange(context - count, context, device=features.device)
        rotary = self._rotary[0][context - count : context], self._rotary[1][context - count : context]
        for index, layer in enumerate(self._decoder.layers):
            self._store(index, layer, features, rotary, entries)

    def __call__(self, state: DraftState) -> DraftLogits | ChainedLogits:
        """Predict the masks of one block for each sample."""
        from alpamayo_dflash.kernels.attention import attend
        from alpamayo_dflash.kernels.rows import add_norm

        places = self._placed(state)
        entries, new, seen = places.entries, places.new, places.seen
        cos, sin = (table.index_select(0, places.positions) for table in self._rotary)
        rows = len(new)
        features = self._fc.parts(self._taps.index_select(0, new))
        add_norm(None, features, self._draft.hidden_norm.weight.detach(), self._eps, self._inputs[:rows])
        self._tokens[:, 0] = functional.embedding(places.anchors, self._draft.embedding)

        def attention(index: int, layer: FusedLayer, _: Rows) -> Rows:
            q = self._store(index, layer, self._inputs, (cos, sin), entries)
            keys, values = self._keys[index], self._values[index]
            return attend(q[rows:], keys, values, self._nothing, seen, prompt=False, cast=layer.out.by_row)

        # The block's normed input lands after the new features, and one product serves both.
        normed = self._decoder(self._tokens.flatten(0, 1), attention, inputs_RC=self._inputs[rows:])
        hidden = normed.index_select(0, self._predicting)
        logits = self._head(hidden)
        count = self._block - 1
        hidden_SBC = hidden.view(-1, count, hidden.shape[-1])
        return self._draft.block_logits(hidden_SBC, logits.view(-1, count, logits.shape[-1]))

    def _placed(self, state: DraftState) -> DraftPlaces:
        """`places` by one kernel."""
        from alpamayo_dflash.draft.fused_triton import place

        window = self._draft.context_len
        place(state, self._first, self._places, context=self._context, window=window, slots=self._slots)
        return self._places

    def _store(
        self, index: int, layer: FusedLayer, inputs: Tensor, rotary: tuple[Tensor, Tensor], entries: Tensor
    ) -> Tensor:
        """Keys and values of inputs [N, C] to the cache; their queries [N, H, D]."""
        return layer.queries(inputs, rotary, self._keys[index], self._values[index], entries)
