"""How hard the world is, measured on the tiny target's own sampled CoCs (`measure-world`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.artefacts import provenance, write_json
from alpamayo_dflash.world.measure import BOUNDS, measure, violations

if TYPE_CHECKING:
    from alpamayo_dflash.clips import Window
    from alpamayo_dflash.evaluate.config import MeasureWorldConfig

_SAMPLES = 2


def figures_of(responses: Sequence[Sequence[tuple[str, int]]]) -> dict[str, float]:
    """The world's figures over clips.

    Args:
        responses: for each clip, the text and the number of tokens of each of its sampled CoCs. The first is
            measured; the first two are compared where there are two.

    Raises:
        ValueError: fewer than two clips, or none with two samples.
    """
    firsts = [samples[0] for samples in responses]
    pairs = [(samples[0][0], samples[1][0]) for samples in responses if len(samples) > 1]
    figures = measure([text for text, _ in firsts], [tokens for _, tokens in firsts], pairs)
    return {name: round(value, 4) for name, value in figures.items()}


def coc_tokens(token_ids: Sequence[int], cot_end: int) -> int:
    """Tokens of a CoC, the end marks left out."""
    return token_ids.index(cot_end) if cot_end in token_ids else len(token_ids)


def windows(config: MeasureWorldConfig) -> Iterator[Window]:
    """The windows to measure on: of a written world's clips, or of scenes drawn in memory."""
    if config.cache_dir is None:
        from alpamayo_dflash.world import sample_scene, scene_seed, window

        for index in range(config.num_samples):
            yield window(sample_scene(scene_seed(config.world_seed, 0, index)))
        return
    from alpamayo_dflash.clips import ClipSource
    from alpamayo_dflash.evaluate.setup import chosen_clips

    source = ClipSource(config.cache_dir)
    for clip_id in chosen_clips(source, chunks=config.chunks, count=config.num_samples):
        yield source.window(clip_id)


def run(config: MeasureWorldConfig) -> dict[str, Any]:
    """Sample two CoCs a clip, measure them, write the figures; `passed` says whether all lie in their bounds.

    Raises:
        ValueError: the target or the clips are missing.
    """
    from rich.console import Console
    from rich.progress import track

    from alpamayo_dflash.decode import SpeculativeDecoder
    from alpamayo_dflash.evaluate.setup import open_target
    from alpamayo_dflash.tiny import checkpoint_path

    started = time.time()
    name = config.alpamayo_model or str(checkpoint_path())
    target, target_hash = open_target(name, device=config.device, dtype="float32")
    decoder = SpeculativeDecoder(target)
    responses: list[list[tuple[str, int]]] = []
    console = Console(file=sys.stderr)
    for window in track(windows(config), "rollouts", total=config.num_samples, console=console):
        result = decoder.generate(
            window,
            temperature=config.temperature,
            top_p=config.top_p,
            num_traj_samples=_SAMPLES,
            seed=config.seed,
            max_new_tokens=config.max_tokens,
            trajectories=False,
        )
        counts = [coc_tokens(ids, target.special.cot_end) for ids in result.token_ids]
        responses.append(list(zip(result.coc, counts, strict=True)))
    figures = figures_of(responses)
    outside = violations(figures)
    answer = {
        "figures": figures,
        "bounds": {name: list(bounds) for name, bounds in BOUNDS.items()},
        "violations": outside,
        "passed": not outside,
        "clips": len(responses),
    }
    parents = {"target": target_hash}
    made = provenance(config=config, parents=parents, seed=config.seed, device=config.device, started=started)
    write_json(config.out, answer | {"provenance": made})
    for line in outside:
        console.print(line, style="red", highlight=False)
    return answer | {"out": str(config.out)}
