"""The seam of proposals: what is offered after a sample's last token, by whom, and how offers are united.

A proposer is one of three. A `BlockDraft` is a network; `DraftProposer` makes proposals of its logits. A
`Listed` one says on the host what it offers. A `Captured` one runs inside the device's rounds. The host's
rounds take trees; the device's take chains, of a tree its first one.

Shapes: S sample (distinct texts, not copies of one), X context, F taps·C features, C hidden, V target
vocabulary, Vd draft vocabulary, b block size.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.decode.loop import Sample, same_texts
from alpamayo_dflash.decode.sampling import PlaceChooser
from alpamayo_dflash.decode.steps import Chains, State
from alpamayo_dflash.decode.stops import StopRules
from alpamayo_dflash.decode.verify import Prefilled

ANCHOR = -1
"""The parent of what follows a sample's last token."""
DRAFT, END_RULE, TARGET = "draft", "end rule", "target"
SOURCES = ("phrase tree", "last window", DRAFT, END_RULE)
"""Who is named for a token that several offer: the first of these. Other names stand before the draft."""
DRAFT_ERRORS = (RuntimeError, ArithmeticError, LookupError)
"""What a draft may raise without ending the decode; see `BlockDraft.propose`."""


LISTED_BLOCK = 16
"""b where lists are offered and there is no draft, unless a `Listed` one names its own."""


@dataclass(frozen=True)
class Proposed:
    """Tokens offered after one sample's last token.

    Attributes:
        tokens: the target's ids.
        parents: for each token the index of the one that it follows, −1 for the sample's last token; parents
            stand before children. Left out, the tokens are a chain: −1, 0, 1, …
        source: who offers them: one of `SOURCES`, or a word of the proposer's own.

    Raises:
        ValueError: a parent is missing or stands after its child.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    source: str = "listed"

    def __post_init__(self) -> None:
        """Check the parents."""
        if self.parents is None:
            object.__setattr__(self, "parents", range(-1, len(self.tokens) - 1))
        elif len(self.parents) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.parents)} parents, not one each")
        else:
            for node, parent in enumerate(self.parents):
                if not ANCHOR <= parent < node:
                    raise ValueError(f"the parent of token {node} is {parent}; it must stand before it")


class Listed(ABC):
    """A proposer that says on the host what it offers. It must not change the samples.

    Attributes:
        block_size: b of the device's rounds where there is no draft: they take at most b − 1 of its tokens,
            ends of sentences included.
    """

    block_size = LISTED_BLOCK

    def begin(self, prefilled: Prefilled, samples: Sequence[Sample]) -> None:  # noqa: B027
        """A prompt has been read, and these samples of it are about to be written."""

    @abstractmethod
    def propose(self, samples: Sequence[Sample]) -> list[Proposed]:
        """What is offered after each of these unfinished samples (`Sample.tokens`), in their order."""


class Captured(Protocol):
    """A proposer that runs inside the device's rounds.

    On a GPU it is captured with them: it launches work on tensors that never move and reads nothing back.
    """

    @property
    def source(self) -> str:
        """See Proposed."""
        ...

    def __call__(self, state: State, /) -> Chains:
        """See `steps.Chains`; the tensors must be contiguous."""
        ...


class BlockLogits(Protocol):
    """A draft's word on the next b − 1 tokens of each text."""

    @property
    def logits(self) -> Tensor:
        """Float [S, b − 1, Vd or more]: column i of the middle axis predicts the i-th token after the anchor.

        Columns beyond the vocabulary are padding.
        """
        ...

    @property
    def token_ids(self) -> Tensor | None:
        """int64 [Vd], the target's id of each column of a reduced head; None if Vd is V."""
        ...


@runtime_checkable
class Chained(BlockLogits, Protocol):
    """The same of a draft whose places are filled in one after the other."""

    def shift(self, place: int, rows: Tensor | None, tokens: Tensor, /) -> Tensor:
        """What is added to the logits of a place, float [R, Vd]; called for place 0, 1, … in this order.

        Args:
            place: column of the logits' middle axis.
            rows: int64 [R], which of the S texts each row belongs to, the same at every place; None for each
                text once, in order.
            tokens: int64 [R], the target's ids of the picks at the place before; at place 0 the anchors.
        """
        ...


