"""The words for a scene: a small grammar of Chain-of-Causation texts, and the reader that undoes it.

A text is *action* + optional *manner or target* + *cause*, in the shape of real Alpamayo traces: a few
formulaic wordings carry most of the mass, and a long tail of rarer ones, a few of them very long, makes
most of the distinct texts. The grammar of one scene's facts is finite, so its distribution is worked out
whole, as a tree of words. That is what makes `soften` exact: a language model trained on these texts and
sampled at temperature T raises each next-word probability to the power 1/T, so texts drawn with
`soften=T` come back from it with the grammar's own frequencies.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.common.manoeuvres import manoeuvre_of
from alpamayo_dflash.common.options import check_positive, generator_seed
from alpamayo_dflash.world.facts import (
    EVENT_SHARES,
    OTHER_SIDE,
    PERSONS,
    SIDED,
    VEHICLES,
    WITH_PERSON,
    WITH_VEHICLE,
    Event,
    Facts,
)
from alpamayo_dflash.world.grammar import GRAMMAR


def all_facts() -> list[Facts]:
    """Every combination of facts that there is, in a fixed order."""
    return [
        Facts(event=event, side=side, actor=actor)
        for event in Event
        for side in (("left", "right") if event in SIDED else ("",))
        for actor in (VEHICLES if event in WITH_VEHICLE else PERSONS if event in WITH_PERSON else ("",))
    ]


_CHOICE = re.compile(r"<([^<>]*)>")


def _expand(template: str) -> Iterator[tuple[str, float]]:
    """Each text that a template stands for, with its probability."""
    choice = _CHOICE.search(template)
    if choice is None:
        yield template, 1.0
        return
    alternatives = [part.partition(":") for part in choice[1].split("|")]
    weights = [float(weight or 1) for _, _, weight in alternatives]
    for (text, _, _), weight in zip(alternatives, weights, strict=True):
        for rest, probability in _expand(template[choice.end() :]):
            yield template[: choice.start()] + text + rest, probability * weight / sum(weights)


def tempered(texts: Mapping[str, float], exponent: float, top_p: float = 1.0) -> dict[str, float]:
    """Raise every next-word probability of a distribution over texts to a power.

    This is what sampling at temperature 1 / exponent does to a language model that has learnt the
    distribution perfectly, with words for tokens.

    Args:
        texts: probability of each text.
        exponent: above 0; less than 1 flattens, more sharpens.
        top_p: keep at each word only the nucleus: the words for which the mass of strictly more probable
            ones is below this.

    Returns:
        Probabilities of the texts that remain, adding up to 1.

    Raises:
        ValueError: exponent or top_p out of range.
    """
    if not exponent > 0 or not 0 < top_p <= 1:
        raise ValueError(f"exponent {exponent} must be above 0 and top_p {top_p} in (0, 1]")
    sentences = {text: (*split_words(text), END) for text in texts}
    masses: defaultdict[tuple[str, ...], defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for text, words in sentences.items():
        for end, word in enumerate(words):
            masses[words[:end]][word] += texts[text]
    steps = {prefix: _temper_step(nexts, exponent, top_p) for prefix, nexts in masses.items()}
    result = {}
    for text, words in sentences.items():
        probability = 1.0
        for end, word in enumerate(words):
            probability *= steps[words[:end]].get(word, 0.0)
        if probability > 0:
            result[text] = probability
    return result


def _temper_step(masses: Mapping[str, float], exponent: float, top_p: float) -> dict[str, float]:
    """Temper the next-word distribution at one prefix and cut it to its nucleus."""
    total = sum(masses.values())
    powers = {word: (mass / total) ** exponent for word, mass in masses.items()}
    total = sum(powers.values())
    kept = {
        word: power
        for word, power in powers.items()
        if sum(other for other in powers.values() if other > power) < top_p * total
    }
    total = sum(kept.values())
    return {word: power / total for word, power in kept.items()}


@lru_cache(maxsize=256)
def _table(facts: Facts, soften: float) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
    """The texts of some facts and their probabilities, softened."""
    wordings = GRAMMAR[facts.event]
    words = {"actor": facts.actor, "side": facts.side, "other": OTHER_SIDE[facts.side]}
    total = sum(wording.weight for wording in wordings)
    texts: defaultdict[str, float] = defaultdict(float)
    for weight, period, template in wordings:
        for text, probability in _expand(template.format(**words)):
            texts[text + "."] += weight / total * probability * period
            texts[text] += weight / total * probability * (1 - period)
    softened = texts if soften == 1.0 else tempered(texts, soften)
    return tuple(softened), np.fromiter(softened.values(), dtype=np.float64)


def coc_distribution(facts: Facts, *, soften: float = 1.0) -> dict[str, float]:
    """Every text that the grammar has for some facts, with its probability.

    Args:
        facts: of the scene.
        soften: exponent of each next-word probability, see `coc`.

    Returns:
        Probabilities that add up to 1.

    Raises:
        ValueError: soften is not above 0.
    """
    texts, probabilities = _table(facts, soften)
    return dict(zip(texts, probabilities.tolist(), strict=True))


def coc(facts: Facts, rng: np.random.Generator, *, soften: float = 1.0) -> str:
    """Draw one Chain-of-Causation for a scene.

    Args:
        facts: of the scene.
        rng: where the draw comes from; one uniform number is taken.
        soften: exponent of each next-word probability. 1 draws from the grammar; a model that shall follow
            the grammar when sampled at temperature T is trained on texts drawn with `soften=T`.

    Returns:
        One sentence, with or without a period.

    Raises:
        ValueError: soften is not above 0.
    """
    texts, probabilities = _table(facts, soften)
    return texts[min(int(np.searchsorted(np.cumsum(probabilities), rng.random(), "right")), len(texts) - 1)]


def vocabulary_texts(n: int, seed: int) -> list[str]:
    """Texts to train a tokenizer on: facts drawn at their shares, softened to show rare words too.

    Args:
        n: how many, at least 1.
        seed: of the draw.

    Raises:
        ValueError: n is below 1.
    """
    check_positive(n=n)
    rng = np.random.default_rng(generator_seed(seed))
    by_event: dict[Event, list[Facts]] = {event: [] for event in Event}
    for facts in all_facts():
        by_event[facts.event].append(facts)
    events = list(EVENT_SHARES)
    shares = np.array([EVENT_SHARES[event] for event in events])
    drawn = rng.choice(len(events), size=n, p=shares / shares.sum())
    choices = [by_event[events[index]] for index in drawn]
    return [coc(facts[int(rng.integers(len(facts)))], rng, soften=0.6) for facts in choices]


_VEHICLE = "(?:vehicle|" + "|".join(VEHICLES) + ")"
# The cause is the first thing named that can be one; ties go to the earlier pattern.
_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), cause)
    for pattern, cause in (
        (r"\bcut-in\b", "cut-in vehicle"),
        (rf"\b{_VEHICLE} (?:that is )?(?:cutting in|(?:merging|moving) into)\b", "cut-in vehicle"),
        (rf"\blead(?:ing)? (?:\w+ )?{_VEHICLE}\b", "lead vehicle"),
        (rf"\b(?:braking|slowing|decelerating) {_VEHICLE}\b", "lead vehicle"),
        (rf"\bparked {_VEHICLE}\b", "parked vehicle"),
        (rf"\b(?:stopped|stationary) {_VEHICLE}\b", "stopped vehicle"),
        (rf"\b{_VEHICLE} (?:that is )?(?:stopped|stationary|blocking)\b", "stopped vehicle"),
        (r"\bred (?:straight )?(?:traffic light|light|signal)\b", "red light"),
        (r"\b(?:light|signal)\b[^,.]{0,40}\bred\b", "red light"),
        (r"\bgreen (?:straight )?(?:traffic light|light|signal)\b", "green light"),
        (r"\b(?:light|signal)\b[^,.]{0,40}\bgreen\b", "green light"),
        (r"\bstop sign\b", "stop sign"),
        (r"\bcones?\b", "cones"),
        (r"\bpedestrians?\b", "pedestrian"),
        (r"\bcyclists?\b", "cyclist"),
        (r"\b(?:lane|road|way)(?: ahead)? is (?:clear|free|open)\b", "clear road"),
        (r"\bno (?:critical agent|vehicle|obstacle)\b|\bnothing needs\b", "clear road"),
    )
)
_SIDED_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(left|right)(?:-hand)? (?:curve|bend)\b"), "curve"),
    (re.compile(r"\b(?:bends?|curves?) (?:sharply )?(?:to the )?(left|right)\b"), "curve"),
)


def read(text: str) -> tuple[str, str]:
    """Read a text back into the canonical phrases of `Facts.manoeuvre` and `Facts.cause`.

    Every text of the grammar is read exactly; others as far as their parts are recognised, so that what
    a model writes can be scored.

    Returns:
        Manoeuvre and cause; "" for one that is not recognised.
    """
    return manoeuvre_of(text), _read_cause(" ".join(text.lower().split()))


def _read_cause(text: str) -> str:
    """The first cause that a lower-case text names."""
    found = [(match.start(), name) for pattern, name in _CAUSES if (match := pattern.search(text))]
    found += [
        (match.start(), f"{match[1]} {name}")
        for pattern, name in _SIDED_CAUSES
        if (match := pattern.search(text))
    ]
    return min(found, key=lambda item: item[0])[1] if found else ""


def names(facts: Facts, text: str) -> bool:
    """Whether a text names both the manoeuvre and the cause of a scene."""
    return read(text) == (facts.manoeuvre, facts.cause)


END = "\n"  # closes a text's words; no word of a text can equal it

_WORD = re.compile(r"[\w'’‑/-]+|[^\w\s]")


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, each punctuation mark a word of its own, without the end mark."""
    return tuple(_WORD.findall(text))
