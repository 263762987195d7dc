"""`--audit N`: are the texts that an evaluation's rows keep what the target writes by itself?

The target decodes N clips again, one token a pass and without proposals, and the stored texts are held to
what it writes. In float32, and at one row width, they must be equal. In bfloat16 at different widths a text
may part at near-ties (`near_ties`); after its first one the stored text is run through the target, and each
of its tokens must be a choice that logits off by the largest difference can make.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from rich.console import Console
from rich.progress import track

from alpamayo_dflash.clips.source import ClipSource, failure_kind
from alpamayo_dflash.common.artefacts import provenance, write_record
from alpamayo_dflash.common.fields import value_of
from alpamayo_dflash.evaluate.arms import CLIP_ERRORS, Arms
from alpamayo_dflash.evaluate.near_ties import BothWays, Loop, parting
from alpamayo_dflash.evaluate.recorded import (
    contradiction,
    end_of,
    is_recorded,
    read_rows,
    recorded_texts,
    round_of,
)
from alpamayo_dflash.evaluate.rows import ClipRow, Failure
from alpamayo_dflash.evaluate.trace import piece_of
from alpamayo_dflash.report.clip_trace import RoundRow
from alpamayo_dflash.report.evaluation import read_evaluation
from alpamayo_dflash.target.prompt import Prompt

Verdict = Literal["equal", "near_ties"]


class Place(TypedDict):
    """One of the two tokens at a place where texts differ; null where the text has ended, or is no token.

    `logit` is the one of the autoregressive passes, `wide_logit` of passes as the speculative loop has them.
    `score` and `wide_score` are these tempered and with the place's noise; null where greedy, or masked.
    """

    token: int | None
    piece: str | None
    logit: float | None
    wide_logit: float | None
    score: float | None
    wide_score: float | None


class Difference(TypedDict):
    """What is wrong with a stored text; `message` says it whole.

    `kind`: "token" (the target does not write it), "round" (its rounds contradict each other) or "coc" (its
    characters are not those of its tokens). `round` is the one that emitted the place's token, if any.
    """

    clip_id: str
    sample: int
    kind: Literal["token", "round", "coc"]
    message: str
    position: NotRequired[int]
    stored: NotRequired[Place]
    own: NotRequired[Place]
    largest_difference: NotRequired[float]
    round_index: NotRequired[int | None]
    round: NotRequired[RoundRow | None]


def audit(path: Path, arms: Arms, source: ClipSource, parents: Mapping[str, str], console: Console) -> None:
    """Audit a written evaluation; the outcome becomes `audit` in its file, and is told.

    Args:
        path: the evaluation's JSON file.
        arms: over the evaluation's target and draft; their config says how many clips.
        source: of the clips.
        parents: hashes of target and draft.
        console: for progress and what was found.

    Raises:
        ValueError: the rows do not keep the ids of their texts, or are damaged; the file stays as it is.
    """
    started, config = time.time(), arms.config
    result = read_evaluation(path, rounds=False)
    value_of(result, "provenance", dict, where=str(path))
    rows = drawn(read_rows(result, str(path)), config.audit, config.seed)
    old = sum(not is_recorded(row, str(path)) for row in rows)
    if old:
        raise ValueError(
            f"{path}: {old} of the {len(rows)} clips to audit keep no token ids, as an older version wrote "
            "them; evaluate again into another --output-dir"
        )
    samples = config.num_traj_samples
    texts = [recorded_texts(row, samples, f"{path}: clip {row['clip_id']}") for row in rows]
    found = _audit_rows(arms, source, rows, texts, console)
    found |= {"asked": config.audit, "provenance": provenance(config, started, parents)}
    write_record(path, result | {"audit": found})
    _tell(found, result["provenance"], console)


def drawn(rows: Sequence[ClipRow], count: int, seed: int) -> list[ClipRow]:
    """So many rows at random: those first by the hash of seed and clip id, the same on any machine."""

    def place(row: ClipRow) -> str:
        return hashlib.sha256(json.dumps([int(seed), row["clip_id"]]).encode()).hexdigest()

    return sorted(rows, key=place)[:count]


def _audit_rows(
    arms: Arms,
    source: ClipSource,
    rows: Sequence[ClipRow],
    texts: Sequence[list[list[int]]],
    console: Console,
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    differences: list[Difference] = []
    failures: list[Failure] = []
    parts = zip(rows, texts, strict=True)
    for row, stored in track(parts, "audit", total=len(rows), console=console):
        try:
            prompt = arms.target.prompt(source.window(row["clip_id"], arms.config.t0_us))
            clip = _Clip(arms, prompt, row, stored)
            verdicts = [clip.judge(sample) for sample in range(len(stored))]
        except CLIP_ERRORS as error:
            kind = failure_kind(error)
            failures.append({"clip_id": row["clip_id"], "error": str(error), "kind": kind})
            continue
        counts.update(verdict for verdict in verdicts if isinstance(verdict, str))
        differences += [verdict for verdict in verdicts if not isinstance(verdict, str)]
    return {
        "clips": len(rows) - len(failures),
        "texts": counts.total() + len(differences),
        "equal": counts["equal"],
        "near_ties": counts["near_ties"],
        "differences": differences,
        "failures": failures,
        "passed": not differences and not failures,
    }


def _tell(found: Mapping[str, Any], made: Mapping[str, Any], console: Console) -> None:
    """Say what must not be missed: fewer clips than were asked for, what failed, the first difference."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    differences, failures = found["differences"], found["failures"]
    there = found["clips"] + len(failures)
    if there < found["asked"]:
        say(f"audit: {found['asked']} clips were asked for; there are {there}, and all were taken")
    for each in failures:
        say(f"audit: clip {each['clip_id']} could not be decoded again: {each['error']}", "red")
    if differences:
        say(f"audit: {len(differences)} of {found['texts']} stored texts failed. The first:", "red")
        say(f"audit: {differences[0]['message']}", "red")
    if differences and (other := _other_machine(made, found["provenance"])):
        say(f"audit: the rows were made on {other}; other machines and versions round differently", "red")


