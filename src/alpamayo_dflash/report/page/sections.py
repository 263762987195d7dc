"""What the page says before its charts: what went wrong, in plain sight, and the list of clips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alpamayo_dflash.common.manoeuvres import manoeuvre_of
from alpamayo_dflash.report.page.data import Column, DataTable, Figure, Value, clip_link, of_objects
from alpamayo_dflash.report.page.runs import Run
from alpamayo_dflash.report.tables import audit

Level = Literal["good", "bad", "note"]
_EQUALITIES = (
    ("greedy_identical", "greedy", "greedy texts equal to the autoregressive loop's"),
    ("sampled_identical", "sampled", "sampled texts equal to the autoregressive loop's"),
    (
        "autoregressive_equals_transformers",
        "autoregressive_equals_transformers",
        "autoregressive greedy texts equal to transformers'",
    ),
)
"""What must be equal: its count's key in an evaluation, its name in a row's `identity`, and in words."""
_WORDS: Mapping[Level, str] = {"good": "Fine:", "bad": "Look:", "note": "Note:"}


@dataclass(frozen=True)
class Finding:
    """A sentence that stands in plain sight.

    Attributes:
        level: whether it is well, is not, or must be known to read the rest.
        text: the sentence.
        table: the clips that it is about, or None.
    """

    level: Level
    text: str
    table: DataTable | None = None

    @property
    def word(self) -> str:
        """What says the level without colour."""
        return _WORDS[self.level]


@dataclass(frozen=True)
class Section:
    """A part of the page; `id` is its place in links, `template` what shows it."""

    id: str
    title: str
    findings: tuple[Finding, ...] = ()
    texts: tuple[str, ...] = ()
    tables: tuple[DataTable, ...] = ()
    figures: tuple[Figure, ...] = ()
    template: str = "section.html.j2"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        shows = (self.findings, self.texts, self.tables, self.figures)
        return not any(shows) and self.template == "section.html.j2"


def trouble(runs: Sequence[Run]) -> Section:
    """What was not lossless, failed or was replayed; and that all is well, where it is."""
    several = len(runs) > 1
    findings = [
        Finding(each.level, f"{run.name}: {each.text}" if several else each.text, each.table)
        for number, run in enumerate(runs)
        for each in (_bench_findings(run.bench) if run.evaluation is None else _findings(run, number))
    ]
    order: Sequence[Level] = ("bad", "note", "good")
    findings.sort(key=lambda each: order.index(each.level))
    return Section("trouble", "What to know first", findings=tuple(findings))


def _findings(run: Run, number: int) -> Iterable[Finding]:
    assert run.evaluation is not None
    yield from _lossless(run, number)
    yield from _failed(run.evaluation, "", number)
    if run.greedy is not None and "clips" in run.greedy:
        yield from _greedy_lossless(run.greedy["lossless"])
        yield from _failed(run.greedy, "of the greedy evaluation ", None)
    yield from _audited(run.evaluation)
    yield from _draft_failures(run.evaluation)
    yield from _traced(run, number)
    settings = run.evaluation.get("settings") or {}
    if settings.get("lossless_mode") is False:
        yield Finding(
            "bad",
            "this run was not meant to be lossless: the sentence's end was forced "
            f"(sentence_end {settings.get('sentence_end', 'force')}).",
        )


def _lossless(run: Run, number: int) -> Iterable[Finding]:
    assert run.evaluation is not None
    counts = run.evaluation["lossless"]
    if not counts["of"]:
        yield Finding("note", "no other arm was run, so nothing says whether the texts are the target's own.")
        return
    if all(counts[key] == counts["of"] for key, _, _ in _EQUALITIES):
        yield Finding(
            "good",
            f"all of {counts['of']} clips equal: greedy and sampled texts are the autoregressive loop's, "
            "token for token, and its greedy texts are transformers' own.",
        )
        return
    for key, name, text in _EQUALITIES:
        if counts[key] < counts["of"]:
            ties = ""
            if name != "autoregressive_equals_transformers" and "near_ties" in counts:
                ties = (
                    f" Of all texts that differ {counts['near_ties']} part at a near-tie, "
                    f"{counts.get('not_near_ties', 0)} elsewhere."
                )
            table = _clip_table(
                run, number, f"Not equal: {text}", lambda row, name=name: not row["identity"][name]
            )
            yield Finding("bad", f"{counts[key]} of {counts['of']} {text}.{ties}", table)


def _greedy_lossless(counts: Mapping[str, Any]) -> Iterable[Finding]:
    least = min(counts[key] for key, _, _ in _EQUALITIES)
    if least < counts["of"]:
        yield Finding(
            "bad", f"of the greedy evaluation only {least} of {counts['of']} clips are equal in all arms."
        )


def _clip_table(run: Run, number: int, title: str, chosen: Any) -> DataTable | None:
    """The clips of a run that a rule chooses; None for none."""
    rows = [row for row in run.rows if "identity" in row and chosen(row)]
    if not rows:
        return None
    columns = (Column("clip", "clip"), Column("coc", "CoC"), Column("near", "texts at near-ties", "count"))
    objects = [
        {"clip": row["clip_id"], "coc": first_coc(row), "near": row["identity"].get("near_ties")}
        for row in rows
    ]
    return of_objects(title, columns, objects, links=[clip_link(number, row["clip_id"]) for row in rows])


def _failed(result: Mapping[str, Any], where: str, number: int | None) -> Iterable[Finding]:
    clips = result["clips"]
    if clips["failed"] or clips["failures"]:
        objects = [{"clip": each["clip_id"], "reason": each["error"]} for each in clips["failures"]]
        links = [] if number is None else [clip_link(number, each["clip_id"]) for each in clips["failures"]]
        columns = (Column("clip", "clip"), Column("reason", "reason"))
        table = of_objects("Failed clips", columns, objects, links=links)
        yield Finding("bad", f"{where}{clips['failed']} of {clips['attempted']} clips failed.", table)
    elif not where:
        yield Finding("good", f"none of {clips['attempted']} clips failed.")


def _audited(result: Mapping[str, Any]) -> Iterable[Finding]:
    found = result.get("audit")
    if not found:
        return
    wrong = audit(result)
    if wrong is None:
        yield Finding(
            "good",
            f"an audit decoded {found['clips']} clips again: {found['equal']} texts equal, "
            f"{found['near_ties']} part at near-ties.",
        )
        return
    keys = tuple(Column(f"c{index}", label) for index, label in enumerate(wrong.header))
    table = DataTable(wrong.title, keys, wrong.rows)
    yield Finding("bad", f"an audit of {found['clips']} clips failed.", table)


def _draft_failures(result: Mapping[str, Any]) -> Iterable[Finding]:
    count = result.get("draft_failures") or 0
    if count:
        yield Finding("bad", f"the draft failed {count} times; there the target went on alone.")


def _traced(run: Run, number: int) -> Iterable[Finding]:
    assert run.evaluation is not None
    traced = run.evaluation.get("trace")
    if not traced:
        yield Finding(
            "note", "nothing was traced, so clips have no rounds' scores and no frames (evaluate --trace)."
        )
        return
    if traced["unequal"]:
        unequal = [row for row in run.rows if "trace" in row and not row["trace"]["equal"]]
        table = of_objects(
            "Clips whose traced decode wrote other texts",
            (Column("clip", "clip"), Column("coc", "CoC")),
            [{"clip": row["clip_id"], "coc": first_coc(row)} for row in unequal],
            links=[clip_link(number, row["clip_id"]) for row in unequal],
        )
        yield Finding("bad", f"the traced decode of {traced['unequal']} clips wrote other texts.", table)
    if traced["lacking"]:
        yield Finding("note", f"{traced['lacking']} clips have no trace.")


def _bench_findings(bench: Mapping[str, Any] | None) -> Iterable[Finding]:
    replayed = (bench or {}).get("replayed") or []
    if replayed:
        yield Finding(
            "note",
            "the benchmark replays texts with a set acceptance, so these figures say nothing of a draft: "
            f"{', '.join(replayed)}.",
        )


def first_coc(row: Mapping[str, Any]) -> str:
    """The first sample's text."""
    return str(row["coc"][0]) if row["coc"] else ""


