"""The round on the device: draft, proposal, verify pass, choice and walk over tensors that never move.

On a GPU a round is captured once as a CUDA graph and replayed; the host reads one small report a round. What
it does is what `round_host`, its plain form, does, but for two things that show only in the counts: each
sample has its own rows (they are nearly free), so samples with equal texts neither share rows nor profit from
each other's proposals; and what is proposed is a chain: at most b − 1 tokens, and the end marks that follow
by rule, for which each sample has rows beyond the block. What runs on the host alone: `sentence_end=force`,
and drafts that see every state of a prompt and have no fused form.

Shapes: S sample, R rows, b block, W rows of one sample, X context, V vocabulary, E slots of the tail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpamayo_dflash.common.graphs import CapturedCall, Recent
from alpamayo_dflash.common.machine import uploaded
from alpamayo_dflash.common.options import MOST_BLOCK
from alpamayo_dflash.decode import steps
from alpamayo_dflash.decode.cache import Cache, per_sample_slots
from alpamayo_dflash.decode.config import Request, Sampling
from alpamayo_dflash.decode.loop import NotFiniteError, Pass, Sample, Step
from alpamayo_dflash.decode.noise import stream_keys
from alpamayo_dflash.decode.observer import Observer, SampleScores, SampleTrace
from alpamayo_dflash.decode.picks import DraftPicks
from alpamayo_dflash.decode.proposer import (
    DRAFT,
    DRAFT_ERRORS,
    END_RULE,
    TARGET,
    BlockDraft,
    BlockLogits,
    Proposers,
    StaticBlock,
    StaticDraft,
    asks_draft,
    unite,
    warn_failed,
)
from alpamayo_dflash.decode.sampling import Chooser
from alpamayo_dflash.decode.scores import RoundScores, Scored
from alpamayo_dflash.decode.stops import StopRules
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.target.expert_fused import DeviceTexts

_FAILED, _UNSETTLED, _BROKEN, _ANCHOR = (
    steps.FIELDS.index(name) for name in ("failed", "unsettled", "broken", "anchor")
)
_KEPT = 8
"""Rounds that are kept for their shapes to come again; each holds its buffers and its graph's memory."""


@dataclass(frozen=True)
class RoundShape:
    """What a round is made for.

    Attributes:
        samples: S.
        sample_rows: W.
        rows: R, at least S·W.
        pass_rows: how many of them run together.
        per_sample: slots of one sample.
        slots: slots of the tail.
        sampling: temperature and top_p.
        scored: whether it has a second report, of what target and draft thought (`scores.RoundScores`).
    """

    samples: int
    sample_rows: int
    rows: int
    pass_rows: int
    per_sample: int
    slots: int
    sampling: Sampling
    scored: bool = False


