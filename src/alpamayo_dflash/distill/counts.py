"""How often each token stands in the responses that a draft is trained on.

A draft with a reduced head keeps the commonest tokens (`train.vocabulary`). Held-out clips must not choose
them, so the split by clip begins here: the set records the counts of the clips that the default split trains
on; those of any other split are counted when asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpamayo_dflash.distill.shards import DistillSample

DEFAULT_HELD_OUT = 0.1
"""Share of clips that training holds out by default; the recorded counts are of the others."""


def is_held_out(clip_id: str, share: float) -> bool:
    """Whether a clip is held out: by a hash of its id, so always the same way, whatever else there is."""
    number = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big")
    return number < share * 2**64


def count_tokens(samples: Sequence[DistillSample]) -> dict[int, int]:
    """How often each token id stands in these responses, ids ascending."""
    counts = Counter(token for sample in samples for token in sample.token_ids)
    return dict(sorted(counts.items()))


def record(samples: Sequence[DistillSample]) -> dict[str, Any]:
    """What a manifest holds: the counts of the responses that the default split trains on, and its share."""
    train = [sample for sample in samples if not is_held_out(sample.clip_id, DEFAULT_HELD_OUT)]
    counts = {str(token): count for token, count in count_tokens(train).items()}
    return {"held_out": DEFAULT_HELD_OUT, "counts": counts}


def merged_record(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The ranks' records added up; None where one has none (an older set), or of another share."""
    records = [manifest.get("token_counts") for manifest in manifests]
    if any(found is None or found["held_out"] != DEFAULT_HELD_OUT for found in records):
        return None
    total: Counter[str] = Counter()
    for found in records:
        total.update(found["counts"])  # type: ignore[index]
    counts = dict(sorted(total.items(), key=lambda item: int(item[0])))
    return {"held_out": DEFAULT_HELD_OUT, "counts": counts}


def training_counts(
    manifest: Mapping[str, Any], train: Sequence[DistillSample], *, held_out: float | None
) -> dict[int, int]:
    """Token counts of a training split: the recorded ones where they are of this split, else counted now.

    Args:
        manifest: of the set.
        train: the split's responses.
        held_out: share of clips that it holds out by hash; None where it holds out otherwise.
    """
    found = manifest.get("token_counts")
    if found is None or found["held_out"] != held_out:
        return count_tokens(train)
    return {int(token): count for token, count in found["counts"].items()}
