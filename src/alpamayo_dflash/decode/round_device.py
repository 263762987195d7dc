"""The loops of `decode.loop` as one round on the device: draft, proposal, verify pass, choice, walk.

A round reads and writes tensors that never move, so on a GPU it is captured once as a CUDA graph and
replayed; the host reads one small report a round. The words are those of `decode.loop`, its plain form.
Differences that show only in the counts: each sample has its own rows (they are nearly free), so samples with
equal texts do not share rows or profit from each other's proposals, and a proposal never has more than b − 1
tokens, end marks included. `sentence_end=force`, and drafts that see every state of a prompt and have no fast
form here, run in the plain loop.

Shapes: S sample, R rows, b block, X context, V vocabulary, E slots of the tail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode import steps
from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.decode.config import MOST_BLOCK, Request, Sampling
from alpamayo_dflash.decode.loop import DRAFT_ERRORS, Sample, failed
from alpamayo_dflash.decode.noise import stream_keys
from alpamayo_dflash.decode.observer import Observer, RoundTrace, SampleTrace
from alpamayo_dflash.decode.proposer import ProposalLike, Proposer, StaticBlock, StaticProposer
from alpamayo_dflash.decode.replay import Replay
from alpamayo_dflash.decode.sampling import Chooser
from alpamayo_dflash.decode.stops import StopReason, StopRules
from alpamayo_dflash.decode.verify import Prefilled, Verifier

_FAILED, _UNSETTLED, _BROKEN, _ANCHOR = (
    steps.FIELDS.index(name) for name in ("failed", "unsettled", "broken", "anchor")
)
_SLOTS_MULTIPLE = 64
_KEPT = 8
"""Rounds that are kept for their shapes to come again; each holds its buffers and its graph's memory."""


@dataclass(frozen=True)
class Shape:
    """What a captured round is made for.

    Attributes:
        samples: S.
        rows: R, at least S·b.
        pass_rows: how many of them run together.
        per_sample: slots of one sample.
        slots: slots of the tail.
        sampling: temperature and top_p.
    """

    samples: int
    rows: int
    pass_rows: int
    per_sample: int
    slots: int
    sampling: Sampling