class BlockDraft(Protocol):
    """A block draft. It need not import this package: it only has to look like this.

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

    def propose(self, context: Tensor, context_lengths: Tensor, anchors: Tensor, /) -> BlockLogits:
        """Predict b − 1 tokens after each anchor; what is returned may be `Chained`.

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

    def __call__(self, state: State, /) -> BlockLogits:
        """Predict the b − 1 tokens after each sample's last one; nothing is read back from the device.

        Args:
            state: `tokens`, `lengths`, `previous` (the anchor's position in the last pass: the states from
                there on are new) and `bases`, by sample.
        """
        ...


@runtime_checkable
class SharedDraft(Protocol):
    """What a block draft also has that several targets may be given."""

    def apart(self, embedding: Tensor) -> BlockDraft:
        """This draft, or where it is bound to another embedding a copy to bind, of the same weights."""
        ...


@runtime_checkable
class StaticDraft(BlockDraft, Protocol):
    """A block draft that has a fused form."""

    @property
    def has_static_block(self) -> bool:
        """Whether it runs on the draft's device, in its dtype, for its shape."""
        ...

    def static_block(
        self, taps: Tensor, *, context: int, samples: int, per_sample: int, slots: int
    ) -> StaticBlock:
        """The fused form for one shape.

        Args:
            taps: [X + slots or more, F], the cache's tapped states: the prompt's last X, right-aligned, then
                the slots. Sample i's text starts at slot `state.bases[i]`.
            context: X, `context_len`, or the longest prompt where the draft sees more than that.
            samples: S.
            per_sample: slots of one sample.
            slots: of all.
        """
        ...


@dataclass(frozen=True)
class Proposers:
    """Who proposes: a draft or none, and those whose chains stand before it, the first that has one."""

    draft: BlockDraft | None = None
    listed: Sequence[Listed] = ()
    captured: Sequence[Captured] = ()

    @property
    def block(self) -> int:
        """b, 1 where nobody proposes."""
        if self.draft is not None:
            return self.draft.block_size
        sizes = [proposer.block_size for proposer in self.listed] + [LISTED_BLOCK] * bool(self.captured)
        return max(sizes, default=1)


