"""How hard a set of Chain-of-Causation texts is to predict: the figures that the synthetic world must match.

The figures and the phrase tree are those of the survey of real traces that the world imitates: one sampled
text per clip, a tree of the prefixes of one half of the texts, walked by the other half. Words stand in for
tokens there: a word is a run of letters, digits, hyphens, slashes and apostrophes; **each punctuation mark,
the final period included, is a word of its own**, and an end mark closes every text. Split like that, the
public half of the survey's traces has 13.5 words a text with the end mark (13.7 are stated for all of them;
with the period attached it would be 12.8). A tree of 256 nodes on one half of those gives 9.0 words and
half of the texts whole; stated are 9.5 and 54%, from a tree built on twice as many.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from alpamayo_dflash.clips.lists import chosen_clips
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.artefacts import provenance, write_record
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.evaluate.config import MeasureWorldConfig
from alpamayo_dflash.target.alpamayo import open_target
from alpamayo_dflash.world.events import sample_scene
from alpamayo_dflash.world.language import END, split_words
from alpamayo_dflash.world.render import window
from alpamayo_dflash.world.scene import scene_seed

LONG_TOKENS = 30
TREE_NODES = 256
TOP_TEXTS = 10
BOUNDS: dict[str, tuple[float, float]] = {
    "distinct": (0.24, 0.34),
    "top_ten": (0.31, 0.43),
    "period": (0.63, 0.74),
    "long": (0.03, 0.06),
    "phrase_words": (0.55, 0.75),
    "phrase_whole": (0.45, 0.62),
    "differ": (0.35, 1.0),
}
"""Least and greatest value of each figure for a world as hard as the real one, over 1,200 clips."""
_SAMPLES = 2


def run(config: MeasureWorldConfig) -> dict[str, Any]:
    """Sample two CoCs a clip, measure them, write the figures; `passed` says whether all lie in their bounds.

    Raises:
        ValueError: the target or the clips are missing.
    """
    started = time.time()
    target, identity = open_target(
        config.alpamayo_model, device=config.device, dtype="float32", format_=config.target_format
    )
    decoder = SpeculativeDecoder(target)
    responses: list[list[tuple[str, int]]] = []
    console = Console(file=sys.stderr)
    for each in track(windows(config), "rollouts", total=config.num_samples, console=console):
        result = decoder.generate(
            each,
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
        "target_weights": target.weight_formats,
    }
    parents = {"target": identity.hash}
    made = provenance(config, started, parents)
    write_record(config.out, answer | {"provenance": made})
    for line in outside:
        console.print(line, style="red", highlight=False)
    return answer | {"out": str(config.out)}


def windows(config: MeasureWorldConfig) -> Iterator[Window]:
    """The windows to measure on: of a written world's clips, or of scenes drawn in memory."""
    if config.cache_dir is None:
        for index in range(config.num_samples):
            yield window(sample_scene(scene_seed(config.world_seed, 0, index)))
        return
    source = ClipSource(config.cache_dir)
    for clip_id in chosen_clips(source, chunks=config.chunks, count=config.num_samples):
        yield source.window(clip_id)


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
    figures = hardness([text for text, _ in firsts], [tokens for _, tokens in firsts], pairs)
    return {name: round(value, 4) for name, value in figures.items()}


def coc_tokens(token_ids: Sequence[int], cot_end: int) -> int:
    """Tokens of a CoC, the end marks left out."""
    return token_ids.index(cot_end) if cot_end in token_ids else len(token_ids)


def hardness(
    texts: Sequence[str], token_counts: Sequence[int], pairs: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Measure one sampled text for each of many clips.

    The phrase tree is built on the texts at even indices and walked by those at odd ones.

    Args:
        texts: one sampled Chain-of-Causation per clip, at least two.
        token_counts: tokens of each text under the target's tokenizer.
        pairs: two independent samples of the same clip, one pair a clip, at least one.

    Returns:
        All as shares of 1: `distinct` texts over all; `top_ten`, the share of the ten commonest texts;
        `period`, texts that end in one; `long`, texts of 30 tokens or more; `phrase_words`, words (end marks
        included) that a phrase tree of 256 nodes gives; `phrase_whole`, texts that it gives to the end mark;
        `differ`, pairs whose two texts differ.

    Raises:
        ValueError: too few texts or pairs, or not one token count for each text.
    """
    if len(texts) < 2 or not pairs:
        raise ValueError(f"got {len(texts)} texts and {len(pairs)} pairs; need at least 2 texts and 1 pair")
    if len(token_counts) != len(texts):
        raise ValueError(f"got {len(token_counts)} token counts for {len(texts)} texts; need one for each")
    counts = Counter(texts)
    sentences = [(*split_words(text), END) for text in texts]
    tree = phrase_tree(sentences[0::2])
    walked = sentences[1::2]
    given = [words_given(tree, sentence) for sentence in walked]
    whole = sum(got == len(sentence) for got, sentence in zip(given, walked, strict=True))
    return {
        "distinct": len(counts) / len(texts),
        "top_ten": sum(count for _, count in counts.most_common(TOP_TEXTS)) / len(texts),
        "period": sum(text.rstrip().endswith(".") for text in texts) / len(texts),
        "long": sum(count >= LONG_TOKENS for count in token_counts) / len(texts),
        "phrase_words": sum(given) / sum(map(len, walked)),
        "phrase_whole": whole / len(walked),
        "differ": sum(one != other for one, other in pairs) / len(pairs),
    }


def phrase_tree(sentences: Iterable[Sequence[str]], nodes: int = TREE_NODES) -> frozenset[tuple[str, ...]]:
    """The commonest prefixes of some sentences.

    Args:
        sentences: words of each sentence, end mark included where it shall be part of the tree.
        nodes: how many prefixes to keep; the empty prefix, the root, is not counted.

    Returns:
        Prefixes, closed under ancestors: a prefix is passed by at least as many sentences as any that
        continues it, and where the counts are equal the shorter one is kept first.
    """
    counts = Counter(tuple(s[:end]) for s in sentences for end in range(1, len(s) + 1))
    kept = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix), prefix))[:nodes]
    return frozenset(kept)


def words_given(tree: frozenset[tuple[str, ...]], sentence: Sequence[str]) -> int:
    """How many words of a sentence the tree gives, walked from its root."""
    given = 0
    while given < len(sentence) and tuple(sentence[: given + 1]) in tree:
        given += 1
    return given


def violations(figures: Mapping[str, float]) -> list[str]:
    """Name every figure that lies outside its bounds.

    Args:
        figures: as `hardness` returns them.

    Returns:
        One line for each, with the figure's name, its value and its bounds; empty where all is well.

    Raises:
        ValueError: a figure is missing.
    """
    missing = sorted(BOUNDS.keys() - figures.keys())
    if missing:
        raise ValueError(f"figures lack {', '.join(missing)}; `hardness` gives them all")
    return [
        f"{name} is {figures[name]:.3f}, should be between {low:.2f} and {high:.2f}"
        for name, (low, high) in BOUNDS.items()
        if not low <= figures[name] <= high
    ]
