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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode import steps
from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.decode.chooser import Chooser
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.loop import Sample, failed
from alpamayo_dflash.decode.noise import stream_keys
from alpamayo_dflash.decode.observer import Observer, RoundTrace, SampleTrace
from alpamayo_dflash.decode.proposer import ProposalLike, Proposer, StaticBlock, StaticProposer
from alpamayo_dflash.decode.replay import Replay
from alpamayo_dflash.decode.stops import StopReason, StopRules
from alpamayo_dflash.decode.verify import Prefilled, Verifier

_SLOTS_MULTIPLE = 64


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
        return draft.static_block(cache.taps, samples, per_sample, slots)
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
        self._choose_draft: Chooser | None = None
        self._draft_ids: Tensor | None = None
        self._logits: Tensor | None = None
        self._report = torch.empty_like(self.state.report, device="cpu", pin_memory=device.type == "cuda")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capturing = False
        if device.type == "cuda":
            from alpamayo_dflash.decode import step_kernels

            self._propose, self._accept = step_kernels.propose, step_kernels.accept
        else:
            self._propose, self._accept = steps.propose, steps.accept
        if graph:
            self._capture()

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

    def begin(self, prefilled: Prefilled, seed: int, samples: Sequence[int], limit: int) -> list[int]:
        """Start texts behind a prompt, and return their first tokens.

        Args:
            prefilled: the prompt, whose tail the verifier has begun.
            seed: with the prompt's key and a sample's index, fixes the noise.
            samples: their indices; sample i's slots start at i · per_sample.
            limit: the most tokens.
        """
        state, device = self.state, self.state.tokens.device
        keys = stream_keys(seed, prefilled.prompt.key, samples, "cpu")
        self._keys[: len(samples) * self.block] = keys.repeat_interleave(self.block, 0).to(device)
        self._draft_keys.copy_(keys.repeat_interleave(self.block - 1, 0))
        logits = prefilled.logits_V.expand(len(samples), -1)
        start = torch.zeros(len(samples), dtype=torch.int64, device=device)
        choice = self._choose_first(logits, keys.to(device), start)
        first = choice.columns
        if not bool(choice.settled.all()):
            first = self._choose_first.exactly(logits, keys.to(device), start)
        bases = torch.tensor([index * self.shape.per_sample for index in samples], device=device)
        state.begin(first, bases, limit, self.marks)
        if self._draft is not None:
            self._draft.begin(self._verifier.cache.prompt_length)
        tokens: list[int] = first.tolist()
        return tokens

    @torch.inference_mode()
    def __call__(self) -> list[list[int]]:
        """Run a round and read its report, one row a sample (`steps.FIELDS`)."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
        rows = self._read()
        if any(row[steps.FIELDS.index("unsettled")] for row in rows):
            rows = self._settle(rows)
        return rows

    def _read(self) -> list[list[int]]:
        if self.state.tokens.is_cuda:
            torch.cuda.current_stream().synchronize()
        rows: list[list[int]] = self._report.tolist()
        return rows

    def _settle(self, rows: list[list[int]]) -> list[list[int]]:
        """Choose again with a sort, for samples with a choice that no candidate settled."""
        assert self._logits is not None
        state = self.state
        columns = self._choose.exactly(self._logits, self._keys, state.next_positions)
        self._accept(state, self.marks, columns, torch.ones_like(columns, dtype=torch.bool))
        self._report.copy_(state.report)
        again = self._read()
        at = steps.FIELDS.index("unsettled")
        return [new if old[at] else old for old, new in zip(rows, again, strict=True)]

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
        self._accept(state, self.marks, choice.columns, choice.settled)
        self._report.copy_(state.report, non_blocking=True)

    def _picks(self, draft: StaticBlock) -> tuple[Tensor, Tensor]:
        """The draft's tokens as columns of its logits [S·(b − 1)], and whether the logits were finite."""
        state, count = self.state, self.block - 1
        try:
            proposal = draft(state)
        except (RuntimeError, ArithmeticError) as error:
            if self._capturing:
                raise
            failed(error)
            nothing = torch.zeros(state.samples * count, dtype=torch.int64, device=state.tokens.device)
            return nothing, nothing.bool()
        logits = proposal.logits.flatten(0, 1)
        if self._choose_draft is None:
            self._draft_ids = proposal.token_ids
            self._choose_draft = self._chooser(len(logits), self._draft_vocab(proposal), self._draft_ids)
            self._draft_steps = torch.arange(count, device=logits.device)
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
    def _capture(self) -> None:
        """Run once, which compiles what is compiled, and capture. Nothing is emitted: no sample is live."""
        self.state.done.fill_(1)
        self._capturing = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            warnings.warn(
                f"this round could not be captured and runs uncaptured, with the same results: {error}",
                stacklevel=2,
            )
            return
        finally:
            self._capturing = False
        self._graph = graph


