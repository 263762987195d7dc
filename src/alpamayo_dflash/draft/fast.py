"""The draft in its fast form: buffers for one shape, features and their keys computed once.

The plain form, `DFlashDraft.forward`, computes the features of all context states in every round and numbers
its slots from the block backwards. Here a state's features become keys and values once, when the state is
new, and stay in a cache whose entries are numbered as the states are; rotary scores depend on distances only.
In each layer one product serves the new features and the block, since both go through the same projections.

Shapes: S sample, b block, X context, E entries (X prompt states, the slots, one for what nobody reads),
F taps·C, C hidden, D head dim, K KV heads, V columns of the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.target.fused import FusedLayer
from alpamayo_dflash.target.linear import Linear
from alpamayo_dflash.target.storage import padded

if TYPE_CHECKING:
    from alpamayo_dflash.draft.model import DFlashDraft, Proposal


class Texts(Protocol):
    """What of the decoder's state the draft reads, int64 on the device."""

    tokens: Tensor
    lengths: Tensor
    previous: Tensor
    bases: Tensor


class FastDraft:
    """A draft bound to a target, for one shape. It is called as `decode.proposer.StaticBlock`.

    Args:
        draft: bound, on a GPU.
        taps: [X + slots + 1, F], the decoder's tapped states.
        samples: S.
        per_sample: slots of one sample.
        slots: of all.
    """

    def __init__(self, draft: DFlashDraft, taps: Tensor, samples: int, per_sample: int, slots: int) -> None:
        config, like = draft.config, draft.mask_embedding
        self._draft, self._taps = draft, taps
        self._block, self._context, self._slots = config.block_size, config.context_len, slots
        self._eps = config.rms_norm_eps
        self._fc = Linear(draft.fc.weight.detach())
        self._head = Linear(padded(draft.head))
        self._layers = [FusedLayer.of(layer) for layer in draft.layers]
        entries = config.context_len + slots + 1
        shape = (config.num_layers, entries, config.num_kv_heads, config.head_dim)
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)
        rows = samples * self._block
        # The new features, and behind them the block's tokens.
        self._inputs = like.new_zeros(2 * rows, config.hidden_size)
        self._tokens = like.new_zeros(samples, self._block, config.hidden_size)
        self._tokens[:, 1:] = draft.mask_embedding.detach()
        cos, signed_sin = draft.tables(like, config.context_len + per_sample)
        # The plain form keeps rotate-half's sign in the table, the kernel does not.
        sin = signed_sin[:, 0, config.head_dim // 2 :].repeat(1, 2)
        self._rotary = cos[:, 0].contiguous(), sin
        device = like.device
        self._steps = torch.arange(self._block, device=device)
        self._numbers = torch.arange(-config.context_len, slots, device=device)
        self._predicting = (
            torch.arange(samples, device=device)[:, None] * self._block + self._steps[1:]
        ).flatten()
        self._first = torch.zeros(1, dtype=torch.int64, device=device)
        self._nothing = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self, prompt_length: int) -> None:
        """Compute keys and values of the prompt's last states."""
        from alpamayo_dflash.kernels import launch

        context = self._context
        self._first.fill_(-min(context, prompt_length))
        if not context:
            return
        _, features = launch.add_norm(
            None, self._fc.parts(self._taps[:context]), self._draft.hidden_norm.weight.detach(), self._eps
        )
        entries = torch.arange(context, device=features.device)
        rotary = self._rotary[0][:context], self._rotary[1][:context]
        for index, layer in enumerate(self._layers):
            self._store(index, layer, features, rotary, entries)

    def __call__(self, state: Texts) -> Proposal:
        """Predict the masks of one block for each sample."""
        from alpamayo_dflash.draft.model import Proposal
        from alpamayo_dflash.kernels import launch

        entries, rotary, new, seen = self._places(state)
        rows = len(new)
        features = self._fc.parts(self._taps.index_select(0, new))
        launch.add_norm(
            None, features, self._draft.hidden_norm.weight.detach(), self._eps, self._inputs[:rows]
        )
        anchors = state.tokens.gather(1, state.lengths[:, None] - 1)[:, 0]
        self._tokens[:, 0] = functional.embedding(anchors, self._draft.embedding)
        hidden = self._tokens.flatten(0, 1)
        first, block = self._layers[0], self._inputs[rows:]
        launch.add_norm(hidden, None, first.input_norm, self._eps, block)
        for index, layer in enumerate(self._layers):
            q = self._store(index, layer, self._inputs, rotary, entries)
            attended = launch.attend(
                q[rows:], self._keys[index], self._values[index], self._nothing, seen, prompt=False
            )
            hidden, normed = launch.add_norm(hidden, layer.out.parts(attended), layer.mlp_norm, self._eps)
            down = layer.down.parts(layer.gate_up.gated(normed))
            last = index + 1 == len(self._layers)
            weight = self._draft.norm.weight.detach() if last else self._layers[index + 1].input_norm
            hidden, normed = launch.add_norm(hidden, down, weight, self._eps, None if last else block)
        logits = self._head(normed.index_select(0, self._predicting))
        return Proposal(logits.view(-1, self._block - 1, logits.shape[-1]), self._draft.token_ids)

    def _places(self, state: Texts) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Where this round's rows stand.

        Returns:
            entries [2·S·b] that the new features' and the block's keys go to; the rotary tables there;
            the entries [S·b] of the new states; uint8 [S·b, X + slots], what each of the block's tokens sees.
        """
        anchor = state.lengths[:, None] - 1
        bases = state.bases[:, None] + self._context
        fresh = state.previous[:, None] + self._steps
        own = anchor + self._steps
        new = (bases + fresh).flatten()
        # From the anchor on the states of the last pass are those of rejected tokens.
        kept = torch.where(fresh < anchor, bases + fresh, self._context + self._slots)
        entries = torch.cat((kept.flatten(), (bases + own).flatten()))
        positions = torch.cat((fresh.flatten(), own.flatten())) + self._context
        rotary = self._rotary[0].index_select(0, positions), self._rotary[1].index_select(0, positions)
        # States are numbered from the text's first token; the prompt's have negative numbers.
        number = torch.where(self._numbers < 0, self._numbers, self._numbers - state.bases[:, None])
        oldest = torch.maximum(anchor - self._context, self._first)
        seen = (number >= oldest) & (number < anchor + self._block)
        seen &= (self._numbers < 0) | (number >= 0)
        return entries, rotary, new, seen.to(torch.uint8).repeat_interleave(self._block, 0)

    def _store(
        self, index: int, layer: FusedLayer, inputs: Tensor, rotary: tuple[Tensor, Tensor], entries: Tensor
    ) -> Tensor:
        """Keys and values of inputs [N, C] to the cache; their queries [N, H, D]."""
        from alpamayo_dflash.kernels import launch

        return launch.rotate_store(
            layer.qkv.parts(inputs),
            layer.qk_norms,
            self._eps,
            rotary,
            self._keys[index],
            self._values[index],
            entries,
        )
