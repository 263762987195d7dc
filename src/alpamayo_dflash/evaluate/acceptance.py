"""What decoding with a proposer accepts, clip by clip, and intervals over clips.

A text is the same with any proposer, so two proposers over the same clips and seeds differ in passes alone,
and are compared clip by clip.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.common.bootstrap import PERCENTILES, drawn_clips
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.target.prompt import Prompt

COMPARED = ("prototype", "dflash")
"""Recipes that a study's others are compared with."""
PEERS = {
    "equal-steps": "speculators, equal steps",
    "equal-time": "speculators, equal time",
    "defaults": "speculators, defaults",
}
"""Drafts of another trainer that a study measures, by what they have in common with our recipes."""


@dataclass(frozen=True)
class ClipCounts:
    """Counts of decoding, by clip, over seeds.

    Attributes:
        tokens: emitted after the first.
        passes: verify passes.
    """

    tokens: tuple[int, ...]
    passes: tuple[int, ...]

    @property
    def length(self) -> float:
        """The acceptance length: tokens a pass, pooled over clips.

        Raises:
            ValueError: there was no pass.
        """
        if not sum(self.passes):
            raise ValueError(f"no pass on {len(self.passes)} clips: no text has a second token")
        return sum(self.tokens) / sum(self.passes)


def count_clips(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[tuple[Sampling, Sequence[int]]],
    *,
    asked: Callable[[Prompt, Sampling, int], None] = lambda *_: None,
) -> list[ClipCounts]:
    """Decode every prompt, one sample a seed, no trajectory.

    Args:
        decoder: with the proposer that is measured.
        prompts: a clip's each; each is read once.
        samplings: how to choose tokens, and with which seeds.
        asked: told of each decode before it begins.

    Returns:
        Counts for each of `samplings`.
    """
    tokens = [[0] * len(prompts) for _ in samplings]
    passes = [[0] * len(prompts) for _ in samplings]
    for clip, prompt in enumerate(prompts):
        read = decoder.prefill(prompt)
        for way, (sampling, seeds) in enumerate(samplings):
            for seed in seeds:
                asked(prompt, sampling, seed)
                result = decoder.generate(
                    read,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=seed,
                    trajectories=False,
                )
                tokens[way][clip] += result.emitted
                passes[way][clip] += result.passes
    return [ClipCounts(tuple(some), tuple(others)) for some, others in zip(tokens, passes, strict=True)]


def pooled(counts: Sequence[ClipCounts]) -> ClipCounts:
    """Several runs over the same clips as one."""
    tokens = zip(*(each.tokens for each in counts), strict=True)
    passes = zip(*(each.passes for each in counts), strict=True)
    return ClipCounts(tuple(map(sum, tokens)), tuple(map(sum, passes)))


def length_ratio(one: ClipCounts, other: ClipCounts, *, seed: int = 0) -> tuple[float, float, float]:
    """One acceptance length over another's on the same clips: the ratio, and a paired bootstrap's interval.

    Args:
        one: counts by clip.
        other: likewise, of the same clips in the same order, over any number of runs.
        seed: of the bootstrap.

    Returns:
        the ratio, and its 2.5th and 97.5th percentile where the clips are drawn anew (Efron 1979).

    Raises:
        ValueError: the two are of different numbers of clips.
    """
    if len(one.tokens) != len(other.tokens):
        raise ValueError(f"{len(one.tokens)} clips beside {len(other.tokens)}; they must be the same clips")
    drawn = drawn_clips(len(one.tokens), seed)
    ratios = _lengths(one, drawn) / _lengths(other, drawn)
    low, high = np.percentile(ratios, PERCENTILES)
    return one.length / other.length, float(low), float(high)


