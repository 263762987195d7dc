"""What the decoder asks of a draft. A draft need not import this package: it only has to look like this.

Shapes: S sample (distinct texts, not copies of one), X context, F taps·C features, C hidden, V target
vocabulary, Vd draft vocabulary, b block size.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from alpamayo_dflash.decode.steps import State


class ProposalLike(Protocol):
    """A draft's word on the next b − 1 tokens of each text."""

    @property
    def logits(self) -> Tensor:
        """Float [S, b − 1, Vd]: column i of the middle axis predicts the i-th token after the anchor."""
        ...

    @property
    def token_ids(self) -> Tensor | None:
        """int64 [Vd], the target's id of each column of a reduced head; None if Vd is V."""
        ...


class Proposer(Protocol):
    """A block draft.

    On a GPU its `propose` is captured in a CUDA graph if it lets itself be: then only its work on the device
    is done again, and nothing that it keeps on the host changes from round to round.
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs feed the draft, in the order in which they are concatenated."""
        ...

    @property
    def context_len(self) -> int:
        """X: how many positions before the anchor the draft sees."""
        ...

    @property
    def block_size(self) -> int:
        """b: the anchor and b − 1 proposed tokens."""
        ...

    def bind(self, embedding: Tensor, head: Tensor, num_layers: int, /) -> None:
        """Take the target's embedding [V, C] and head [V, C], and its number of layers.

        Raises:
            ValueError: taps or width do not fit the target.
        """
        ...

    def propose(self, context: Tensor, context_lengths: Tensor, anchors: Tensor, /) -> ProposalLike:
        """Predict b − 1 tokens behind each anchor.

        Args:
            context: [S, X, F], right-aligned, its left part zero where there is less context than X.
            context_lengths: int64 [S], how many of the X are real.
            anchors: int64 [S], the last known token.

        Raises:
            RuntimeError, ArithmeticError, LookupError: the draft fails on these texts. That is counted, and
                the round goes on without it. Any other error ends the decode.
        """
        ...


class StaticBlock(Protocol):
    """A draft with buffers of its own for one shape, whose call can be captured in a CUDA graph."""

    def begin(self, prompt_length: int, /) -> None:
        """A prompt of so many tokens has been read: its last states lie in the taps."""
        ...

    def __call__(self, state: State, /) -> ProposalLike:
        """Predict the b − 1 tokens behind each sample's last one; nothing is read back from the device.

        Args:
            state: `tokens`, `lengths`, `previous` (the anchor's position in the last pass: the states from
                there on are new) and `bases`, by sample.
        """
        ...


@runtime_checkable
class StaticProposer(Proposer, Protocol):
    """A block draft that has a fast form."""

    @property
    def has_static_block(self) -> bool:
        """Whether it runs on the draft's device, in its dtype, for its shape."""
        ...

    def static_block(
        self, taps: Tensor, *, context: int, samples: int, per_sample: int, slots: int
    ) -> StaticBlock:
        """The fast form for one shape.

        Args:
            taps: [X + slots or more, F], the cache's tapped states: the prompt's last X, right-aligned, then
                the slots. Sample i's text starts at slot `state.bases[i]`.
            context: X, `context_len`, or the longest prompt where the draft sees more than that.
            samples: S.
            per_sample: slots of one sample.
            slots: of all.
        """
        ...