class DraftProposer:
    """Any block draft as a proposer of the host's rounds (those of the device ask it in `round_device`).

    The picks are made as the target's are: same temperature, nucleus and masked ids, and the noise of the
    same sample, position and target token id, so that a draft that agrees with the target proposes what the
    target will choose.

    Args:
        draft: bound to the target.
        cache: the target's, which holds the draft's context.
        rules: after a token that these continue the draft is not asked.

    Attributes:
        failures: texts that the draft failed on when it was last asked, or its logits were not finite.
        logits: where they are kept, by sample index what it was picked of when the draft was last asked:
            float32 [b − 1, Vd]. Samples that the draft was not asked for or failed on have none.
        token_ids: int64 [Vd], the target's ids of their columns; None where column and id are the same.
    """

    def __init__(self, draft: BlockDraft, cache: Cache, rules: StopRules) -> None:
        self.draft, self._cache, self._rules = draft, cache, rules
        self.failures, self._keep = 0, False
        self.logits: dict[int, Tensor] = {}
        self.token_ids: Tensor | None = None

    def begin(self, chooser: PlaceChooser, limit: int, *, keep_logits: bool = False) -> None:
        """Take over how tokens are chosen, the most tokens of a sample, and whether logits are kept."""
        self._chooser, self._limit, self._keep = chooser, limit, keep_logits

    def propose(self, samples: Sequence[Sample]) -> list[Proposed]:
        """See Listed. Nothing is proposed to a text that the draft is not asked for or failed on."""
        asked = [
            members
            for members in same_texts(samples)
            if asks_draft(self._rules, members[0].anchor, len(members[0].tokens), self._limit)
        ]
        self.failures = 0
        self.logits.clear()
        picked = self._ask(asked) if asked else {}
        return [Proposed(picked.get(sample.index, ()), source=DRAFT) for sample in samples]

    def _ask(self, asked: Sequence[Sequence[Sample]]) -> dict[int, list[int]]:
        """Picks by sample index."""
        context, lengths = self._cache.context([members[0].path for members in asked])
        anchors = torch.tensor([members[0].anchor for members in asked], device=context.device)
        try:
            block = self.draft.propose(context, lengths, anchors)
        except DRAFT_ERRORS as error:
            return self._failed(error, asked)
        finite = torch.isfinite(block.logits).flatten(1).all(-1).tolist()
        wanted = [(i, sample) for i, good in enumerate(finite) if good for sample in asked[i]]
        if not wanted:
            self.failures = len(asked)
            return {}
        columns = draft_columns(block, self._chooser.vocab_size)
        if isinstance(block, Chained):
            try:
                picked = self._chain(block, wanted, anchors, columns)
            except DRAFT_ERRORS as error:
                return self._failed(error, asked)
        else:
            picked = self._picks(block, wanted, columns)
        self.failures = len(asked) - len({index for index, sample in wanted if sample.index in picked})
        return picked

    def _failed(self, error: Exception, asked: Sequence[Sequence[Sample]]) -> dict[int, list[int]]:
        """What is picked where the draft raised an error: nothing."""
        warn_failed(error)
        self.failures = len(asked)
        return {}

    def _picks(
        self, block: BlockLogits, wanted: Sequence[tuple[int, Sample]], columns: int
    ) -> dict[int, list[int]]:
        """Picks by sample index, of samples and the texts of the block that they have."""
        count = block.logits.shape[1]
        logits = block.logits[[index for index, _ in wanted], :, :columns].float().flatten(0, 1)
        places = [(sample.index, len(sample.tokens) + step) for _, sample in wanted for step in range(count)]
        picks = self._chooser(logits, [s for s, _ in places], [p for _, p in places], block.token_ids)
        ids = picks if block.token_ids is None else block.token_ids[picks]
        self._note(block, wanted, logits.unflatten(0, (-1, count)))
        rows: list[list[int]] = ids.view(-1, count).tolist()
        return {sample.index: row for (_, sample), row in zip(wanted, rows, strict=True)}

    def _chain(
        self, block: Chained, wanted: Sequence[tuple[int, Sample]], anchors: Tensor, columns: int
    ) -> dict[int, list[int]]:
        """The same, each place from the one before; nothing for samples whose logits are not finite."""
        rows = torch.tensor([index for index, _ in wanted], device=anchors.device)
        samples, tokens = [sample.index for _, sample in wanted], anchors[rows]
        chains, kept, finite = [], [], torch.ones_like(rows, dtype=torch.bool)
        for place in range(block.logits.shape[1]):
            shift = block.shift(place, rows, tokens)
            logits = block.logits[rows, place, :columns].float() + shift[:, :columns].float()
            finite &= torch.isfinite(logits).all(-1)
            kept += [logits] if self._keep else []
            positions = [len(sample.tokens) + place for _, sample in wanted]
            picks = self._chooser(logits.nan_to_num(), samples, positions, block.token_ids)
            tokens = picks if block.token_ids is None else block.token_ids[picks]
            chains.append(tokens)
        picked: list[list[int]] = torch.stack(chains, dim=1).tolist()
        sound = [index for index, good in enumerate(finite.tolist()) if good]
        if self._keep:
            self._note(block, [wanted[index] for index in sound], torch.stack(kept, dim=1)[sound])
        return {wanted[index][1].index: picked[index] for index in sound}

    def _note(self, block: BlockLogits, wanted: Sequence[tuple[int, Sample]], logits: Tensor) -> None:
        """Keep what the picks of samples were chosen of, where that is asked for."""
        if self._keep:
            self.logits = {sample.index: each for (_, sample), each in zip(wanted, logits, strict=True)}
            self.token_ids = block.token_ids


def asks_draft(rules: StopRules, anchor: int, length: int, limit: int) -> bool:
    """Whether a draft is asked after a text: not where a rule knows what follows, nor for a last token.

    Args:
        rules: see `stops`.
        anchor: the text's last token.
        length: its tokens.
        limit: the most that it may have.
    """
    return length + 1 < limit and rules.forced(anchor) is None