def _lengths(counts: ClipCounts, drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The acceptance length over each drawing of clips."""
    lengths: npt.NDArray[np.float64] = np.array(counts.tokens)[drawn].sum(1) / np.array(counts.passes)[
        drawn
    ].sum(1)
    return lengths


def study_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a study (`cli.study`) from its counts.

    Returns:
        by amount of data `best`, the recipe of ours with the least ms a CoC on validation clips (the most
        accepted where no benchmark gives ms), and `best_at_demo_steps` among those of the fewest steps. By
        recipe, on test clips and pooled over training seeds: acceptance length, its share of the ceiling,
        passes and ms a CoC, greedy acceptance, and the ratio to the prototype's recipe and to plain DFlash
        with intervals. `best_over_speculators`, where there are drafts of `PEERS`: by amount of data and by
        peer the acceptance length of the best recipe at the demo's steps over the peer's, with its interval.
        On all data also what `_best_figures` gives.
    """
    units = list(results["units"].values())
    found: dict[str, Any] = {}
    ceiling = results.get("ceilings")
    if ceiling is not None:
        found["ceilings"] = {
            name: round(sum(results["sampled_tokens"]) / sum(passes), 4) for name, passes in ceiling.items()
        }
    for data in dict.fromkeys(unit["data"] for unit in units):
        of_data = [unit for unit in units if unit["data"] == data]
        recipes = list(dict.fromkeys(unit["recipe"] for unit in of_data))
        rows = {
            recipe: _recipe_figures(results, [unit for unit in of_data if unit["recipe"] == recipe], of_data)
            for recipe in recipes
        }
        own = [recipe for recipe in recipes if recipe not in PEERS.values()]
        fewest = min((rows[recipe]["steps"] for recipe in own), default=0)
        best, soon = (
            min(some, key=lambda name: _cost(rows[name]), default=None)
            for some in (own, [recipe for recipe in own if rows[recipe]["steps"] == fewest])
        )
        found[data] = {"best": best, "best_at_demo_steps": soon, "recipes": rows}
        ratios = {} if soon is None else _over_peers(results, of_data, soon)
        if ratios:
            found.setdefault("best_over_speculators", {})[data] = ratios
        if best is not None and soon is not None and data == "all":
            found |= _best_figures(rows[best], rows[soon])
    return found


def _best_figures(best: Mapping[str, Any], soon: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of the best recipe on all data, and of the best at the demo's steps."""
    figures = {
        "ceiling_share_best": best.get("ceiling_share"),
        "ceiling_share_demo_steps": soon.get("ceiling_share"),
        "best_over_prototype": best.get("over_prototype"),
        "passes_per_coc": best["passes_per_coc"],
    }
    return {name: value for name, value in figures.items() if value is not None}


def _over_peers(
    results: Mapping[str, Any], units: Sequence[Mapping[str, Any]], best: str
) -> dict[str, list[float]]:
    """By peer, a recipe's acceptance length over the peer's: the ratio and its interval."""
    found = {}
    ours = _counts(results, [unit for unit in units if unit["recipe"] == best], "sampled")
    for name, recipe in PEERS.items():
        peers = [unit for unit in units if unit["recipe"] == recipe]
        if peers:
            ratio = length_ratio(ours, _counts(results, peers, "sampled"))
            found[name.replace("-", "_")] = [round(value, 4) for value in ratio]
    return found


def _cost(row: Mapping[str, Any]) -> tuple[float, float]:
    """What the best recipe has least of: ms a CoC on validation clips, or passes a token there."""
    return (row.get("validation_ms_per_coc", 0.0), -row["validation_acceptance_length"])


def _recipe_figures(
    results: Mapping[str, Any], units: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of one recipe's units; `others` are all units on the same data."""
    sampled, greedy = _counts(results, units, "sampled"), _counts(results, units, "greedy")
    texts = len(results["test_clips"]) * results["decoding_seeds"] * len(units)
    validation = [unit["validation"] for unit in units]
    tokens, passes = (sum(each[key] for each in validation) for key in ("tokens", "passes"))
    validated = len(results["validation_clips"]) * results["validation_seeds"] * len(units)
    row: dict[str, Any] = {
        "seeds": len(units),
        "steps": units[0]["steps"],
        "train_s": round(sum(unit["train_s"] for unit in units) / len(units), 1),
        "acceptance_length": round(sampled.length, 4),
        "by_seed": [round(_counts(results, [unit], "sampled").length, 4) for unit in units],
        "greedy_acceptance_length": round(greedy.length, 4),
        "passes_per_coc": round(sum(sampled.passes) / texts, 4),
        "validation_acceptance_length": round(tokens / passes, 4),
    }
    if "ceilings" in results:
        ceiling = sum(results["sampled_tokens"]) / sum(results["ceilings"]["text"])
        row["ceiling_share"] = round(sampled.length / ceiling, 4)
    if "bench_raw" in results:
        head = units[0]["options"].get("previous_head") or "no"
        pass_ms = _pass_ms(results["bench_raw"], results["round_rows"], head)
        row["pass_ms"] = round(pass_ms, 4)
        row["ms_per_coc"] = round(pass_ms * row["passes_per_coc"], 4)
        row["validation_ms_per_coc"] = round(pass_ms * passes / validated, 4)
    for name in COMPARED:
        reference = [unit for unit in others if unit["recipe"] == name]
        if reference:
            ratio = length_ratio(sampled, _counts(results, reference, "sampled"))
            row[f"over_{name}"] = [round(value, 4) for value in ratio]
    return row


def _counts(results: Mapping[str, Any], units: Sequence[Mapping[str, Any]], mode: str) -> ClipCounts:
    """Counts on test clips, pooled over units."""
    tokens = tuple(results[f"{mode}_tokens"])
    return pooled([ClipCounts(tokens, tuple(unit[f"{mode}_passes"])) for unit in units])


def _pass_ms(raw: Mapping[str, Any], rows: int, head: str) -> float:
    """A round at R1's size: the verify pass of its rows, and the draft's forward with its picks."""
    verify, picks = raw["verify_ms"][str(rows)], raw["picks_ms"][head]
    return float(statistics.median(verify) + statistics.median(picks))
