"""The grammar of the world: read back exactly, softened exactly, and as hard to predict as real traces."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from alpamayo_dflash.evaluate.hardness import BOUNDS, hardness, violations
from alpamayo_dflash.world.facts import EVENT_SHARES, Event, Facts
from alpamayo_dflash.world.language import (
    all_facts,
    coc,
    coc_distribution,
    names,
    read,
    split_words,
    tempered,
    vocabulary_texts,
)

TEMPERATURE, TOP_P = 0.6, 0.98
FACTS = all_facts()


@pytest.fixture(scope="module")
def model():
    """What a model with a perfect grasp of the softened texts says when sampled: texts and odds by facts."""
    return {
        facts: tempered(coc_distribution(facts, soften=TEMPERATURE), 1 / TEMPERATURE, TOP_P)
        for facts in FACTS
    }


def draw_clips(model, rng, clips=1200):
    by_event = {event: [facts for facts in FACTS if facts.event == event] for event in Event}
    shares = np.array([EVENT_SHARES[event] for event in Event])
    for index in rng.choice(len(shares), size=clips, p=shares):
        facts = by_event[list(Event)[index]]
        odds = model[facts[rng.integers(len(facts))]]
        yield rng.choice(list(odds), size=2, p=np.array(list(odds.values())) / sum(odds.values()))


def test_all_facts_are_distinct_and_cover_the_events():
    assert len(set(FACTS)) == len(FACTS) == 51
    assert {facts.event for facts in FACTS} == set(Event)


@pytest.mark.parametrize("event", list(Event))
def test_every_text_is_read_back_exactly(event):
    for facts in FACTS:
        if facts.event == event:
            wrong = [text for text in coc_distribution(facts) if read(text) != (facts.manoeuvre, facts.cause)]
            assert wrong == []


def test_a_text_names_no_other_scene():
    for facts, other in itertools.permutations(FACTS, 2):
        if (facts.manoeuvre, facts.cause) != (other.manoeuvre, other.cause):
            text = max(coc_distribution(facts).items(), key=lambda item: item[1])[0]
            assert names(facts, text)
            assert not names(other, text)


def test_the_three_lead_vehicle_events_share_no_text():
    leads = [
        {text for facts in FACTS if facts.event == event for text in coc_distribution(facts)}
        for event in (Event.LEAD_STEADY, Event.LEAD_SLOWING, Event.LEAD_STOPPED)
    ]
    assert not (leads[0] & leads[1] or leads[0] & leads[2] or leads[1] & leads[2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stop due to red traffic light", ("stop", "red light")),
        ("Nudge right to pass the stationary van ahead.", ("nudge right", "stopped vehicle")),
        ("Slow down due to the lead box truck ahead decelerating", ("slow down", "lead vehicle")),
        ("Adapt speed for the right-hand curve ahead.", ("adapt speed", "right curve")),
        ("Yield to the pedestrian near the parked car", ("yield", "pedestrian")),
        ("Keep lane to follow the moon", ("keep lane", "")),
        ("Fly over the stop sign", ("", "stop sign")),
        ("Nudge to the", ("", "")),
        ("", ("", "")),
    ],
)
def test_texts_beyond_the_grammar_are_read_as_far_as_they_go(text, expected):
    assert read(text) == expected


def test_texts_are_one_clean_sentence():
    for facts in FACTS:
        for text in coc_distribution(facts):
            assert text == " ".join(text.split())
            assert text[0].isupper()
            assert not set(text) & set("<>{}|:")
            assert "." not in text[:-1]


def test_long_texts_are_far_from_the_limit_of_thirty():
    lengths = {len(split_words(text)) for facts in FACTS for text in coc_distribution(facts)}
    assert max(lengths) <= 48
    assert not lengths & set(range(24, 32))


def test_vocabulary_size():
    words = {
        word.lower() for facts in FACTS for text in coc_distribution(facts) for word in split_words(text)
    }
    assert 200 <= len(words) <= 320


@pytest.mark.parametrize("soften", [1.0, 0.6, 1.7])
def test_probabilities_add_up(soften):
    for facts in FACTS:
        odds = coc_distribution(facts, soften=soften)
        assert sum(odds.values()) == pytest.approx(1)
        assert odds.keys() == coc_distribution(facts).keys()


def test_tempering_acts_on_each_next_word():
    # First word: 0.8 to 0.2; after "a": 0.5 to 0.5, so the square leaves it, where the square of whole
    # texts would not leave 16:1 between the first words.
    result = tempered({"a b": 0.4, "a c": 0.4, "d": 0.2}, 2.0)
    assert result == pytest.approx({"a b": 8 / 17, "a c": 8 / 17, "d": 1 / 17})


def test_tempering_cuts_each_step_to_its_nucleus():
    assert tempered({"a": 0.6, "b": 0.3, "c": 0.1}, 1.0, 0.89) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert tempered({"a": 0.5, "b": 0.25, "c": 0.25}, 1.0, 0.7).keys() == {"a", "b", "c"}


def test_tempering_undoes_softening():
    for facts in FACTS[::7]:
        back = tempered(coc_distribution(facts, soften=0.6), 1 / 0.6)
        assert back == pytest.approx(coc_distribution(facts))


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_soften_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="exponent"):
        coc(FACTS[0], np.random.default_rng(0), soften=bad)


@pytest.mark.parametrize("soften", [1.0, 0.6])
def test_draws_follow_the_distribution(soften):
    facts = Facts(Event.CURVE, side="left")
    rng = np.random.default_rng(5)
    n = 20_000
    counts = Counter(coc(facts, rng, soften=soften) for _ in range(n))
    odds = coc_distribution(facts, soften=soften)
    assert counts.keys() <= odds.keys()
    for text, probability in odds.items():
        assert counts[text] == pytest.approx(n * probability, abs=5 * (n * probability) ** 0.5 + 1)


def test_draws_repeat_with_the_seed():
    facts = Facts(Event.PARKED_VEHICLE, side="right", actor="van")
    one, two = (
        [coc(facts, rng) for _ in range(20)] for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert one == two
    assert len(set(one)) > 1


def test_sides_and_actors_are_said():
    texts = coc_distribution(Facts(Event.PARKED_VEHICLE, side="right", actor="bus"))
    assert "Nudge left to pass the parked bus on the right" in texts
    assert not any("Nudge right" in text or "truck" in text for text in texts)


def test_a_perfect_model_lands_inside_all_bounds(model):
    results = []
    for seed in range(4):
        pairs = [tuple(pair) for pair in draw_clips(model, np.random.default_rng(seed))]
        texts = [one for one, _ in pairs]
        results.append(hardness(texts, [len(split_words(text)) for text in texts], pairs))
        assert violations(results[-1]) == []
    for name, (low, high) in BOUNDS.items():
        mean = float(np.mean([figures[name] for figures in results]))
        margin = 0.2 * (high - low)
        assert low + margin < mean < high - (0 if high == 1 else margin), name


def test_first_words_have_the_shares_of_real_traces(model):
    first = Counter(pair[0].split()[0] for pair in draw_clips(model, np.random.default_rng(0)))
    real = {"Keep": 0.34, "Stop": 0.22, "Nudge": 0.10, "Slow": 0.08, "Adapt": 0.07, "Accelerate": 0.06}
    for word, share in real.items():
        assert first[word] / first.total() == pytest.approx(share, abs=0.06)


def test_vocabulary_texts_show_every_word():
    texts = vocabulary_texts(20_000, seed=1)
    assert texts[:50] == vocabulary_texts(20_000, seed=1)[:50]
    shown = {word for text in texts for word in split_words(text)}
    assert shown == {
        word for facts in FACTS for text in coc_distribution(facts) for word in split_words(text)
    }
    with pytest.raises(ValueError, match="at least 1"):
        vocabulary_texts(0, seed=1)
