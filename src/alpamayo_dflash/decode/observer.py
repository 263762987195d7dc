"""Tracing, timing and progress are handed to the one loop as observers; there is no second loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

SPANS = ("draft", "verify", "sampling", "cache", "round")
"""Parts of a round; where a whole round is one graph, it is all `round`."""
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


@dataclass(frozen=True)
class PlaceScores:
    """What a model's logits say of the token at one place; `scores.Scorer` makes it.

    Logits are masked as the decode masks them, and untempered. With T the decode's temperature (1 where it is
    greedy), a token of logit l in the nucleus has the probability
    exp(l / T − tempered_log_sum_exp) / nucleus_mass in what the decode draws from, and is in the nucleus if
    l ≥ nucleus_logit. Where the decode is greedy nothing is cut: the mass is 1.

    Attributes:
        ids: the likeliest tokens, the target's ids, the likeliest first.
        logits: theirs.
        log_sum_exp: over all tokens, at temperature 1.
        tempered_log_sum_exp: over all tokens' logits divided by T.
        nucleus_mass: the tempered probability of all tokens in the nucleus.
        nucleus_logit: the least logit in the nucleus.
        chosen: the token that the target chose there; None where it chose none.
        chosen_logit: its logit here; None too where a reduced head lacks the token.
        chosen_rank: how many tokens have a higher logit; likewise.
    """

    ids: tuple[int, ...]
    logits: tuple[float, ...]
    log_sum_exp: float
    tempered_log_sum_exp: float
    nucleus_mass: float
    nucleus_logit: float
    chosen: int | None
    chosen_logit: float | None
    chosen_rank: int | None


@dataclass(frozen=True)
class SampleScores:
    """What target and draft thought of one sample's places in a round.

    Attributes:
        target: of the token after the anchor, then after each proposed token, in their order; then after
            tokens that were proposed to other samples alone and taken by this one.
        at: for each emitted token which of these it was chosen at.
        draft: of the first, second, … token after the anchor; none where the draft was not asked or failed.
            `chosen` is the emitted token there, if there is one.
    """

    target: tuple[PlaceScores, ...]
    at: tuple[int, ...]
    draft: tuple[PlaceScores, ...]


@dataclass(frozen=True)
class SampleTrace:
    """What one round did for one sample.

    Attributes:
        sample: its index.
        position: index of the anchor among the generated tokens.
        anchor: the last known token before the round.
        proposed: the tokens proposed after the anchor, parents before children.
        parents: for each of them the index of the one that it follows, −1 for the anchor.
        sources: who proposed each (`proposer.SOURCES`, or a proposer's own word).
        taken: indices of those that the target chose too, from the anchor on.
        drafted: how many of them the draft proposed, alone or with others.
        draft_accepted: how many of these were taken.
        emitted: the tokens that the round added, accepted ones first.
        origins: the source of each of these; "target" for the target's own.
        scores: what target and draft thought, for an observer that wants it; else None.
    """

    sample: int
    position: int
    anchor: int
    proposed: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[str, ...]
    taken: tuple[int, ...]
    drafted: int
    draft_accepted: int
    emitted: tuple[int, ...]
    origins: tuple[str, ...]
    scores: SampleScores | None = None

    @property
    def accepted(self) -> int:
        """How many proposed tokens the target chose too."""
        return len(self.taken)


@dataclass(frozen=True)
class RoundTrace:
    """One verify pass.

    Attributes:
        index: 0 for the first pass after the prompt's.
        rows: rows of the pass, without padding.
        samples: the samples that took part.
        draft_failures: texts for which the draft's logits were not finite, so that the target went alone.
    """

    index: int
    rows: int
    samples: tuple[SampleTrace, ...]
    draft_failures: int = 0


class Observer:
    """Watches a decode. Every method does nothing; override what is wanted.

    Attributes:
        wants_scores: whether `on_first_scores` is called and traces hold `SampleTrace.scores`. That takes
            time in every round, and changes no text.
    """

    wants_scores: bool = False

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """The prompt has been read, and each sample's first token chosen from its last row."""

    def on_first_scores(self, scores: tuple[PlaceScores, ...]) -> None:
        """What the target thought of each sample's first token, after `on_prefill`."""

    def on_round(self, trace: RoundTrace) -> None:
        """A verify pass and its walk are done."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Enclose a part of a round: one of `SPANS`."""
        return _NOTHING


class Observers(Observer):
    """Hands everything on to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.wants_scores = any(observer.wants_scores for observer in observers)

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.on_prefill(prompt_tokens, first_tokens)

    def on_first_scores(self, scores: tuple[PlaceScores, ...]) -> None:
        """See Observer."""
        for observer in self._observers:
            if observer.wants_scores:
                observer.on_first_scores(scores)

    def on_round(self, trace: RoundTrace) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.on_round(trace)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """See Observer."""
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.span(name))
            yield


class Recorder(Observer):
    """Keeps every round.

    Args:
        scores: with what target and draft thought; see `Observer.wants_scores`.

    Attributes:
        first_tokens: each sample's first token.
        first_scores: what the target thought of it, where scores are wanted.
        rounds: the rounds in order.
    """

    def __init__(self, *, scores: bool = False) -> None:
        self.wants_scores = scores
        self.first_tokens: tuple[int, ...] = ()
        self.first_scores: tuple[PlaceScores, ...] = ()
        self.rounds: list[RoundTrace] = []

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """Keep the first tokens and forget an earlier decode."""
        self.first_tokens, self.first_scores = first_tokens, ()
        self.rounds = []

    def on_first_scores(self, scores: tuple[PlaceScores, ...]) -> None:
        """Keep them."""
        self.first_scores = scores

    def on_round(self, trace: RoundTrace) -> None:
        """Keep the round."""
        self.rounds.append(trace)


class StageTimer(Observer):
    """Adds up the time of each kind of span.

    Args:
        now_ms: reads the clock; where a device works ahead of the host, `common.machine.Clock`'s.

    Attributes:
        totals_ms: milliseconds by span, over all decodes watched.
    """

    def __init__(self, now_ms: Callable[[], float] = lambda: time.perf_counter() * 1e3) -> None:
        self._now_ms = now_ms
        self.totals_ms = dict.fromkeys(SPANS, 0.0)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the span."""
        start = self._now_ms()
        yield
        self.totals_ms[name] += self._now_ms() - start


@dataclass(frozen=True)
class Span:
    """A part of a round: one of `SPANS`, and when it began and ended, in milliseconds of one clock."""

    name: str
    start_ms: float
    end_ms: float


class SpanRecorder(Observer):
    """Keeps when each span began and ended.

    Args:
        now_ms: reads the clock, as in `StageTimer`.

    Attributes:
        spans: in the order in which they ended, over all decodes watched.
    """

    def __init__(self, now_ms: Callable[[], float] = lambda: time.perf_counter() * 1e3) -> None:
        self._now_ms = now_ms
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Keep the span."""
        start = self._now_ms()
        yield
        self.spans.append(Span(name, start, self._now_ms()))