def manoeuvre_in(row: Mapping[str, Any]) -> str:
    """What the first sample's text says to do."""
    return manoeuvre_of(first_coc(row)) or "none recognised"


_CLIP_COLUMNS = (
    Column("clip", "clip"),
    Column("coc", "CoC"),
    Column("manoeuvre", "manoeuvre"),
    Column("state", "state"),
    Column("tokens", "tokens", "count"),
    Column("passes", "passes", "count"),
    Column("acceptance", "tokens a pass", "number", 2),
    Column("decode", "decode, ms", "number", 1),
    Column("total", "total, ms", "number", 1),
    Column("speedup", "decode, times faster", "number", 2),
    Column("error", "minADE, m", "number", 2),
)


def clip_list(runs: Sequence[Run]) -> tuple[DataTable, list[dict[str, Value]]]:
    """Every clip of every run, the failed ones too, and what filters need beside the columns."""
    objects, links, meta = [], [], []
    for number, run in enumerate(runs):
        for row in run.rows:
            objects.append(_clip(row))
            links.append(clip_link(number, row["clip_id"]))
            meta.append({"run": number, "clip": row["clip_id"]})
        for each in run.failures:
            objects.append({"clip": each["clip_id"], "coc": each["error"], "state": "failed"})
            links.append(clip_link(number, each["clip_id"]))
            meta.append({"run": number, "clip": each["clip_id"]})
    columns: Sequence[Column] = _CLIP_COLUMNS
    if len(runs) > 1:
        columns = (*_CLIP_COLUMNS, Column("run_name", "run"))
        for each, beside in zip(objects, meta, strict=True):
            each["run_name"] = runs[int(str(beside["run"]))].name
    return of_objects("Clips", columns, objects, links=links), meta


def _clip(row: Mapping[str, Any]) -> dict[str, Value]:
    dflash, acceptance = row["arms"].get("dflash", {}), row["acceptance"]
    alone = row["arms"].get("autoregressive", {}).get("decode_ms")
    return {
        "clip": row["clip_id"],
        "coc": first_coc(row),
        "manoeuvre": manoeuvre_in(row),
        "state": state_of(row),
        "tokens": dflash.get("tokens"),
        "passes": acceptance["passes"],
        "acceptance": over(acceptance["tokens_after_first"], acceptance["passes"]),
        "decode": dflash.get("decode_ms"),
        "total": dflash.get("total_ms"),
        "speedup": over(alone, dflash.get("decode_ms")),
        "error": (row.get("trajectory") or {}).get("min_ade_m"),
    }


def state_of(row: Mapping[str, Any]) -> str:
    """Whether a clip's texts were equal in all arms; "" where that was not looked at."""
    identity = row.get("identity")
    if identity is None:
        return ""
    return "equal" if all(identity[name] for _, name, _ in _EQUALITIES) else "unequal"


def over(above: float | None, below: float | None) -> float | None:
    """A ratio; None where it has no value."""
    return None if above is None or not below else above / below
