"""The round in Python, over a tree of rows: the plain form of `round_device`, and what CPUs run.

Samples whose texts are the same so far share their rows; they part where their noise makes them choose
differently. A sample may walk on over what was proposed to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from alpamayo_dflash.common.options import MOST_BLOCK
from alpamayo_dflash.decode.cache import ROOT, per_sample_slots
from alpamayo_dflash.decode.config import Request, Sampling
from alpamayo_dflash.decode.loop import NotFiniteError, Pass, Sample, Step, same_texts
from alpamayo_dflash.decode.noise import TokenNoise
from alpamayo_dflash.decode.observer import Observer, PlaceScores, SampleScores, SampleTrace
from alpamayo_dflash.decode.proposer import TARGET, DraftProposer, Listed, United, unite
from alpamayo_dflash.decode.sampling import PlaceChooser
from alpamayo_dflash.decode.scores import NOTHING_CHOSEN, Scorer, score_all
from alpamayo_dflash.decode.stops import StopRules
from alpamayo_dflash.decode.tree import Tree, Walk, walk
from alpamayo_dflash.decode.verify import Prefilled, Verifier


class HostRound:
    """See `loop.Round`.

    Args:
        verifier: the target with its cache.
        rules: where texts end.
        draft: proposes blocks, or None.
        listed: propose lists.
    """

    def __init__(
        self,
        verifier: Verifier,
        rules: StopRules,
        draft: DraftProposer | None = None,
        listed: Sequence[Listed] = (),
    ) -> None:
        self._verifier, self._rules, self._draft, self._listed = verifier, rules, draft, listed
        self._samples: Sequence[Sample] = ()
        self._everyone: Sequence[Sample] = ()
        self._scores: _HostScores | None = None

    @property
    def proposes(self) -> bool:
        """See Round."""
        return self._draft is not None or bool(self._listed)

    def open(
        self, prefilled: Prefilled, request: Request, samples: Sequence[Sample], observer: Observer
    ) -> None:
        """See Round."""
        target, self._everyone = self._verifier.target, samples
        # As many as on the device at one row width, since attention is cut by them.
        slots = request.num_samples * per_sample_slots(request.max_new_tokens, MOST_BLOCK)
        self._verifier.begin(prefilled, slots)
        self._logits_V, self._limit, self._span = prefilled.logits_V, request.max_new_tokens, observer.span
        key = prefilled.prompt.key
        noise = TokenNoise(request.seed, key, request.streams, target.vocab_size, target.device)
        target_ids = (target.vocab_size, target.traj_ids)
        self._chooser = PlaceChooser(target_ids, request.sampling, noise)
        self._scores = None
        if observer.wants_scores:
            self._scores = _HostScores(target_ids, request.sampling, target.device)
        if self._draft is not None:
            self._draft.begin(self._chooser, self._limit, keep_logits=observer.wants_scores)
        for proposer in self._listed:
            proposer.begin(prefilled, samples)

    def first(self, samples: Sequence[Sample]) -> list[int]:
        """See Round."""
        with self._span("sampling"):
            logits_SV = self._logits_V.expand(len(samples), -1)
            return self._choose(logits_SV, [sample.index for sample in samples], [0] * len(samples))

    def begin(self, samples: Sequence[Sample]) -> None:
        """See Round."""
        self._samples = samples

    def __call__(self) -> Pass:
        """See Round."""
        samples = [sample for members in same_texts(self._samples) for sample in members]
        offers, failures = self._offers(samples) if self.proposes else ([United() for _ in samples], 0)
        with self._span("cache"):
            tree = Tree(self._verifier.cache.tail)
            slots = [self._grow(tree, sample, offer) for sample, offer in zip(samples, offers, strict=True)]
        with self._span("verify"):
            logits_RV = self._verifier.rows(tree.slots)
        parts = list(zip(samples, offers, slots, strict=True))
        with self._span("sampling"):
            walks = self._walk(tree, logits_RV, parts)
        with self._span("cache"):
            origins: dict[int, str] = {}  # by row, of whoever offered it
            for _, offer, (_, *rows) in parts:
                origins.update(zip(rows, offer.sources, strict=True))
            steps = [
                Step(_trace(*part, walked, origins), walked.path)
                for part, walked in zip(parts, walks, strict=True)
            ]
            self._keep([slot for step in steps for slot in step.slots])
        if self._scores is not None:
            ways = [(own, walked.path) for (*_, own), walked in zip(parts, walks, strict=True)]
            by_slot = dict(zip(tree.slots, logits_RV, strict=True))
            steps = self._scores(by_slot, ways, steps, self._draft)
        return Pass(steps, len(tree.slots), failures)

    def close(self, samples: Sequence[Sample], cached: Sequence[int]) -> None:
        """See Round."""
        tree = Tree(self._verifier.cache.tail)
        for sample, count in zip(samples, cached, strict=True):
            parent = sample.path[-1] if sample.path else ROOT
            missing = sample.tokens[len(sample.path) : count]
            sample.path = sample.path[:count] + tree.add_chain(missing, parent)
        if tree.slots:
            with self._span("verify"):
                self._verifier.rows(tree.slots, logits=False)
        self._keep(())

    def _offers(self, samples: Sequence[Sample]) -> tuple[list[United], int]:
        """What is offered to each sample, united, and how many texts the draft failed on."""
        with self._span("draft"):
            lists = [proposer.propose(samples) for proposer in self._listed]
            failures = 0
            if self._draft is not None:
                lists.append(self._draft.propose(samples))
                failures = self._draft.failures
            return [
                unite(
                    offers,
                    sample.anchor,
                    self._rules,
                    room=self._limit - len(sample.tokens),
                    most=MOST_BLOCK + 1,
                )
                for sample, *offers in zip(samples, *lists, strict=True)
            ], failures

    def _grow(self, tree: Tree, sample: Sample, offer: United) -> list[int]:
        """The rows of a sample's anchor and of what is offered to it; their slots."""
        slots = [tree.add(sample.anchor, sample.path[-1] if sample.path else ROOT)]
        for token, parent in zip(offer.tokens, offer.parents, strict=True):
            slots.append(tree.add(token, slots[parent + 1]))
        return slots

    def _walk(
        self, tree: Tree, logits_RV: torch.Tensor, parts: Sequence[tuple[Sample, United, list[int]]]
    ) -> list[Walk]:
        """Let samples, each with its offer and its own rows, go down the tree along the target's choices."""
        row = {slot: index for index, slot in enumerate(tree.slots)}
        positions = self._verifier.cache.tail.positions

        def choose_at(pairs: Sequence[tuple[int, int]]) -> list[int]:
            rows = [row[slot] for _, slot in pairs]
            logits = logits_RV if rows == list(range(len(row))) else logits_RV[rows]
            found = self._choose(logits, [s for s, _ in pairs], [positions[slot] + 1 for _, slot in pairs])
            if self._scores is not None:
                self._scores.chosen.update(zip(pairs, found, strict=True))
            return found

        ends = {
            sample.index: slots[offer.ends + 1] for sample, offer, slots in parts if offer.ends is not None
        }
        walks = walk(
            tree,
            {sample.index: slots for sample, _, slots in parts},
            choose_at,
            {sample.index: self._limit - len(sample.tokens) for sample, _, _ in parts},
            lambda token: self._rules.reason(token) is not None,
            ends=ends,
        )
        return list(walks.values())

    def _choose(self, logits_RV: torch.Tensor, samples: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Choose for each row the token of samples[r] at positions[r]. This is the round's one read."""
        finite = torch.isfinite(logits_RV).all(-1).long()
        read: list[list[int]]
        read = torch.stack((self._chooser(logits_RV, samples, positions), finite)).tolist()
        chosen, sound = read
        if not all(sound):
            row = sound.index(0)
            raise NotFiniteError(samples[row], positions[row])
        return chosen

    def _keep(self, more: Sequence[int]) -> None:
        """Free every slot but those of the samples' paths and these."""
        everyone = [slot for sample in self._everyone for slot in sample.path]
        self._verifier.cache.tail.keep([*everyone, *more])


class _HostScores:
    """What target and draft thought of a pass's places.

    Args:
        target_ids: the target's V, and its ids that are never chosen.
        sampling: temperature and top_p.
        device: where the logits are.

    Attributes:
        chosen: by sample index and slot, the target's choice after that row; of one pass.
    """

    def __init__(self, target_ids: tuple[int, range], sampling: Sampling, device: torch.device) -> None:
        self._made, self._device = (target_ids, sampling), device
        self._target = Scorer(*self._made, device=device)
        self._by_draft: Scorer | None = None  # made when the draft's first word tells its columns
        self.chosen: dict[tuple[int, int], int] = {}

    def __call__(
        self,
        rows: Mapping[int, torch.Tensor],
        ways: Sequence[tuple[Sequence[int], Sequence[int]]],
        steps: Sequence[Step],
        draft: DraftProposer | None,
    ) -> list[Step]:
        """The steps of a pass with their scores; `chosen` is empty afterwards.

        Args:
            rows: the target's logits [V] by slot.
            ways: of each step's sample the slots of its anchor and proposal, and those that its walk took.
            steps: of the pass.
            draft: has proposed, if there is one.
        """
        scored = []
        for step, (own, path) in zip(steps, ways, strict=True):
            trace = step.trace
            chosen = {slot: token for (sample, slot), token in self.chosen.items() if sample == trace.sample}
            seen = [*own, *(slot for slot in path if slot in chosen and slot not in own)]
            logits_RV = torch.stack([rows[slot] for slot in seen])
            scores = SampleScores(
                target=tuple(score_all(self._target, logits_RV, [chosen[slot] for slot in seen])),
                at=tuple(seen.index(slot) for slot in path[: len(trace.emitted)]),
                draft=() if draft is None else self._of_draft(draft, trace),
            )
            scored.append(replace(step, trace=replace(trace, scores=scores)))
        self.chosen.clear()
        return scored

    def _of_draft(self, draft: DraftProposer, trace: SampleTrace) -> tuple[PlaceScores, ...]:
        logits = draft.logits.get(trace.sample)
        if logits is None:
            return ()
        if self._by_draft is None:
            self._by_draft = Scorer(*self._made, token_ids=draft.token_ids, device=self._device)
        emitted = [*trace.emitted, *[NOTHING_CHOSEN] * len(logits)]
        return tuple(score_all(self._by_draft, logits, emitted[: len(logits)]))


def _trace(
    sample: Sample, offer: United, slots: Sequence[int], walked: Walk, origins: dict[int, str]
) -> SampleTrace:
    """What a walk did for a sample.

    Args:
        sample: as it was before.
        offer: what was proposed to it.
        slots: the rows of its anchor and of that.
        walked: where the walk led.
        origins: the source of every row.
    """
    own = {slot: node - 1 for node, slot in enumerate(slots)}
    taken: list[int] = []
    for slot in walked.path[1:]:
        if slot not in own:
            break
        taken.append(own[slot])
    sources = [offer.sources[node] for node in taken]
    sources += [origins[slot] for slot in walked.path[len(taken) + 1 :]]
    sources += [TARGET] * (len(walked.tokens) - len(sources))
    by_draft = [offer.drafted[node] for node in taken]
    return SampleTrace(
        sample=sample.index,
        position=len(sample.tokens) - 1,
        anchor=sample.anchor,
        proposed=tuple(offer.tokens),
        parents=tuple(offer.parents),
        sources=tuple(offer.sources),
        taken=tuple(taken),
        drafted=sum(offer.drafted),
        draft_accepted=by_draft.index(False) if False in by_draft else len(by_draft),
        emitted=tuple(walked.tokens),
        origins=tuple(sources),
    )
