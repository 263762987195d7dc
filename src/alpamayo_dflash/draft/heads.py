"""Previous-token heads: the pick of one place shifts the logits of the next.

A block draft fills its places independently. Where the target could go on in several ways the block mixes
them, and the chain breaks; a head keeps a chain to one way of speaking. It adds to a place's logits a word of
low rank on what was picked at the place before: `out(code)`, with the code of size r

    bigram  x                                  of the previous pick alone
    mlp     silu(hidden(h) + x)                and of the place's own state h
    gru     silu(hidden(h) + state(s))         and of all picks so far, s = GRU(x, s of the place before)

where x = token(e) of the previous pick's embedding e in the target's table, RMS-normed. The first place's
previous pick is the block's known token. (Semi-autoregressive heads of this kind: Cai et al., "Medusa", 2024,
and Ankner et al., "Hydra", 2024, feed earlier picks to later heads.)

Shapes: S blocks, B places (b−1), R rows, C hidden, r code size, Vd columns of the draft's logits.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

PreviousKind = Literal["bigram", "mlp", "gru"]
KINDS: tuple[PreviousKind, ...] = get_args(PreviousKind)


def head_shapes(kind: PreviousKind, hidden_size: int, size: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a head."""
    shapes: dict[str, tuple[int, ...]] = {
        "token.weight": (size, hidden_size),
        "out.weight": (columns, size),
    }
    if kind != "bigram":
        shapes["hidden.weight"] = (size, hidden_size)
    if kind == "gru":
        shapes["state.weight"] = (size, size)
        for side in ("ih", "hh"):
            shapes |= {f"cell.weight_{side}": (3 * size, size), f"cell.bias_{side}": (3 * size,)}
    return shapes


class PreviousHead(nn.Module):
    """What the pick of one place adds to the logits of the next.

    Args:
        kind: see the module.
        hidden_size: C.
        size: r.
        columns: Vd.
    """

    def __init__(self, kind: PreviousKind, hidden_size: int, size: int, columns: int) -> None:
        super().__init__()
        self.kind = kind
        self.token = nn.Linear(hidden_size, size, bias=False)
        if kind != "bigram":
            self.hidden = nn.Linear(hidden_size, size, bias=False)
        if kind == "gru":
            self.state = nn.Linear(size, size, bias=False)
            self.cell = nn.GRUCell(size, size)
        self.out = nn.Linear(size, columns, bias=False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """New weights: of unit variance after each product, and nothing added to the logits yet."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 or name == "out.weight":
                parameter.zero_()
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def begin(self, hidden: Tensor) -> Tensor:
        """The state before the first place, [..., r], for states h [..., C]."""
        return hidden.new_zeros(*hidden.shape[:-1], self.token.out_features)

    def step(self, hidden_RC: Tensor, previous_RC: Tensor, state_Rr: Tensor) -> tuple[Tensor, Tensor]:
        """The code of one place.

        Args:
            hidden_RC: the place's states after the draft's final norm.
            previous_RC: embeddings of the picks at the place before.
            state_Rr: from the place before, or `begin`.

        Returns:
            the codes [R, r], and the state for the next place.
        """
        told = self._tokens(previous_RC)
        if self.kind == "gru":
            told = state_Rr = self.cell(told, state_Rr)
        return self._code(hidden_RC, told), state_Rr

    def codes(self, hidden_RC: Tensor, previous_SBC: Tensor, wanted_R: Tensor | None = None) -> Tensor:
        """The codes of many places whose previous picks are known: what training asks.

        Args:
            hidden_RC: states of the wanted places.
            previous_SBC: embeddings of the picks before every place.
            wanted_R: int64, the places, ascending, of the S·B, block by block; None for all.

        Returns:
            [R, r].
        """
        if self.kind != "gru":
            return self._code(hidden_RC, self._tokens(_places(previous_SBC, wanted_R)))
        x_SBr = self._tokens(previous_SBC)
        state, states = x_SBr.new_zeros(len(x_SBr), x_SBr.shape[-1]), []
        for x_Sr in x_SBr.unbind(1):
            state = self.cell(x_Sr, state)
            states.append(state)
        return self._code(hidden_RC, _places(torch.stack(states, dim=1), wanted_R))

    def _tokens(self, embeddings: Tensor) -> Tensor:
        x: Tensor = self.token(functional.rms_norm(embeddings, embeddings.shape[-1:]))
        return x

    def _code(self, hidden: Tensor, told: Tensor) -> Tensor:
        """Of what is told of the picks: x, or a gru's state."""
        if self.kind == "bigram":
            return told
        return functional.silu(self.hidden(hidden) + (self.state(told) if self.kind == "gru" else told))


def _places(x_SBC: Tensor, wanted_R: Tensor | None) -> Tensor:
    """The wanted of S·B places, [R, C]."""
    flat = x_SBC.flatten(0, 1)
    return flat if wanted_R is None else flat.index_select(0, wanted_R)


class ChainedLogits:
    """What a draft with a head predicts for a block: places are filled in one after the other.

    Args:
        logits: [S, b−1, Vd or more], before any shift.
        token_ids: as in `blocks.DraftLogits`.
        hidden_SBC: the places' states after the draft's final norm.
        embedding: [V, C], the target's table.
        previous: the head.

    Attributes:
        logits: the same.
        token_ids: the same.
    """

    def __init__(
        self,
        logits: Tensor,
        token_ids: Tensor | None,
        *,
        hidden_SBC: Tensor,
        embedding: Tensor,
        previous: PreviousHead,
    ) -> None:
        self.logits, self.token_ids = logits, token_ids
        self._hidden_SBC, self._embedding, self._previous = hidden_SBC, embedding, previous
        self._state: Tensor | None = None

    def shift(self, place: int, rows_R: Tensor | None, tokens_R: Tensor) -> Tensor:
        """What is added to a place's logits, [R, Vd]; places are asked in order, from 0 on.

        Args:
            place: of the b−1.
            rows_R: int64, the text of each row, the same at every place; None for each text once.
            tokens_R: int64, the target's ids of what was picked at the place before, or of the known token.
        """
        hidden = self._hidden_SBC[:, place] if rows_R is None else self._hidden_SBC[rows_R, place]
        state = self._previous.begin(hidden) if place == 0 or self._state is None else self._state
        tokens_RC = functional.embedding(tokens_R, self._embedding)
        code, self._state = self._previous.step(hidden, tokens_RC, state)
        shift: Tensor = self._previous.out(code)
        return shift


def moved_rows(out_Vr: Tensor, before: Tensor | None, after: Tensor | None, vocab_size: int) -> Tensor:
    """A head's `out` for another choice of columns; those of tokens that it did not know are 0.

    Args:
        out_Vr: as it is.
        before: int64, the target's id of each of its rows; None where row and id are the same.
        after: the same of the rows that are wanted; None for `vocab_size` of them.
        vocab_size: V of the target.
    """
    rows = torch.arange(len(out_Vr)) if before is None else before.cpu()
    whole = out_Vr.new_zeros(max(vocab_size, int(rows.max()) + 1), out_Vr.shape[1])
    whole[rows] = out_Vr
    return whole[:vocab_size] if after is None else whole[after.cpu()]
