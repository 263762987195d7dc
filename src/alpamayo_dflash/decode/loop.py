"""The autoregressive loop and the speculative loop, over one kind of round.

A round runs the target on a tree of rows and lets every sample walk it. Samples whose texts are the same so
far share their rows; they part where their noise makes them choose differently. The autoregressive loop's
tree has one row for each distinct text, its last token; the speculative loop hangs proposals behind it.

Shapes: S sample, R rows, V vocabulary, b block size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from alpamayo_dflash.decode.cache import ROOT
from alpamayo_dflash.decode.config import Request
from alpamayo_dflash.decode.noise import TokenNoise
from alpamayo_dflash.decode.observer import Observer, RoundTrace, SampleTrace
from alpamayo_dflash.decode.proposer import ProposalLike, Proposer
from alpamayo_dflash.decode.sampling import choose, mask_bias
from alpamayo_dflash.decode.stops import StopReason, StopRules
from alpamayo_dflash.decode.tree import Tree, Walk, walk
from alpamayo_dflash.decode.verify import Prefilled, Verifier


@dataclass
class Sample:
    """One text in the making.

    Attributes:
        index: the sample's number, which its noise depends on.
        tokens: what has been emitted.
        path: slots of tokens[:len(path)], those whose keys and values are in the cache. While the sample
            is unfinished that is all but the last token, its anchor (all, where `force` ends it next).
        stop: why it ended, or None.
        passes: verify passes that it took part in.
        drafted: tokens that the draft proposed to it and the target verified.
        accepted: how many of those the target chose too.
    """

    index: int
    tokens: list[int]
    path: list[int] = field(default_factory=list)
    stop: StopReason | None = None
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def anchor(self) -> int:
        """The last token."""
        return self.tokens[-1]


@dataclass(frozen=True)
class Proposal:
    """What is proposed behind a sample's anchor.

    Attributes:
        tokens: the chain.
        drafted: how many of its first tokens are the draft's own.
        ends: whether the sample stands still behind it, for `force` to end the text there.
    """

    tokens: Sequence[int] = ()
    drafted: int = 0
    ends: bool = False


NOTHING = Proposal()

Texts = Sequence[Sequence[Sample]]
"""Unfinished samples, those with equal tokens together; members of one text have one path."""


class Decode:
    """The decoding of one prompt: its samples, and the steps that both loops are made of.

    Args:
        verifier: has read the prompt; its tail is empty.
        prefilled: the prompt.
        request: what is asked.
        rules: where texts end.
        observer: is told of the first tokens and of every round.
    """

    def __init__(
        self,
        verifier: Verifier,
        prefilled: Prefilled,
        request: Request,
        *,
        rules: StopRules,
        observer: Observer,
    ) -> None:
        target, num_samples = verifier.target, request.num_samples
        self.verifier = verifier
        self.sampling = request.sampling
        self.rules = rules
        self.limit = request.max_new_tokens
        self.observer = observer
        self.rounds = 0
        self.draft_failures = 0
        self.bias_V = mask_bias(target.traj_ids, target.vocab_size).to(target.device)
        self.noise = TokenNoise(
            request.seed, prefilled.prompt.key, num_samples, target.vocab_size, target.device
        )
        everyone = list(range(num_samples))
        with observer.span("sampling"):
            first = self.choose(prefilled.logits_V.expand(num_samples, -1), everyone, [0] * num_samples)
        self.samples = [Sample(index, [token]) for index, token in enumerate(first)]
        for sample in self.samples:
            self._stop_if_done(sample)
        observer.on_prefill(len(prefilled.prompt.input_ids), tuple(first))

    def choose(self, logits_RV: torch.Tensor, samples: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Choose for each row the token of samples[r] at positions[r]. This is the round's one read.

        Raises:
            ValueError: a row's logits are not finite.
        """
        noise = None if self.sampling.greedy else self.noise.rows(samples, positions)
        finite = torch.isfinite(logits_RV).all(-1).long()
        read: list[list[int]]
        read = torch.stack((choose(logits_RV, self.bias_V, self.sampling, noise), finite)).tolist()
        chosen, sound = read
        if not all(sound):
            row = sound.index(0)
            place = f"token {positions[row] - 1} of sample {samples[row]}" if positions[row] else "the prompt"
            raise self.verifier.not_finite(place)
        return chosen

    def texts(self, samples: Sequence[Sample]) -> Texts:
        """The distinct texts among the unfinished of these samples."""
        groups: dict[tuple[int, ...], list[Sample]] = {}
        for sample in samples:
            if sample.stop is None:
                groups.setdefault(tuple(sample.tokens), []).append(sample)
        for members in groups.values():
            for sample in members[1:]:
                sample.path = list(members[0].path)
        return list(groups.values())

    def room(self, sample: Sample) -> int:
        """How many tokens the sample may still emit."""
        return self.limit - len(sample.tokens)

    def round(self, texts: Texts, proposals: Mapping[int, Proposal], draft_failures: int = 0) -> None:
        """Verify the anchors and what is proposed behind them, and let the samples walk.

        Args:
            texts: from `texts`.
            proposals: by sample index; a sample without one has its anchor's row alone.
            draft_failures: texts that the draft failed on.
        """
        span = self.observer.span
        with span("cache"):
            tree, chains = self._grow(texts, proposals)
        with span("verify"):
            logits_RV = self.verifier.rows(tree.slots)
        with span("sampling"):
            row = {slot: index for index, slot in enumerate(tree.slots)}
            positions = self.verifier.cache.tail.positions

            def choose_at(pairs: Sequence[tuple[int, int]]) -> list[int]:
                rows = [row[slot] for _, slot in pairs]
                logits = logits_RV if rows == list(range(len(row))) else logits_RV[rows]
                return self.choose(logits, [s for s, _ in pairs], [positions[slot] + 1 for _, slot in pairs])

            room = {index: self.room(self.samples[index]) for index in chains}
            ends = {index for index, proposal in proposals.items() if proposal.ends}
            walks = walk(
                tree,
                chains,
                choose_at,
                room,
                lambda token: self.rules.reason(token) is not None,
                ends=ends,
            )
        with span("cache"):
            traces = [
                self._advance(self.samples[index], walked, chains[index], proposals.get(index, NOTHING))
                for index, walked in walks.items()
            ]
            self._free()
        self.observer.on_round(RoundTrace(self.rounds, len(tree.slots), tuple(traces), draft_failures))
        self.rounds += 1
        self.draft_failures += draft_failures

    def force_sentence_ends(self, samples: Sequence[Sample]) -> None:
        """Emit the end marks that `force` writes without asking (see `stops`)."""
        for sample in samples:
            end = [] if sample.stop else self.rules.forced_end(sample.anchor)[: self.room(sample)]
            if end:
                sample.tokens += end
                sample.stop = StopReason.FORCED

    def close(self, samples: Sequence[Sample]) -> None:
        """Bring the cache of finished samples to what the action expert reads.

        A text that ends in `<|traj_future_start|>` is cached whole: if that token was the target's own, one
        pass without logits writes it. Any other is cached without its last token (specification 7).
        """
        tree = Tree(self.verifier.cache.tail)
        for sample in samples:
            whole = sample.anchor == self.rules.traj_future_start
            cached = len(sample.tokens) if whole else len(sample.tokens) - 1
            missing = sample.tokens[len(sample.path) : cached]
            parent = sample.path[-1] if sample.path else ROOT
            sample.path = sample.path[:cached] + tree.add_chain(missing, parent)
        if tree.slots:
            with self.observer.span("verify"):
                self.verifier.rows(tree.slots, logits=False)
        self._free()

    def _grow(self, texts: Texts, proposals: Mapping[int, Proposal]) -> tuple[Tree, dict[int, list[int]]]:
        """Make the pass's rows: by sample index, the slots of its anchor and of its proposal."""
        tree = Tree(self.verifier.cache.tail)
        chains: dict[int, list[int]] = {}
        for members in texts:
            path = members[0].path
            anchor = tree.add(members[0].anchor, path[-1] if path else ROOT)
            for sample in members:
                proposed = proposals.get(sample.index, NOTHING).tokens
                chains[sample.index] = [anchor, *tree.add_chain(proposed, anchor)]
        return tree, chains

    def _advance(self, sample: Sample, walked: Walk, chain: Sequence[int], proposal: Proposal) -> SampleTrace:
        """Take a walk over into the sample."""
        accepted = _common(walked.path, chain) - 1
        trace = SampleTrace(
            sample.index,
            len(sample.tokens) - 1,
            sample.anchor,
            tuple(proposal.tokens),
            accepted,
            tuple(walked.tokens),
            proposal.drafted,
        )
        sample.path += walked.path
        sample.tokens += walked.tokens
        sample.passes += 1
        sample.drafted += proposal.drafted
        sample.accepted += min(accepted, proposal.drafted)
        self._stop_if_done(sample)
        return trace

    def _stop_if_done(self, sample: Sample) -> None:
        sample.stop = self.rules.reason(sample.anchor)
        if sample.stop is None and self.room(sample) == 0:
            sample.stop = StopReason.LIMIT

    def _free(self) -> None:
        self.verifier.cache.tail.keep(slot for sample in self.samples for slot in sample.path)


