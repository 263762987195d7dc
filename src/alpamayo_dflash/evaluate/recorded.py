"""The texts that an evaluation's rows keep, and whether what a row says of them agrees with itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alpamayo_dflash.common.fields import checked, value_of
from alpamayo_dflash.evaluate.rows import ClipRow
from alpamayo_dflash.report.clip_trace import RoundRow

_NUMBERS = ("position", "anchor")
_LISTS = ("proposed", "parents", "taken", "emitted")


def read_rows(result: Mapping[str, Any], where: str) -> list[ClipRow]:
    """The clips' rows of an evaluation's JSON object.

    Raises:
        ValueError: they are no objects with clip ids.
    """
    rows = value_of(result, "clip_rows", list, where=where)
    for row in rows:
        value_of(checked(row, dict, f"{where}: clip_rows"), "clip_id", str, where=where)
    return rows


def is_recorded(row: Mapping[str, Any], where: str) -> bool:
    """Whether a row keeps the ids of its texts; those of older versions may not.

    Raises:
        ValueError: its rounds are no list; `where`, the row's file, is named.
    """
    return "rounds" in row and ("first_tokens" in row or all(value_of(row, "rounds", list, where=where)))


def recorded_texts(row: Mapping[str, Any], samples: int, where: str) -> list[list[int]]:
    """The token ids of a row's texts, by sample: the first token and what the rounds emitted.

    Args:
        row: of an evaluation's JSON, with what `is_recorded` asks for.
        samples: how many texts there must be.
        where: names the row in messages.

    Raises:
        ValueError: a part of the row has another shape or kind.
    """
    rounds = value_of(row, "rounds", list, where=where)
    for sample in rounds:
        for each in checked(sample, list, f"{where}: rounds"):
            _check_round(checked(each, dict, f"{where}: rounds"), where)
    firsts = row.get("first_tokens")
    if firsts is None:
        firsts = [sample[0]["anchor"] for sample in rounds]
    coc = value_of(row, "coc", list, where=where)
    for name, found, kind in (("rounds", rounds, list), ("first_tokens", firsts, int), ("coc", coc, str)):
        if len(checked(found, list, f"{where}: {name}")) != samples:
            raise ValueError(f"{where}: {name} has {len(found)} samples; the evaluation has {samples}")
        for each in found:
            checked(each, kind, f"{where}: {name}")
    return [
        [first, *(token for each in sample for token in each["emitted"])]
        for first, sample in zip(firsts, rounds, strict=True)
    ]


def _check_round(each: Mapping[str, Any], where: str) -> None:
    for name in _NUMBERS:
        value_of(each, name, int, where=where)
    for name in _LISTS:
        for number in value_of(each, name, list, where=where):
            checked(number, int, f"{where}: {name}")


def round_of(rounds: Sequence[RoundRow], position: int) -> int | None:
    """Which round emitted the token at a position, or was the last before it; None for the first token."""
    if position == 0 or not rounds:
        return None
    emitted = 1
    for number, each in enumerate(rounds):
        emitted += len(each["emitted"])
        if position < emitted:
            return number
    return len(rounds) - 1


def contradiction(first: int, rounds: Sequence[RoundRow]) -> tuple[int, str] | None:
    """Where a sample's rounds contradict each other: the round and in what, or None.

    Args:
        first: the sample's first token.
        rounds: of the sample, in order.
    """
    last, position = first, 0
    for number, each in enumerate(rounds):
        proposed, taken, emitted = each["proposed"], each["taken"], each["emitted"]
        if (each["anchor"], each["position"]) != (last, position):
            found = f"token {each['anchor']} at {each['position']}"
            return number, f"its anchor is {found}; the text so far ends in {last} at {position}"
        if not emitted:
            return number, "it emitted nothing"
        if any(not 0 <= node < len(proposed) for node in taken):
            return number, f"it took nodes {taken} of {len(proposed)} that were proposed"
        if [proposed[node] for node in taken] != emitted[: len(taken)]:
            return number, f"it took nodes {taken}, which are not the tokens that it emitted first"
        last, position = emitted[-1], position + len(emitted)
    return None


def end_of(text: Sequence[int], stops: Sequence[int | None], limit: int) -> int | None:
    """How many tokens of a text the loop may have written before it stops; None if it would go on."""
    stop = next((index + 1 for index, token in enumerate(text[:limit]) if token in stops), None)
    return stop or (limit if len(text) >= limit else None)
