"""Acceptance by real decoding, which training is handed from outside, beside the simulated one.

Simulated and real acceptance of greedy responses are the same walk: where they differ, the data was made with
another target, another prompt or other arithmetic than the draft will meet, or one of the two computes the
draft otherwise. The first place tells which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from alpamayo_dflash.distill.shards import DistillSample
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.accept import AcceptanceCounts, Walk, simulate
from alpamayo_dflash.train.data import BlockData

SAMPLED_AT = 0.6
"""Temperature of the sampled texts."""


@dataclass(frozen=True)
class RealAcceptance:
    """What decoding held-out clips with a draft gave.

    Attributes:
        greedy: of the greedy texts.
        sampled: of those at `SAMPLED_AT`.
        walks: the greedy texts, pass by pass.
    """

    greedy: AcceptanceCounts
    sampled: AcceptanceCounts
    walks: tuple[Walk, ...]


Evaluate = Callable[[DFlashDraft], RealAcceptance]
"""Decodes held-out clips with a bound draft, which it leaves as it is."""


@dataclass(frozen=True)
class RealRequest:
    """What a run tells whoever decodes for it.

    Attributes:
        draft: as it is before the first step.
        held_out: the held-out responses.
        max_tokens: the most tokens a response of the data may have.
        training_bytes: memory of the draft's device that training has yet to take, about.
    """

    draft: DFlashDraft
    held_out: Sequence[DistillSample]
    max_tokens: int
    training_bytes: int


OpenEvaluate = Callable[[RealRequest], Evaluate]
"""Makes an `Evaluate`, before anything is trained.

Raises:
    ValueError: the target or a clip is missing, or memory does not reach.
"""


@dataclass(frozen=True)
class Difference:
    """Where a simulated and a real walk of one clip part.

    Attributes:
        clip_id: the clip.
        place: of the first token that differs.
        what: "text": the target wrote another token than the data has; "accepted": one of the two took the
            draft's token there and the other did not.
    """

    clip_id: str
    place: int
    what: str


def differences(simulated: Sequence[Walk], real: Sequence[Walk]) -> list[Difference]:
    """The first difference of each clip, in the order of the clips; both lists have the same clips."""
    found = []
    for mine, theirs in zip(simulated, real, strict=True):
        assert mine.clip_id == theirs.clip_id
        places = {"text": _text_place(mine, theirs), "accepted": _accepted_place(mine, theirs)}
        what = min(places, key=places.__getitem__)
        if places[what] != _NOWHERE:
            found.append(Difference(mine.clip_id, places[what], what))
    return found


_NOWHERE = 2**62


def _text_place(one: Walk, other: Walk) -> int:
    pairs = enumerate(zip_longest(one.token_ids, other.token_ids))
    return next((place for place, (a, b) in pairs if a != b), _NOWHERE)


def _accepted_place(one: Walk, other: Walk) -> int:
    """The first token that one of the two accepted and the other did not.

    A pass starts at the token that the target chose itself, after those that the pass before it accepted. So
    where starts differ, the earlier is a token that the other walk accepted.
    """
    ends = len(one.token_ids) - 1, len(other.token_ids) - 1
    for starts in zip_longest(one.anchors, other.anchors):
        if starts[0] != starts[1]:
            return min(end if start is None else start for start, end in zip(starts, ends, strict=True))
    return _NOWHERE


def compared(draft: DFlashDraft, data: BlockData, masked_ids: range, real: RealAcceptance) -> dict[str, Any]:
    """A log entry's words on real acceptance: lengths, counts, and where it differs from the simulated one.

    Args:
        draft: the bound draft that both are of.
        data: the held-out responses.
        masked_ids: ids that are never proposed.
        real: of the draft.
    """
    greedy = {sample.clip_id: index for index, sample in enumerate(data.samples) if sample.temperature == 0}
    real_walks = [walk for walk in real.walks if walk.clip_id in greedy]
    chosen = torch.tensor([greedy[walk.clip_id] for walk in real_walks], dtype=torch.int64)
    found = differences(simulate(draft, data, masked_ids, chosen), real_walks)
    entry: dict[str, Any] = {
        **_entry("real_greedy", real.greedy),
        **_entry("real", real.sampled),
        "real_clips": len(real.walks),
        "real_compared": len(real_walks),
        "real_differing": len(found),
    }
    return entry | ({"real_difference": vars(found[0])} if found else {})


def _entry(name: str, counts: AcceptanceCounts) -> Mapping[str, Any]:
    return {
        f"{name}_acceptance_length": counts.length,
        f"{name}_tokens": counts.tokens,
        f"{name}_passes": counts.passes,
    }