class Engine:
    """Owns the rounds of a decoder: makes one for each shape, keeps it, lets all go.

    Args:
        verifier: the target with its cache.
        rules: where texts end.
        draft: proposes, or None.

    Attributes:
        rounds: by shape.
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

    def write(
        self,
        prefilled: Prefilled,
        *,
        sampling: Sampling,
        seed: int,
        num_samples: int,
        max_new_tokens: int,
        observer: Observer,
    ) -> Written:
        """Decode samples behind a prompt; arguments as for `SpeculativeDecoder.generate`."""
        verifier, row_width = self._verifier, self._verifier.row_width
        per_sample = per_sample_slots(max_new_tokens, self.block)
        verifier.begin(prefilled, num_samples * per_sample)
        together = [list(range(num_samples))] if row_width is None else [[i] for i in range(num_samples)]
        wanted = len(together[0]) * self.block
        pass_rows = row_width or wanted
        shape = Shape(
            len(together[0]),
            -(-wanted // pass_rows) * pass_rows,
            pass_rows,
            per_sample,
            num_samples * per_sample,
            sampling,
        )
        round_ = self._round(shape)
        written = Written([])
        for indices in together:
            first = round_.begin(prefilled, seed, indices, max_new_tokens)
            samples = [
                _first(index, token, self._rules, max_new_tokens)
                for index, token in zip(indices, first, strict=True)
            ]
            written.samples += samples
            if indices[0] == 0:
                observer.on_prefill(len(prefilled.prompt.input_ids), tuple(first))
            while any(sample.stop is None for sample in samples):
                with observer.span("round"):
                    rows = round_()
                traces = [_take(sample, row, self.block) for sample, row in zip(samples, rows, strict=True)]
                live = tuple(trace for trace in traces if trace is not None)
                failures = sum(row[steps.FIELDS.index("failed")] for row in rows)
                observer.on_round(RoundTrace(written.rounds, len(samples) * self.block, live, failures))
                written.rounds += 1
                written.draft_failures += failures
            # A last token that the expert reads, and that no pass has written: the round writes every
            # finished sample's last row again, and emits nothing.
            if any(s.stop is StopReason.TRAJ_FUTURE_START and len(s.path) < len(s.tokens) for s in samples):
                round_()
            for sample in samples:
                whole = sample.stop is StopReason.TRAJ_FUTURE_START
                cached = len(sample.tokens) - (0 if whole else 1)
                start = sample.index * per_sample
                sample.path = list(range(start, start + cached))
        return written

    def _round(self, shape: Shape) -> Round:
        if self._generation != self._verifier.cache.generation:
            self.release()
            self._generation = self._verifier.cache.generation
        if shape not in self.rounds:
            graph = self._verifier.target.device.type == "cuda"
            self.rounds[shape] = Round(
                self._verifier, self._rules, self._draft, shape, graph=graph, replay=self.replay
            )
        return self.rounds[shape]


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