DRAFT_ERRORS = (RuntimeError, ArithmeticError, LookupError)
"""What a draft may raise without ending the decode; `Proposer.propose` says so."""


def failed(error: Exception) -> None:
    """Say that a draft raised an error, and that this round goes without it.

    Raises:
        torch.cuda.OutOfMemoryError: the error is that: the target would not go on either.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        raise error
    warnings.warn(f"the draft failed, and this round goes on without it: {error}", stacklevel=3)


class Drafter:
    """Asks a draft for blocks and picks the proposed tokens out of its logits.

    The picks are made as the target's are: same temperature, nucleus and masked ids, and the noise of the
    same sample, position and target token id, so that a draft that agrees with the target proposes what the
    target will choose.

    Args:
        proposer: the draft, bound to the target.
    """

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None  # a reduced head's ids, and their bias

    def propose(self, decode: Decode, texts: Texts) -> tuple[dict[int, Proposal], int]:
        """Propose for every sample of these texts.

        Returns:
            Proposals by sample index, and the number of texts for which the draft failed or its logits were
            not finite: the target goes on without a proposal there.
        """
        rules = decode.rules
        proposals: dict[int, Proposal] = {}
        asked: list[Sequence[Sample]] = []
        for members in texts:
            known = rules.shape(members[0].anchor, ())
            if not known and decode.room(members[0]) > 1:
                asked.append(members)
            for sample in members:
                proposals[sample.index] = Proposal(known[: decode.room(sample)])
        if not asked:
            return proposals, 0
        cache = decode.verifier.cache
        context, lengths = cache.context([members[0].path for members in asked])
        anchors = torch.tensor([members[0].anchor for members in asked], device=context.device)
        try:
            block = self.proposer.propose(context, lengths, anchors)
        except DRAFT_ERRORS as error:
            failed(error)
            return proposals, len(asked)
        finite = torch.isfinite(block.logits).flatten(1).all(-1).tolist()
        sound = [index for index, good in enumerate(finite) if good]
        for sample, picks in self._pick(decode, block, [(index, s) for index in sound for s in asked[index]]):
            tokens = rules.shape(sample.anchor, picks)[: decode.room(sample)]
            drafted = _common(tokens, picks)
            proposals[sample.index] = Proposal(tokens, drafted, rules.ends_sentence(tokens, drafted))
        return proposals, len(asked) - len(sound)

    def _pick(
        self, decode: Decode, block: ProposalLike, wanted: Sequence[tuple[int, Sample]]
    ) -> list[tuple[Sample, list[int]]]:
        """Choose b − 1 tokens for each sample from its text's block of logits."""
        if not wanted:
            return []
        logits = block.logits.float()
        steps = logits.shape[1]
        logits = logits[[index for index, _ in wanted]].flatten(0, 1)
        noise = None
        if not decode.sampling.greedy:
            places = [(s.index, len(s.tokens) + step) for _, s in wanted for step in range(steps)]
            noise = decode.noise.rows([s for s, _ in places], [p for _, p in places])
        ids = block.token_ids
        bias = decode.bias_V if ids is None else self._reduced_bias(decode, ids)
        if logits.shape[-1] != len(bias):
            raise ValueError(
                f"the draft's logits have {logits.shape[-1]} columns, its vocabulary {len(bias)} tokens"
            )
        if noise is not None and ids is not None:
            noise = noise[:, ids]
        picked = choose(logits, bias, decode.sampling, noise)
        picked = picked if ids is None else ids[picked]
        rows: list[list[int]] = picked.view(-1, steps).tolist()
        return [(sample, row) for (_, sample), row in zip(wanted, rows, strict=True)]

    def _reduced_bias(self, decode: Decode, token_ids: torch.Tensor) -> torch.Tensor:
        if self._bias is None or self._bias[0] is not token_ids:
            masked = decode.verifier.target.traj_ids
            self._bias = (token_ids, mask_bias(masked, len(token_ids), token_ids))
        return self._bias[1]


def autoregressive(decode: Decode, samples: Sequence[Sample]) -> None:
    """Write the samples to their ends, one token a pass."""
    while texts := decode.texts(samples):
        decode.round(texts, {})
    decode.close(samples)


def speculative(decode: Decode, samples: Sequence[Sample], drafter: Drafter) -> None:
    """Write the samples to their ends, a proposal a pass; in `hint` and `off` the same tokens as above."""
    decode.force_sentence_ends(samples)
    while texts := decode.texts(samples):
        with decode.observer.span("draft"):
            proposals, failures = drafter.propose(decode, texts)
        decode.round(texts, proposals, failures)
        decode.force_sentence_ends(samples)
    decode.close(samples)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))
