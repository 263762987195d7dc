"""The figures of a set of texts, against cases counted by hand."""

from __future__ import annotations

import pytest

from alpamayo_dflash.evaluate.hardness import BOUNDS, hardness, phrase_tree, violations, words_given
from alpamayo_dflash.world.language import END, split_words

STOP = "Stop for the red light."
KEEP = "Keep lane since the road is clear"


def figures(texts, pairs=(("a", "b"),), counts=None):
    return hardness(texts, counts or [len(split_words(text)) for text in texts], list(pairs))


def test_punctuation_marks_are_words_of_their_own():
    assert split_words("Slow down, requiring a stop-line gap.") == (
        *("Slow", "down", ",", "requiring", "a", "stop-line", "gap", "."),
    )


def test_phrase_tree_keeps_the_commonest_prefixes_and_their_ancestors():
    sentences = [("a", "b", "c"), ("a", "b", "d"), ("a", "b", "c"), ("x", "y")]
    assert phrase_tree(sentences, nodes=3) == {("a",), ("a", "b"), ("a", "b", "c")}
    tree = phrase_tree(sentences, nodes=4)
    assert len(tree) == 4
    assert all(prefix[:-1] in tree for prefix in tree if len(prefix) > 1)
    assert len(phrase_tree(sentences)) == 6


def test_words_given_stops_at_the_first_word_that_the_tree_lacks():
    tree = phrase_tree([("a", "b", END)])
    assert words_given(tree, ("a", "b", END)) == 3
    assert words_given(tree, ("a", "c", END)) == 1
    assert words_given(tree, ("b", END)) == 0
    assert words_given(tree, ("a", "b", "c", END)) == 2


def test_figures_counted_by_hand():
    # Even indices build the tree: STOP, STOP. Odd ones walk it: STOP (7 of 7 with the end mark) and
    # KEEP (0 of 8).
    result = figures(
        [STOP, STOP, STOP, KEEP], [("a", "a"), ("a", "b"), ("b", "a"), ("c", "c")], [7, 30, 29, 31]
    )
    assert result == {
        "distinct": 0.5,
        "top_ten": 1.0,
        "period": 0.75,
        "long": 0.5,
        "phrase_words": pytest.approx(7 / 15),
        "phrase_whole": 0.5,
        "differ": 0.5,
    }


def test_a_whole_text_needs_its_end_mark():
    given = figures([STOP, STOP[:-1]])
    assert given["phrase_whole"] == 0.0
    assert given["phrase_words"] == pytest.approx(5 / 6)


def test_top_ten_counts_ten_texts_and_no_more():
    texts = [f"text {index}" for index in range(20)]
    assert figures(texts)["top_ten"] == 0.5
    assert figures(texts)["distinct"] == 1.0


@pytest.mark.parametrize(
    ("texts", "counts", "pairs"),
    [([STOP], [7], [("a", "b")]), ([STOP, KEEP], [7, 8], []), ([STOP, KEEP], [7], [("a", "b")])],
)
def test_too_little_to_measure_is_refused(texts, counts, pairs):
    with pytest.raises(ValueError, match="need"):
        hardness(texts, counts, pairs)


def test_violations_name_figure_value_and_bounds():
    middle = {name: (low + high) / 2 for name, (low, high) in BOUNDS.items()}
    assert violations(middle) == []
    lines = violations({**middle, "top_ten": 0.5, "differ": 0.1})
    assert len(lines) == 2
    assert "top_ten is 0.500" in lines[0]
    assert "0.31" in lines[0]
    assert "0.43" in lines[0]
    assert lines[1].startswith("differ is 0.100")


def test_a_missing_figure_is_refused():
    with pytest.raises(ValueError, match="top_ten"):
        violations({name: 0.5 for name in BOUNDS if name != "top_ten"})
