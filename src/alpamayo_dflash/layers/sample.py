"""Which clips a rank scores: a seeded random sample, split without overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sample_clips(
    clip_ids: Sequence[str], per_rank: int, *, seed: int, rank: int, world_size: int
) -> list[str]:
    """Draw this rank's clips.

    All ranks draw the same `per_rank * world_size` clips (all, if there are fewer) and take every
    `world_size`-th, so one process asked for as many clips as all ranks together scores the same ones.

    Args:
        clip_ids: the clips to draw from, in an order that is the same on every rank.
        per_rank: clips a rank.
        seed: of the draw.
        rank: of this process.
        world_size: number of processes.

    Returns:
        Clip ids in the order drawn; no clip twice, none on two ranks.
    """
    order = np.random.default_rng(seed).permutation(len(clip_ids))[: per_rank * world_size]
    return [clip_ids[index] for index in order[rank::world_size]]