def per_sample_slots(max_new_tokens: int, block: int) -> int:
    """Slots for a text of that length and the block behind it, rounded up so that shapes recur."""
    return -(-(max_new_tokens + block) // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE


class _GatheredBlock:
    """A draft without buffers of its own: its context is gathered from the cache in every round."""

    def __init__(self, proposer: Proposer, cache: Cache) -> None:
        self._proposer, self._cache = proposer, cache
        self._prompt = torch.zeros(1, dtype=torch.int64, device=cache.taps.device)

    def begin(self, prompt_length: int) -> None:
        """See StaticBlock."""
        self._prompt.fill_(prompt_length)

    def __call__(self, state: steps.State) -> ProposalLike:
        """See StaticBlock."""
        context = self._cache.context_len
        last = state.lengths[:, None] - 1
        number = last - context + torch.arange(context, device=last.device)
        rows = torch.where(number >= 0, state.bases[:, None] + number, number) + context
        lengths = (self._prompt + last[:, 0]).clamp_max(context)
        anchors = state.tokens.gather(1, last)[:, 0]
        return self._proposer.propose(self._cache.taps[rows], lengths, anchors)


def block_of(draft: Proposer, cache: Cache, *, samples: int, per_sample: int, slots: int) -> StaticBlock:
    """The draft in its fast form where it has one that runs here, else with its context gathered."""
    if isinstance(draft, StaticProposer) and draft.has_static_block:
        return draft.static_block(
            cache.taps, context=cache.context_len, samples=samples, per_sample=per_sample, slots=slots
        )
    return _GatheredBlock(draft, cache)


class Round:
    """One round of one shape: its buffers, and on a GPU its graph.

    Args:
        verifier: holds the target and the cache.
        rules: where texts end; not `force`.
        draft: proposes, or None.
        shape: see Shape.
        graph: capture it.
        replay: proposes in the draft's place, which is run all the same; None but in benchmarks.
    """

    def __init__(
        self,
        verifier: Verifier,
        rules: StopRules,
        draft: Proposer | None,
        shape: Shape,
        *,
        graph: bool,
        replay: Replay | None = None,
    ) -> None:
        target, cache = verifier.target, verifier.cache
        device = target.device
        block = 1 if draft is None else draft.block_size
        self.shape, self.block = shape, block
        self.marks = steps.Marks.of(rules)
        self._verifier, self._replay = verifier, replay
        self.state = steps.State(
            samples=shape.samples,
            block=block,
            width=shape.rows,
            per_sample=shape.per_sample,
            slots=shape.slots,
            device=device,
        )
        self._samples: Sequence[int] = range(shape.samples)
        self._keys = torch.zeros(shape.rows, 2, dtype=torch.int64, device=device)
        self._draft_keys = torch.zeros(shape.samples * (block - 1), 2, dtype=torch.int64, device=device)
        self._choose = self._chooser(shape.rows, target.vocab_size, None)
        self._choose_first = self._chooser(shape.samples, target.vocab_size, None)
        self._draft: StaticBlock | None = None
        if draft is not None:
            self._draft = block_of(
                draft,
                cache,
                samples=shape.samples,
                per_sample=shape.per_sample,
                slots=shape.slots,
            )
        # Made when the draft's first word tells the columns of its logits.
        self._choose_draft: Chooser | None = None
        self._draft_ids: Tensor | None = None
        self._draft_steps = torch.arange(block - 1, device=device)
        self._logits: Tensor | None = None
        self._finite: Tensor | None = None
        self._report = torch.empty_like(self.state.report, device="cpu", pin_memory=device.type == "cuda")
        self._capturing = False
        if device.type == "cuda":
            from alpamayo_dflash.decode import steps_triton

            self._propose, self._accept = steps_triton.propose, steps_triton.accept
        else:
            self._propose, self._accept = steps.propose, steps.accept
        self._graph = self._capture() if graph else None

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

    def first(self, prefilled: Prefilled, keys_S2: Tensor) -> Tensor:
        """The first tokens of samples, int64 [S]: the prompt's own logits choose them.

        Args:
            prefilled: the prompt.
            keys_S2: the samples' streams of noise (`noise.stream_keys`).

        Raises:
            ValueError: the target's logits are not finite.
        """
        logits = prefilled.logits_V.expand(len(keys_S2), -1)
        start = torch.zeros(len(keys_S2), dtype=torch.int64, device=keys_S2.device)
        choice = self._choose_first(logits, keys_S2, start)
        if not bool(choice.finite.all()):
            raise self._verifier.not_finite("the prompt")
        if bool(choice.settled.all()):
            return choice.columns.clone()
        return self._choose_first.exactly(logits, keys_S2, start)

    def begin(self, samples: Sequence[int], keys_S2: Tensor, first: Tensor, limit: int) -> None:
        """Start texts behind a prompt, whose tail the verifier has begun.

        Args:
            samples: their indices; sample i's slots start at i · per_sample.
            keys_S2: as in `first`.
            first: int64 [S], from `first`.
            limit: the most tokens.
        """
        self._samples = samples
        self._keys[: len(samples) * self.block] = keys_S2.repeat_interleave(self.block, 0)
        self._draft_keys.copy_(keys_S2.repeat_interleave(self.block - 1, 0))
        bases = torch.tensor([index * self.shape.per_sample for index in samples], device=first.device)
        self.state.begin(first, bases, limit, self.marks)
        if self._draft is not None:
            self._draft.begin(self._verifier.cache.prompt_length)

    @torch.inference_mode()
    def __call__(self) -> list[list[int]]:
        """Run a round and read its report, one row a sample (`steps.FIELDS`).

        Raises:
            ValueError: the target's logits are not finite.
        """
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
        rows = self._read()
        if any(row[_UNSETTLED] for row in rows):
            rows = self._settle(rows)
        if any(row[_BROKEN] for row in rows):
            sample, row = next((i, row) for i, row in zip(self._samples, rows, strict=True) if row[_BROKEN])
            raise self._verifier.not_finite(f"token {row[_ANCHOR]} of sample {sample}")
        return rows

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
        self._accept(state, self.marks, columns, torch.ones_like(columns, dtype=torch.bool), self._finite)
        self._report.copy_(state.report)
        again = self._read()
        return [new if old[_UNSETTLED] else old for old, new in zip(rows, again, strict=True)]

    def _run(self) -> None:
        state = self.state
        columns = finite = None
        if self._draft is not None:
            columns, finite = self._picks(self._draft)
        ids = self._draft_ids
        if self._replay is not None:
            columns, ids = self._replay(state), None
        self._propose(state, self.marks, columns, finite, ids)
        self._logits = self._verify()
        choice = self._choose(self._logits, self._keys, state.next_positions)
        self._finite = choice.finite
        self._accept(state, self.marks, choice.columns, choice.settled, choice.finite)
        self._report.copy_(state.report, non_blocking=True)

    def _picks(self, draft: StaticBlock) -> tuple[Tensor, Tensor]:
        """The draft's tokens as columns of its logits [S·(b − 1)], and whether the logits were finite."""
        state, count = self.state, self.block - 1
        try:
            proposal = draft(state)
        except DRAFT_ERRORS as error:
            if self._capturing:
                raise
            failed(error)
            nothing = torch.zeros(state.samples * count, dtype=torch.int64, device=state.tokens.device)
            return nothing, nothing.bool()
        logits = proposal.logits.flatten(0, 1).contiguous()
        if self._choose_draft is None:
            self._draft_ids = proposal.token_ids
            self._choose_draft = self._chooser(len(logits), self._draft_vocab(proposal), self._draft_ids)
        places = (state.lengths[:, None] + self._draft_steps).flatten()
        picked = self._choose_draft(logits, self._draft_keys, places)
        return picked.columns, picked.finite

    def _verify(self) -> Tensor:
        """The target's logits behind every row."""
        state, step = self.state, self.shape.pass_rows
        parts = []
        for start in range(0, self.shape.rows, step):
            rows = slice(start, start + step)
            logits = self._verifier.run(
                state.row_tokens[rows], state.row_positions[rows], state.row_slots[rows], state.seen[rows]
            )
            assert logits is not None
            parts.append(logits)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _draft_vocab(self, proposal: ProposalLike) -> int:
        """The columns of the draft's logits that mean something."""
        columns = proposal.logits.shape[-1]
        wanted = self._verifier.target.vocab_size if proposal.token_ids is None else len(proposal.token_ids)
        if columns < wanted:
            raise ValueError(f"the draft's logits have {columns} columns, its vocabulary {wanted} tokens")
        return wanted

    @torch.inference_mode()
    def _capture(self) -> CapturedCall | None:
        """The round as a graph, or None where it cannot be one. Nothing is emitted: no sample is live."""
        self.state.done.fill_(1)
        self._capturing = True
        try:
            return CapturedCall(self._run)
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


class Engine:
    """Owns the rounds of a decoder: makes one for each shape, keeps it, lets all go.

    Args:
        verifier: the target with its cache.
        rules: where texts end.
        draft: proposes, or None.

    Attributes:
        rounds: by shape, the last used behind.
        replay: set before the first text, it proposes in the draft's place (see `decode.replay`).
    """

    def __init__(self, verifier: Verifier, rules: StopRules, draft: Proposer | None) -> None:
        self._verifier, self._rules, self._draft = verifier, rules, draft
        self.rounds: dict[Shape, Round] = {}
        self._generation = 0
        self.replay: Replay | None = None

    @property
    def block(self) -> int:
        """b, 1 without a draft."""
        return 1 if self._draft is None else self._draft.block_size

    @property
    def unsuited(self) -> str | None:
        """Why the device cannot run the rounds, so that the host does; None where it can."""
        draft, context = self._draft, self._verifier.cache.context_len
        if self._rules.mode == "force":
            return "sentence_end=force is not the target's own text"
        if draft is None or draft.context_len == context:
            return None
        if isinstance(draft, StaticProposer) and draft.has_static_block:
            return None
        return "the draft sees every state of the prompt and has no fast form here"

    def release(self) -> None:
        """Let go of all buffers and graphs."""
        self.rounds.clear()

    def write(self, prefilled: Prefilled, request: Request, observer: Observer) -> Written:
        """Decode samples behind a prompt.

        Args:
            prefilled: the prompt, which the verifier has read.
            request: what is asked.
            observer: is told of the first tokens and of every round.
        """
        verifier, count = self._verifier, request.num_samples
        shape = self.shape(request)
        verifier.begin(prefilled, shape.slots)
        round_ = self._round(shape)
        # All samples together, or at one row width one after another (see `SpeculativeDecoder`).
        together = [range(count)] if verifier.row_width is None else [range(i, i + 1) for i in range(count)]
        keys = stream_keys(request.seed, prefilled.prompt.key, range(count), verifier.target.device)
        firsts = [round_.first(prefilled, keys[samples.start : samples.stop]) for samples in together]
        tokens: list[int] = torch.cat(firsts).tolist()
        written = Written(
            [_first(i, token, self._rules, request.max_new_tokens) for i, token in enumerate(tokens)]
        )
        for indices, first in zip(together, firsts, strict=True):
            round_.begin(indices, keys[indices.start : indices.stop], first, request.max_new_tokens)
            if indices[0] == 0:
                observer.on_prefill(len(prefilled.prompt.input_ids), tuple(tokens))
            self._write_together(round_, [written.samples[i] for i in indices], written, observer)
        return written

    def _write_together(
        self, round_: Round, samples: Sequence[Sample], written: Written, observer: Observer
    ) -> None:
        """Run rounds until these samples have ended, and their cache is what the expert reads."""
        while any(sample.stop is None for sample in samples):
            with observer.span("round"):
                rows = round_()
            traces = [_take(sample, row, self.block) for sample, row in zip(samples, rows, strict=True)]
            live = tuple(trace for trace in traces if trace is not None)
            failures = sum(row[_FAILED] for row in rows)
            observer.on_round(RoundTrace(written.rounds, len(samples) * self.block, live, failures))
            written.rounds += 1
            written.draft_failures += failures
        # A last token that the expert reads, and that no pass has written: the round writes every finished
        # sample's last row again, and emits nothing.
        if any(s.stop is StopReason.TRAJ_FUTURE_START and len(s.path) < len(s.tokens) for s in samples):
            round_()
        for sample in samples:
            whole = sample.stop is StopReason.TRAJ_FUTURE_START
            cached = len(sample.tokens) - (0 if whole else 1)
            start = sample.index * round_.shape.per_sample
            sample.path = list(range(start, start + cached))

    def shape(self, request: Request) -> Shape:
        """The shape of the round that serves a request."""
        row_width, count = self._verifier.row_width, request.num_samples
        samples = count if row_width is None else 1
        rows = samples * self.block
        pass_rows = row_width or rows
        # At one row width both loops see keys of one length, whatever the block.
        room = self.block if row_width is None else MOST_BLOCK
        per_sample = per_sample_slots(request.max_new_tokens, room)
        return Shape(
            samples=samples,
            rows=-(-rows // pass_rows) * pass_rows,
            pass_rows=pass_rows,
            per_sample=per_sample,
            slots=count * per_sample,
            sampling=request.sampling,
        )

    def _round(self, shape: Shape) -> Round:
        if self._generation != self._verifier.cache.generation:
            self.release()
            self._generation = self._verifier.cache.generation
        round_ = self.rounds.pop(shape, None)
        if round_ is None:
            while len(self.rounds) >= _KEPT:
                del self.rounds[next(iter(self.rounds))]
            graph = self._verifier.target.device.type == "cuda"
            round_ = Round(self._verifier, self._rules, self._draft, shape, graph=graph, replay=self.replay)
        self.rounds[shape] = round_
        return round_


@dataclass
class Written:
    """Finished texts.

    Attributes:
        samples: in order.
        rounds: passes that emitted something.
        draft_failures: texts and rounds for which the draft's logits were not finite.
    """

    samples: list[Sample]
    rounds: int = 0
    draft_failures: int = 0


def _first(index: int, token: int, rules: StopRules, limit: int) -> Sample:
    sample = Sample(index, [token])
    sample.stop = rules.reason(token) or (StopReason.LIMIT if limit == 1 else None)
    return sample


def _take(sample: Sample, row: Sequence[int], block: int) -> SampleTrace | None:
    """Take a report over into a sample; None if it had ended before."""
    if sample.stop is not None:
        return None
    values = dict(zip(steps.FIELDS, row, strict=False))
    behind = row[len(steps.FIELDS) :]
    emitted, proposed = behind[: values["emitted"]], behind[block : block + values["proposed"]]
    trace = SampleTrace(
        sample.index,
        values["anchor"],
        sample.anchor,
        tuple(proposed),
        values["accepted"],
        tuple(emitted),
        values["drafted"],
    )
    cached = len(sample.tokens) + values["accepted"]
    sample.tokens += emitted
    sample.path = list(range(cached))
    sample.passes += 1
    sample.drafted += values["drafted"]
    sample.accepted += min(values["accepted"], values["drafted"])
    sample.stop = steps.REASONS[values["reason"]]
    return trace


class CapturedCall:
    """A call over tensors that never move, as a CUDA graph.

    Args:
        call: launches work on the current device and reads nothing back. It is run once, which compiles what
            is compiled and makes what is made once, and then captured.

    Raises:
        RuntimeError: the call cannot be captured.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Without a stream of this device's it would take the one that the process captured on first.
        with torch.cuda.graph(self._graph, stream=stream):
            call()

    def replay(self) -> None:
        """Do the work again; the host does not wait for it."""
        self._graph.replay()