def _other_machine(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What the rows were made on, if the audit ran on something else; else nothing."""
    both = [(each["device"], each["versions"].get("torch")) for each in (made, now)]
    return "" if both[0] == both[1] else f"{both[0][0]} with torch {both[0][1]}"


class _Clip:
    """One clip's stored texts beside what the target writes by itself.

    Args:
        arms: over the evaluation's target and draft.
        prompt: of the clip.
        row: of the clip.
        stored: ids of its texts, by sample.
    """

    def __init__(self, arms: Arms, prompt: Prompt, row: ClipRow, stored: Sequence[list[int]]) -> None:
        self._arms, self._prompt, self._row, self._stored = arms, prompt, row, stored
        arms.read("autoregressive", prompt)
        self._own = arms.again("autoregressive", prompt, arms.config.sampling).token_ids
        self._wide_has_read = False

    def judge(self, sample: int) -> Verdict | Difference:
        """Whether a stored text is the target's own."""
        own, stored = self._own[sample], self._stored[sample]
        parted = _first_difference(own, stored)
        wrong = None if parted is None else self._wrong_place(sample, parted)
        if wrong is not None:
            return self._difference(sample, wrong, at_parting=wrong == parted)
        return self._damage(sample) or ("equal" if parted is None else "near_ties")

    @torch.inference_mode()
    def _wrong_place(self, sample: int, parted: int) -> int | None:
        """The first place of a stored text, from where it parts on, that the target cannot have written."""
        config, stored = self._arms.config, self._stored[sample]
        unknown = next((at for at, token in enumerate(stored) if not self._is_token(token)), len(stored))
        if self._arms.target.dtype == torch.float32 or config.row_width is not None or unknown <= parted:
            return parted
        end = self._end(stored[:unknown])
        known = stored[: end or unknown]
        loops = self._loops(self._own[sample], known)
        if not parting(*loops, sampling=config.sampling, seed=config.seed, sample=sample).near_tie:
            return parted
        ways = self._ways(sample, known[:-1])
        for place in range(parted + 1, len(known)):
            if known[place] != ways.chosen(place) and not bool(ways.possible(place)[known[place]]):
                return place
        return None if end == len(stored) else len(known)

    def _end(self, text: Sequence[int]) -> int | None:
        return end_of(text, self._arms.target.special.stops, self._arms.config.max_tokens)

    def _is_token(self, token: int) -> bool:
        return 0 <= token < self._arms.target.vocab_size

    def _loops(self, own: Sequence[int], stored: Sequence[int]) -> tuple[Loop, Loop]:
        if not self._wide_has_read:
            self._arms.read("dflash", self._prompt)
            self._wide_has_read = True
        return self._arms.loops(own, stored)

    def _ways(self, sample: int, text: Sequence[int]) -> BothWays:
        config = self._arms.config
        loops = self._loops(text, text)
        ways = BothWays(*loops, text, sampling=config.sampling, seed=config.seed, sample=sample)
        if not math.isfinite(ways.largest_difference):
            raise ValueError("the target's logits are not finite on the stored text, in one kind of pass")
        return ways

    @torch.inference_mode()
    def _difference(self, sample: int, place: int, *, at_parting: bool) -> Difference:
        """All that is known of a token that the target has not written."""
        own, stored = self._own[sample], self._stored[sample]
        ways = self._ways(sample, stored[:place])
        if at_parting:
            expected = own[place] if place < len(own) else None
        else:
            expected = None if self._end(stored[:place]) else ways.chosen(place)
        found = stored[place] if place < len(stored) else None
        rounds = self._row["rounds"][sample]
        number = round_of(rounds, place)
        difference: Difference = {
            "clip_id": self._row["clip_id"],
            "sample": sample,
            "kind": "token",
            "message": "",
            "position": place,
            "stored": self._place(ways, place, found),
            "own": self._place(ways, place, expected),
            "largest_difference": ways.largest_difference,
            "round_index": number,
            "round": None if number is None else rounds[number],
        }
        difference["message"] = _message(difference)
        return difference

    def _place(self, ways: BothWays, place: int, token: int | None) -> Place:
        if token is None or not self._is_token(token):
            return Place(token=token, piece=None, logit=None, wide_logit=None, score=None, wide_score=None)
        greedy = self._arms.config.sampling.greedy
        scores = (None, None) if greedy else [_number(each[token]) for each in ways.perturbed(place)]
        return {
            "token": token,
            "piece": piece_of(self._arms.target.tokenizer)(token),
            "logit": _number(ways.narrow_TV[place, token]),
            "wide_logit": _number(ways.wide_TV[place, token]),
            "score": scores[0],
            "wide_score": scores[1],
        }

    def _damage(self, sample: int) -> Difference | None:
        """What a row says beside its tokens that does not fit them, if anything."""
        stored, clip_id = self._stored[sample], self._row["clip_id"]
        about = f"clip {clip_id}, sample {sample}: "
        torn = contradiction(stored[0], self._row["rounds"][sample])
        if torn is not None:
            message = f"{about}round {torn[0]} does not fit the stored text: {torn[1]}"
            return {"clip_id": clip_id, "sample": sample, "kind": "round", "message": message}
        coc, expected = self._row["coc"][sample], self._arms.target.coc_text(stored)
        if coc != expected:
            message = f"{about}the stored tokens are the target's, and read {expected!r}, but coc is {coc!r}"
            return {"clip_id": clip_id, "sample": sample, "kind": "coc", "message": message}
        return None


def _first_difference(own: Sequence[int], stored: Sequence[int]) -> int | None:
    pairs = enumerate(itertools.zip_longest(own, stored))
    return next((index for index, (one, other) in pairs if one != other), None)


def _number(value: torch.Tensor) -> float | None:
    """A number for JSON; a masked token's score is none."""
    number = float(value)
    return number if math.isfinite(number) else None


def _message(found: Difference) -> str:
    stored, own = found["stored"], found["own"]
    parts = [
        f"clip {found['clip_id']}, sample {found['sample']}, position {found['position']}: stored is "
        f"{_token(stored)}, the target alone writes {_token(own)}",
        _pair("logits", own, stored, "logit", "wide_logit"),
        _pair("with noise", own, stored, "score", "wide_score"),
        f"the passes' logits differ by at most {found['largest_difference']:.3g}",
        "it comes from the prompt's own pass"
        if found["round"] is None
        else f"round {found['round_index']}: {json.dumps(found['round'])}",
    ]
    return "; ".join(part for part in parts if part)


def _token(place: Place) -> str:
    if place["token"] is None:
        return "the text's end"
    return f"{place['token']} ({'no token' if place['piece'] is None else repr(place['piece'])})"


def _pair(name: str, own: Place, stored: Place, narrow: str, wide: str) -> str:
    """One kind of number of both tokens, of both kinds of pass; nothing if neither token has it."""
    values = [each[key] for key in (narrow, wide) for each in (stored, own)]  # type: ignore[literal-required]
    if all(value is None for value in values):
        return ""
    shown = ["none" if value is None else f"{value:.6g}" for value in values]
    return (
        f"{name} of stored and own: autoregressive pass {shown[0]} and {shown[1]}, "
        f"wide pass {shown[2]} and {shown[3]}"
    )
