"""The loop: draft, verify, accept, stop. There is one, for every proposer and both kinds of round.

A round is one pass of the target and what surrounds it: `round_host` walks trees of rows in Python,
`round_device` does the same over tensors that never move. Without a proposer a round adds one token to each
sample, and the loop is autoregressive decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from alpamayo_dflash.decode.config import Request
from alpamayo_dflash.decode.observer import Observer, PlaceScores, RoundTrace, SampleTrace
from alpamayo_dflash.decode.scores import Scorer, score_all
from alpamayo_dflash.decode.stops import StopReason, StopRules
from alpamayo_dflash.decode.verify import Prefilled, Verifier


def decode(
    round_: Round,
    verifier: Verifier,
    prefilled: Prefilled,
    request: Request,
    *,
    rules: StopRules,
    observer: Observer,
    close: bool = True,
) -> Decoded:
    """Write the samples of one prompt to their ends.

    Args:
        round_: adds tokens to samples.
        verifier: has read the prompt.
        prefilled: the prompt.
        request: what is asked.
        rules: where samples end.
        observer: is told of the first tokens and of every round.
        close: make the cache what the action expert reads, by a pass for last tokens if need be.

    Raises:
        ValueError: the target's logits are not finite, or another prompt has been read since.
    """
    samples = [Sample(index) for index in range(request.num_samples)]
    decoded = Decoded(samples)
    limit = request.max_new_tokens
    # All samples together, or at one row width one after another: there, sharing rows would order the
    # cache's slots differently with and without a draft, and so the roundings.
    together = [samples] if verifier.row_width is None else [[sample] for sample in samples]
    try:
        round_.open(prefilled, request, samples, observer)
        for group in together:
            for sample, token in zip(group, round_.first(group), strict=True):
                _emit(sample, [token], rules, limit)
        observer.on_prefill(len(prefilled.prompt.input_ids), tuple(sample.anchor for sample in samples))
        if observer.wants_scores:
            observer.on_first_scores(_first_scores(verifier, prefilled, request, samples))
        for group in together:
            round_.begin(group)
            _force_ends(round_, group, rules, limit)
            while any(sample.stop is None for sample in group):
                _advance(decoded, round_(), rules, limit, observer)
                _force_ends(round_, group, rules, limit)
            if close:
                round_.close(group, [_cached(sample, rules) for sample in group])
    except NotFiniteError as error:
        raise verifier.not_finite(str(error)) from None
    return decoded


@dataclass
class Sample:
    """One Chain-of-Causation in the making.

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
    tokens: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    stop: StopReason | None = None
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def anchor(self) -> int:
        """The last token."""
        return self.tokens[-1]


@dataclass
class Decoded:
    """Samples, finished once `decode` returns.

    Attributes:
        samples: in order.
        rounds: passes that emitted something.
        draft_failures: texts and rounds that the draft failed on.
    """

    samples: list[Sample]
    rounds: int = 0
    draft_failures: int = 0


@dataclass(frozen=True)
class Step:
    """What a pass did for one sample: its trace, and the slots of the rows that hold its text from now on."""

    trace: SampleTrace
    slots: Sequence[int]


@dataclass(frozen=True)
class Pass:
    """What a round did.

    Attributes:
        steps: one for each unfinished sample.
        rows: of the pass, without padding.
        draft_failures: texts that the draft failed on.
    """

    steps: Sequence[Step]
    rows: int
    draft_failures: int = 0


class Round(Protocol):
    """One pass for some samples: propose after each one's last token, verify, accept."""

    @property
    def proposes(self) -> bool:
        """Whether anything is ever proposed."""
        ...

    def open(
        self, prefilled: Prefilled, request: Request, samples: Sequence[Sample], observer: Observer, /
    ) -> None:
        """Take over a prompt and all the samples that will be asked of it."""
        ...

    def first(self, samples: Sequence[Sample], /) -> list[int]:
        """Each sample's first token, which the prompt's own logits choose.

        Raises:
            NotFiniteError: those logits are not finite.
        """
        ...

    def begin(self, samples: Sequence[Sample], /) -> None:
        """The samples that the next passes are for, each with its first token."""
        ...

    def __call__(self) -> Pass:
        """A pass.

        Raises:
            NotFiniteError: the target's logits are not finite.
        """
        ...

    def close(self, samples: Sequence[Sample], cached: Sequence[int], /) -> None:
        """Make the cache of finished samples what the action expert reads.

        Args:
            samples: those that were begun.
            cached: of how many tokens each one's keys and values are wanted; a pass without logits writes
                those that no pass has written, and `path` becomes their slots.
        """
        ...


class NotFiniteError(ArithmeticError):
    """The target's logits are not finite; the message says after which token."""

    def __init__(self, sample: int, position: int) -> None:
        where = f"token {position - 1} of sample {sample}" if position else "the prompt"
        super().__init__(where)


def same_texts(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The unfinished samples, those with equal tokens together; members of one text share one path."""
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        if sample.stop is None:
            groups.setdefault(tuple(sample.tokens), []).append(sample)
    for members in groups.values():
        for sample in members[1:]:
            sample.path = list(members[0].path)
    return list(groups.values())


def _first_scores(
    verifier: Verifier, prefilled: Prefilled, request: Request, samples: Sequence[Sample]
) -> tuple[PlaceScores, ...]:
    """What the target thought of first tokens, in the prompt's own logits."""
    target = verifier.target
    scorer = Scorer((target.vocab_size, target.traj_ids), request.sampling, device=target.device)
    logits_SV = prefilled.logits_V.expand(len(samples), -1)
    return tuple(score_all(scorer, logits_SV, [sample.anchor for sample in samples]))


def _advance(decoded: Decoded, passed: Pass, rules: StopRules, limit: int, observer: Observer) -> None:
    """Take a pass over into its samples, and report it."""
    for step in passed.steps:
        sample, trace = decoded.samples[step.trace.sample], step.trace
        sample.path += step.slots
        sample.passes += 1
        sample.drafted += trace.drafted
        sample.accepted += trace.draft_accepted
        _emit(sample, trace.emitted, rules, limit)
    traces = tuple(step.trace for step in passed.steps)
    observer.on_round(RoundTrace(decoded.rounds, passed.rows, traces, passed.draft_failures))
    decoded.rounds += 1
    decoded.draft_failures += passed.draft_failures


def _emit(sample: Sample, tokens: Sequence[int], rules: StopRules, limit: int) -> None:
    """Add tokens; a stop token or the limit ends the sample."""
    sample.tokens += tokens
    sample.stop = rules.reason(sample.anchor)
    if sample.stop is None and len(sample.tokens) == limit:
        sample.stop = StopReason.LIMIT


def _force_ends(round_: Round, samples: Sequence[Sample], rules: StopRules, limit: int) -> None:
    """Emit the end marks that `force` writes without asking (see `stops`)."""
    for sample in samples if round_.proposes else ():
        end = [] if sample.stop else rules.forced_end(sample.anchor)[: limit - len(sample.tokens)]
        if end:
            sample.tokens += end
            sample.stop = StopReason.FORCED


def _cached(sample: Sample, rules: StopRules) -> int:
    """How many of a finished sample's tokens the action expert reads.

    A last token that is not `<|traj_future_start|>` it does not (specification 7).
    """
    return len(sample.tokens) - (sample.anchor != rules.traj_future_start)