def draft_columns(block: BlockLogits, vocab_size: int) -> int:
    """How many columns of a draft's logits mean something: its vocabulary's; those beyond are padding.

    Args:
        block: from the draft.
        vocab_size: the target's V.

    Raises:
        ValueError: there are fewer.
    """
    columns = block.logits.shape[-1]
    wanted = vocab_size if block.token_ids is None else len(block.token_ids)
    if columns < wanted:
        raise ValueError(
            f"the draft's logits have {columns} columns; its vocabulary has {wanted} tokens, one column each"
        )
    return wanted


def warn_failed(error: Exception) -> None:
    """Warn that a draft raised an error, and that this round goes without it.

    Raises:
        torch.cuda.OutOfMemoryError: the error is that: the target would not go on either.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        raise error
    warnings.warn(f"the draft failed, and this round goes on without it: {error}", stacklevel=3)


@dataclass
class United:
    """What several offer after one sample's last token, as one tree.

    Attributes:
        tokens: as in `Proposed`.
        parents: likewise; equal tokens after one parent are one node.
        sources: of each node.
        drafted: whether the draft offers it.
        ends: the node after which the sample stands still, for `force` to end it there; or None.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    ends: int | None = None
    _nodes: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, token: int, parent: int, source: str) -> int:
        """A node for `token` after `parent`, made if it is new, and also offered by `source`; its index."""
        node = self._nodes.setdefault((token, parent), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.sources.append(source)
            self.drafted.append(source == DRAFT)
        elif source != self.sources[node]:
            self.sources[node] = min(self.sources[node], source, key=_rank)
            self.drafted[node] |= source == DRAFT
        return node

    def first_chain(self) -> list[int]:
        """The nodes from the anchor on, of several after one parent the first: what the device takes."""
        chain: list[int] = []
        for node, parent in enumerate(self.parents):
            if parent == (chain[-1] if chain else ANCHOR):
                chain.append(node)
        return chain


def unite(offers: Sequence[Proposed], anchor: int, rules: StopRules, *, room: int, most: int) -> United:
    """Unite what several offer, and put in what the rules of a text's end say.

    After a token that the rules continue only their own continuation stands, and nothing after a stop token.

    Args:
        offers: of every proposer, for one sample.
        anchor: the sample's last token.
        rules: see `stops`.
        room: how many tokens the sample may still emit; nodes beyond are left out.
        most: how many nodes there may be; offers beyond are left out, the first offers' last.
    """
    tree = United()
    depths: list[int] = []

    def add(token: int, parent: int, source: str) -> int | None:
        """The node, or None if there is no place for it."""
        depth = 1 if parent == ANCHOR else depths[parent] + 1
        if depth > room or len(tree.tokens) == most:
            return None
        node = tree.add(token, parent, source)
        if node == len(depths):
            depths.append(depth)
        return node

    for offer in offers if room > 1 else ():  # with room for one token the target's own fills it
        places: list[int | None] = []  # of the offer's tokens in the tree
        assert offer.parents is not None
        for token, parent in zip(offer.tokens, offer.parents, strict=True):
            after = ANCHOR if parent == ANCHOR else places[parent]
            if after is None:
                places.append(None)
                continue
            previous = anchor if after == ANCHOR else tree.tokens[after]
            forced = rules.forced(previous)
            if tree.ends == after or rules.reason(previous) or forced not in (None, token):
                places.append(None)
            elif rules.ends_sentence(previous, token):
                assert rules.period is not None
                tree.ends = add(rules.period, after, END_RULE)
                places.append(None)
            else:
                places.append(add(token, after, offer.source))
    node = ANCHOR
    while node < len(tree.tokens):
        forced = rules.forced(anchor if node == ANCHOR else tree.tokens[node])
        if forced is not None:
            add(forced, node, END_RULE)
        node += 1
    return tree


def _rank(source: str) -> float:
    """The order of `SOURCES`; other names stand right before the draft."""
    return SOURCES.index(source) if source in SOURCES else SOURCES.index(DRAFT) - 0.5
