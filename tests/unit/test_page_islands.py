"""Foreign values in a page end no markup, and hide no character."""

import json

import pytest

from alpamayo_dflash.report.page.islands import island, visible
from alpamayo_dflash.report.page.palette import OTHER_LOOK, SOURCE_LOOKS, look_of

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "a & b ]]> \"'`",
    "\u2028\u2029\ufeff",
    "\ud800 alone",
    "עצור \u202e",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_an_island_reads_back_and_holds_no_sign_of_markup(text):
    written = island({"text": text, text: [text]})
    assert json.loads(written) == {"text": text, text: [text]}
    assert written.isascii()
    assert not set("<>&") & set(written)


def test_an_island_refuses_what_json_has_no_word_for():
    with pytest.raises(ValueError, match="not JSON compliant"):
        island([float("nan")])


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain ü עצור 停", "plain ü עצור 停"),
        ("a\0b\x1b[31m\n\x7f\x9b", "a␀b␛[31m␊␡\\u009b"),
        ("\u202eabc\u2066\u200f", "\\u202eabc\\u2066\\u200f"),
        ("\ud800\U000e0001", "\\ud800\\U000e0001"),
    ],
)
def test_every_character_is_seen(text, seen):
    assert visible(text) == seen
    assert visible(seen) == seen


def test_sources_differ_in_more_than_colour():
    looks = [*SOURCE_LOOKS.values(), OTHER_LOOK]
    for parts in zip(*looks, strict=True):
        assert len(set(parts)) == len(looks)
    assert look_of("a proposer's own word") is OTHER_LOOK