class DeviceRound:
    """One round of one shape: its buffers, and on a GPU its graphs. See `loop.Round`.

    Args:
        verifier: holds the target and the cache.
        rules: where texts end; not `force`.
        proposers: see Proposers.
        shape: see RoundShape.
        graph: capture it.
    """

    def __init__(
        self, verifier: Verifier, rules: StopRules, proposers: Proposers, shape: RoundShape, *, graph: bool
    ) -> None:
        target, device = verifier.target, verifier.target.device
        self.shape, self.block = shape, proposers.block
        self._verifier, self._rules, self._marks = verifier, rules, steps.Marks.of(rules)
        self._proposers = proposers
        self.state = steps.State(
            samples=shape.samples,
            block=self.block,
            sample_rows=shape.sample_rows,
            width=shape.rows,
            per_sample=shape.per_sample,
            slots=shape.slots,
            device=device,
        )
        self._samples: Sequence[Sample] = ()
        self._started = False  # whether `first` has begun the state already
        self._first_slots = torch.arange(shape.samples, device=device) * shape.per_sample
        # `State.written` of every sample asked for.
        self._written = torch.zeros(3, shape.slots // shape.per_sample, dtype=torch.int64, device=device)
        self._first_position = torch.zeros(1, dtype=torch.int64, device=device)
        self._sources: list[list[str]] = [[] for _ in range(shape.samples)]  # of what the host has listed
        self._keys = torch.zeros(shape.rows, 2, dtype=torch.int64, device=device)
        self._choose = self._chooser(shape.rows, target.vocab_size, None)
        self._choose_first = self._chooser(shape.samples, target.vocab_size, None)
        self._draft: DraftPicks | None = None
        if proposers.draft is not None:
            sizes = {"samples": shape.samples, "per_sample": shape.per_sample, "slots": shape.slots}
            self._draft = DraftPicks(
                static_block(proposers.draft, verifier.cache, **sizes),
                samples=shape.samples,
                places=self.block - 1,
                target_ids=(target.vocab_size, target.traj_ids),
                sampling=shape.sampling,
                device=device,
                keep_logits=shape.scored,
            )
        self._scores: RoundScores | None = None
        if shape.scored:
            self._scores = RoundScores(
                (target.vocab_size, target.traj_ids),
                shape.sampling,
                samples=shape.samples,
                rows=shape.sample_rows,
                places=self.block - 1,
                device=device,
            )
        self._logits: Tensor | None = None
        self._finite: Tensor | None = None
        pinned = device.type == "cuda"
        self._report = torch.empty_like(self.state.report, device="cpu", pin_memory=pinned)
        self._chains = torch.zeros_like(self.state.listed[0], device="cpu", pin_memory=pinned)
        self._chain_lengths = torch.zeros_like(self.state.listed[1], device="cpu", pin_memory=pinned)
        self._capturing = False
        self._propose, self._accept = steps.propose, steps.accept
        if device.type == "cuda":
            from alpamayo_dflash.decode import steps_triton

            self._propose, self._accept = steps_triton.propose, steps_triton.accept
        self._graph = self._capture(self._run) if graph else None
        self._closing = self._capture(self._write_last) if graph else None

    @property
    def proposes(self) -> bool:
        """See Round."""
        return self.block > 1

    def open(
        self, prefilled: Prefilled, request: Request, samples: Sequence[Sample], observer: Observer
    ) -> None:
        """See Round."""
        assert observer.wants_scores == self.shape.scored
        self._verifier.begin(prefilled, self.shape.slots)
        self._logits_V, self._limit, self._span = prefilled.logits_V, request.max_new_tokens, observer.span
        torch.add(self._verifier.cache.length_1, prefilled.prompt.rope_delta, out=self._first_position)
        device = self.state.tokens.device
        self._streams = stream_keys(request.seed, prefilled.prompt.key, request.streams, device)
        for proposer in self._proposers.listed:
            proposer.begin(prefilled, samples)

    def first(self, samples: Sequence[Sample]) -> list[int]:
        """See Round. What starts from the tokens of all samples is enqueued before the host reads them."""
        keys_S2 = self._keys_of(samples)
        logits_SV = self._logits_V.expand(len(samples), -1)
        start = torch.zeros(len(samples), dtype=torch.int64, device=keys_S2.device)
        self._started = len(samples) == len(self._streams)
        with self._span("sampling"):
            choice = self._choose_first(logits_SV, keys_S2, start)
            report = torch.stack((choice.columns, choice.finite, choice.settled))
            if self._started:
                self._start(samples, choice.columns)
        tokens, finite, settled = report.tolist()
        if not all(finite):
            raise NotFiniteError(samples[0].index, 0)
        if not all(settled):
            columns = self._choose_first.exactly(logits_SV, keys_S2, start)
            if self._started:
                self._start(samples, columns)
            tokens = columns.tolist()
        return [int(token) for token in tokens]

    def begin(self, samples: Sequence[Sample]) -> None:
        """See Round. Sample i's slots start at i · per_sample."""
        self._samples = samples
        if not self._started:
            anchors = torch.tensor([sample.anchor for sample in samples], device="cpu")
            self._start(samples, uploaded(anchors, self._keys.device))

    def _start(self, samples: Sequence[Sample], first_S: Tensor) -> None:
        """Begin the state and the draft for samples with these first tokens."""
        keys_S2, index = self._keys_of(samples), samples[0].index
        count = self.shape.sample_rows
        self._keys[: len(samples) * count] = keys_S2.repeat_interleave(count, 0)
        bases = self._first_slots + index * self.shape.per_sample
        self.state.begin(first_S, bases, self._limit, self._marks)
        if self._draft is not None:
            self._draft.begin(keys_S2, self._verifier.cache.prompt_length)

    @torch.inference_mode()
    def __call__(self) -> Pass:
        """See Round."""
        with self._span("round"):
            if self._proposers.listed:
                self._list()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run()
        rows = self._read()
        if any(row[_UNSETTLED] for row in rows):
            rows = self._settle(rows)
        live = [(i, row) for i, row in enumerate(rows) if self._samples[i].stop is None]
        for i, row in live:
            if row[_BROKEN]:
                raise NotFiniteError(self._samples[i].index, row[_ANCHOR] + 1)
        failures = sum(row[_FAILED] for row in rows)
        passed = [self._step(i, row) for i, row in live]
        if self._scores is not None:
            scored, failed = self._scores.read(), [bool(row[_FAILED]) for row in rows]
            passed = [
                self._with_scores(step, scored[i], failed=failed[i])
                for (i, _), step in zip(live, passed, strict=True)
            ]
        return Pass(passed, len(rows) * self.shape.sample_rows, failures)

    @torch.inference_mode()
    def close(self, samples: Sequence[Sample], cached: Sequence[int]) -> None:
        """See Round. At most the last token of a sample is missing, and its anchor's row writes that."""
        with self._span("round"):
            if any(len(sample.path) < count for sample, count in zip(samples, cached, strict=True)):
                if self._closing is not None:
                    self._closing.replay()
                else:
                    self._write_last()
            self._written[:, samples[0].index : samples[-1].index + 1] = self.state.written
        for sample, count in zip(samples, cached, strict=True):
            start = sample.index * self.shape.per_sample
            assert count - len(sample.path) <= 1
            sample.path = list(range(start, start + count))

    def texts(self) -> DeviceTexts:
        """What the samples' way-points see after the prompt, by the device's own record."""
        first_slots, counts, lengths = self._written
        return DeviceTexts(first_slots, counts, self._first_position + lengths)

    def _chooser(self, rows: int, vocab: int, ids: Tensor | None) -> Chooser:
        target = self._verifier.target
        return Chooser(
            rows,
            vocab,
            masked=target.traj_ids,
            token_ids=ids,
            sampling=self.shape.sampling,
            device=target.device,
        )

    def _keys_of(self, samples: Sequence[Sample]) -> Tensor:
        return self._streams[samples[0].index : samples[-1].index + 1]

    def _list(self) -> None:
        """Write what the host's proposers offer to the round's tensors."""
        open_ = [(i, sample) for i, sample in enumerate(self._samples) if sample.stop is None]
        lists = [proposer.propose([sample for _, sample in open_]) for proposer in self._proposers.listed]
        self._chain_lengths.zero_()
        for (i, sample), *offers in zip(open_, *lists, strict=True):
            room = self._limit - len(sample.tokens)
            tree = unite(offers, sample.anchor, self._rules, room=room, most=MOST_BLOCK)
            chain = tree.first_chain()[: self.block - 1]
            self._sources[i] = [tree.sources[node] for node in chain]
            self._chain_lengths[i] = len(chain)
            self._chains[i, : len(chain)] = torch.tensor([tree.tokens[node] for node in chain], device="cpu")
        for kept, written in zip(self.state.listed, (self._chains, self._chain_lengths), strict=True):
            kept.copy_(written, non_blocking=True)

    def _read(self) -> list[list[int]]:
        if self.state.tokens.is_cuda:
            torch.cuda.current_stream().synchronize()
        rows: list[list[int]] = self._report.tolist()
        return rows

    def _settle(self, rows: list[list[int]]) -> list[list[int]]:
        """Choose again with a sort, for samples with a choice that no candidate settled."""
        assert self._logits is not None and self._finite is not None
        state = self.state
        columns = self._choose.exactly(self._logits, self._keys, state.next_positions)
        self._accept(state, self._marks, columns, torch.ones_like(columns, dtype=torch.bool), self._finite)
        self._report.copy_(state.report)
        self._score(columns, torch.ones_like(columns, dtype=torch.bool))
        again = self._read()
        return [new if old[_UNSETTLED] else old for old, new in zip(rows, again, strict=True)]

    def _run(self) -> None:
        """The round's work: launched on a GPU, and nothing read back."""
        state = self.state
        picks = self._picks(self._draft) if self._draft is not None else None
        self._propose(state, self._marks, picks, self._offered())
        self._logits = logits = self._verify()
        assert logits is not None
        choice = self._choose(logits, self._keys, state.next_positions)
        self._finite = choice.finite
        self._accept(state, self._marks, choice.columns, choice.settled, choice.finite)
        self._report.copy_(state.report, non_blocking=True)
        self._score(choice.columns, choice.settled)

    def _score(self, columns: Tensor, settled: Tensor) -> None:
        """Make the second report, where there is one."""
        if self._scores is not None:
            assert self._logits is not None
            self._scores(self._logits, columns, settled, None if self._draft is None else self._draft.logits)

    def _offered(self) -> steps.Chains:
        """What stands before the draft's picks: each sample's first chain that is not empty."""
        found = [proposer(self.state) for proposer in self._proposers.captured]
        if self._proposers.listed or not found:
            found.insert(0, self.state.listed)
        chains, lengths = found[0]
        for more, counts in found[1:]:
            free = lengths == 0
            chains, lengths = torch.where(free[:, None], more, chains), torch.where(free, counts, lengths)
        return chains, lengths

    def _picks(self, draft: DraftPicks) -> steps.Picks:
        """The draft's tokens; none that count where it fails."""
        state = self.state
        try:
            return draft(state)
        except DRAFT_ERRORS as error:
            if self._capturing:
                raise
            warn_failed(error)
            count = state.samples * (self.block - 1)
            nothing = torch.zeros(count, dtype=torch.int64, device=state.tokens.device)
            return steps.Picks(nothing, nothing.bool(), None)

    def _verify(self, *, logits: bool = True) -> Tensor | None:
        """The target's logits after every row, or None."""
        state, step = self.state, self.shape.pass_rows
        parts = []
        for start in range(0, self.shape.rows, step):
            at = slice(start, start + step)
            rows = (state.row_tokens[at], state.row_positions[at], state.row_slots[at], state.seen[at])
            out = self._verifier.run(*rows, logits=logits)
            parts += [] if out is None else [out]
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    def _write_last(self) -> None:
        """A pass without logits, whose first row of each finished sample is its last token."""
        self._propose(self.state, self._marks, None, self.state.listed)
        self._verify(logits=False)

    def _step(self, index: int, row: Sequence[int]) -> Step:
        """A sample's row of the report."""
        sample = self._samples[index]
        values = dict(zip(steps.FIELDS, row, strict=False))
        rest = row[len(steps.FIELDS) :]
        accepted, drafted, offered = values["accepted"], values["drafted"], values["offered"]
        emitted = tuple(rest[: values["emitted"]])
        proposed = tuple(rest[self.shape.sample_rows :][: values["proposed"]])
        listed = (
            self._sources[index] or [proposer.source for proposer in self._proposers.captured[:1]] * offered
        )
        sources = [*listed[:offered], *[DRAFT] * (drafted - offered)]
        sources += [END_RULE] * (len(proposed) - len(sources))
        at = sample.index * self.shape.per_sample + values["anchor"]
        trace = SampleTrace(
            sample=sample.index,
            position=values["anchor"],
            anchor=sample.anchor,
            proposed=proposed,
            parents=tuple(range(-1, len(proposed) - 1)),
            sources=tuple(sources),
            taken=tuple(range(accepted)),
            drafted=drafted,
            draft_accepted=min(accepted, drafted),
            emitted=emitted,
            origins=(*sources[:accepted], *[TARGET] * (len(emitted) - accepted)),
        )
        return Step(trace, range(at, at + accepted + 1))

    def _with_scores(self, step: Step, scored: Scored, *, failed: bool) -> Step:
        """A sample's step with what the second report says of its places."""
        (target, draft), trace = scored, step.trace
        emitted = len(trace.emitted)
        asked = asks_draft(self._rules, trace.anchor, trace.position + 1, self._limit)
        known = self._draft is not None and self._draft.logits is not None and asked and not failed
        beyond = (replace(each, chosen=None, chosen_logit=None, chosen_rank=None) for each in draft[emitted:])
        scores = SampleScores(
            target=tuple(target[: len(trace.proposed) + 1]),
            at=tuple(range(emitted)),
            draft=(*draft[:emitted], *beyond) if known else (),
        )
        return replace(step, trace=replace(trace, scores=scores))

    @torch.inference_mode()
    def _capture(self, work: Callable[[], None]) -> CapturedCall | None:
        """Work as a graph, or None where it cannot be one. Nothing is emitted: no sample is live."""
        self.state.done.fill_(1)
        self._capturing = True
        try:
            return CapturedCall(work)
        except DRAFT_ERRORS as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            warnings.warn(
                f"this round could not be captured and runs uncaptured, with the same results: {error}",
                stacklevel=2,
            )
            return None
        finally:
            self._capturing = False


def rows_of_sample(block: int, rules: StopRules) -> int:
    """W where passes are as wide as they come: the block's rows, and those of end marks beyond it."""
    return min(block + rules.most_forced, MOST_BLOCK) if block > 1 else block


class DeviceRounds:
    """Owns the rounds of a decoder: makes one for each shape, keeps it, lets all go.

    Args:
        verifier: the target with its cache.
        rules: where texts end.
        proposers: see Proposers.

    Attributes:
        kept: by shape, the last used at the end.
    """

    def __init__(self, verifier: Verifier, rules: StopRules, proposers: Proposers) -> None:
        self._verifier, self._rules, self._proposers = verifier, rules, proposers
        self.kept: Recent[RoundShape, DeviceRound] = Recent(_KEPT)
        self._generation = 0

    @property
    def unsuited(self) -> str | None:
        """Why the device cannot run the rounds, so that the host does; None where it can."""
        draft, context = self._proposers.draft, self._verifier.cache.context_len
        if self._rules.mode == "force":
            return "sentence_end=force is not the target's own text"
        if len(self._rules.eos) > steps.MOST_EOS:
            return f"{len(self._rules.eos)} ids end a turn; rounds on the device know {steps.MOST_EOS}"
        if draft is None or draft.context_len == context:
            return None
        if isinstance(draft, StaticDraft) and draft.has_static_block:
            return None
        return "the draft sees every state of the prompt and has no fused form here"

    @property
    def sample_rows(self) -> int:
        """W: a sample's rows in a pass."""
        block, row_width = self._proposers.block, self._verifier.row_width
        rows = rows_of_sample(block, self._rules)
        # End marks take no pass of their own.
        return rows if row_width is None else min(rows, -(-block // row_width) * row_width)

    def release(self) -> None:
        """Let go of all buffers and graphs."""
        self.kept.clear()

    def round(self, request: Request, *, scored: bool = False) -> DeviceRound:
        """The round that serves a request, with a second report or without."""
        shape = replace(self.shape(request), scored=scored)
        self._verifier.cache.grow(shape.slots)  # before a graph takes its addresses
        if self._generation != self._verifier.cache.generation:
            self.release()
            self._generation = self._verifier.cache.generation
        graph = self._verifier.target.device.type == "cuda"
        made = self._verifier, self._rules, self._proposers, shape
        return self.kept.of(shape, lambda: DeviceRound(*made, graph=graph))

    def shape(self, request: Request) -> RoundShape:
        """The shape of the round that serves a request."""
        row_width, count, sample_rows = self._verifier.row_width, request.num_samples, self.sample_rows
        samples = count if row_width is None else 1
        rows = samples * sample_rows
        pass_rows = row_width or rows
        # At one row width both loops see keys of one length, whatever the block.
        room = sample_rows if row_width is None else MOST_BLOCK
        per_sample = per_sample_slots(request.max_new_tokens, room)
        return RoundShape(
            samples=samples,
            sample_rows=sample_rows,
            rows=-(-rows // pass_rows) * pass_rows,
            pass_rows=pass_rows,
            per_sample=per_sample,
            slots=count * per_sample,
            sampling=request.sampling,
        )


def static_block(
    draft: BlockDraft, cache: Cache, *, samples: int, per_sample: int, slots: int
) -> StaticBlock:
    """The draft in its fused form where it has one that runs here, else with its context gathered."""
    if isinstance(draft, StaticDraft) and draft.has_static_block:
        return draft.static_block(
            cache.taps, context=cache.context_len, samples=samples, per_sample=per_sample, slots=slots
        )
    return _GatheredBlock(draft, cache)


class _GatheredBlock:
    """A draft without buffers of its own: its context is gathered from the cache in every round."""

    def __init__(self, draft: BlockDraft, cache: Cache) -> None:
        self._draft, self._cache = draft, cache
        self._prompt = torch.zeros(1, dtype=torch.int64, device=cache.taps.device)

    def begin(self, prompt_length: int) -> None:
        """See StaticBlock."""
        self._prompt.fill_(prompt_length)

    def __call__(self, state: steps.State) -> BlockLogits:
        """See StaticBlock."""
        context = self._cache.context_len
        last = state.lengths[:, None] - 1
        number = last - context + torch.arange(context, device=last.device)
        rows = torch.where(number >= 0, state.bases[:, None] + number, number) + context
        lengths = (self._prompt + last[:, 0]).clamp_max(context)
        anchors = state.tokens.gather(1, last)[:, 0]
        return self._draft.propose(self._cache.taps[rows], lengths, anchors)
