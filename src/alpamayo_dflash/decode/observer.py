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
    """Watches a decode. Every method does nothing; override what is wanted."""

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """The prompt has been read, and each sample's first token chosen from its last row."""

    def on_round(self, trace: RoundTrace) -> None:
        """A verify pass and its walk are done."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Enclose a part of a round: one of `SPANS`."""
        return _NOTHING


class Observers(Observer):
    """Hands everything on to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.on_prefill(prompt_tokens, first_tokens)

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

    Attributes:
        first_tokens: each sample's first token.
        rounds: the rounds in order.
    """

    def __init__(self) -> None:
        self.first_tokens: tuple[int, ...] = ()
        self.rounds: list[RoundTrace] = []

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """Keep the first tokens and forget an earlier decode."""
        self.first_tokens = first_tokens
        self.rounds = []

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
