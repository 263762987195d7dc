"""Does the tiny Alpamayo see? Held-out scenes, as they are and with another scene's images."""

from __future__ import annotations

import dataclasses

import numpy as np

from alpamayo_dflash.clips.window import Window, constant_velocity, min_ade
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.standins.scenes import VALIDATION, stream_seed
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.world.events import sample_scene
from alpamayo_dflash.world.facts import Facts
from alpamayo_dflash.world.language import names
from alpamayo_dflash.world.render import window


def held_out(count: int, seed: int) -> list[tuple[Window, Facts]]:
    """Held-out scenes: windows with their facts, from a stream that training never draws from."""
    scenes = [sample_scene(stream_seed(seed, VALIDATION, index)) for index in range(count)]
    return [(window(scene), scene.facts) for scene in scenes]


def look(target: Alpamayo, scenes: list[tuple[Window, Facts]], seed: int = 0) -> dict[str, float]:
    """Greedy Chain-of-Causation and trajectory on each scene.

    Returns:
        named: share of scenes whose text names manoeuvre and cause;
        named_swapped: the same when the images are those of the scene half-way round the list;
        min_ade_m and constant_velocity_ade_m: metres, means over scenes.
    """
    decoder = SpeculativeDecoder(target)
    named = swapped = 0
    ours: list[float] = []
    baseline: list[float] = []
    for index, (view, facts) in enumerate(scenes):
        result = decoder.generate(view, temperature=0.0, seed=seed)
        named += names(facts, result.coc[0])
        assert result.pred_xyz is not None
        future = view.ego_future_xyz
        assert future is not None
        ours.append(min_ade(result.pred_xyz.cpu().numpy(), future))
        baseline.append(min_ade(constant_velocity(view.ego_history_xyz, len(future)), future))
        other = scenes[(index + len(scenes) // 2) % len(scenes)][0]
        blind = decoder.generate(
            dataclasses.replace(view, frames=other.frames), temperature=0.0, seed=seed, trajectories=False
        )
        swapped += names(facts, blind.coc[0])
    return {
        "scenes": len(scenes),
        "named": named / len(scenes),
        "named_swapped": swapped / len(scenes),
        "min_ade_m": float(np.mean(ours)),
        "constant_velocity_ade_m": float(np.mean(baseline)),
    }
