"""The report's tables: made once from the JSON object, shown by rich or in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

ARM_NAMES = {
    "transformers": "transformers",
    "autoregressive": "autoregressive",
    "dflash": "DFlash",
}
WINDOW_PARTS = ("preprocess", "vision", "prompt", "decode", "action")
"""Of a window, in the order of time."""
WORLD_FIGURES = {
    "distinct": "distinct texts over all texts",
    "top_ten": "share of the ten commonest texts",
    "period": "texts that end in a period",
    "long": "texts of 30 tokens or more",
    "phrase_words": "words given by a 256-node phrase tree",
    "phrase_whole": "texts given whole by it",
    "differ": "clips whose two samples differ",
}


@dataclass(frozen=True)
class Table:
    """A table of text: the first column to the left, the others to the right.

    Attributes:
        title: what it shows.
        header: one cell a column.
        rows: cells, as many as the header has.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, title not included; signs that mean something there stand as text."""
        rule = "|---|" + "---:|" * (len(self.header) - 1)
        lines = ["| " + " | ".join(map(_plain, cells)) + " |" for cells in (self.header, *self.rows)]
        return "\n".join([lines[0], rule, *lines[1:]]) + "\n"

    def rich(self) -> RichTable:
        """The table for a console."""
        table = RichTable(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left")
        for cells in self.rows:
            table.add_row(*map(Text, cells))  # brackets in a path are text
        return table


def all_tables(result: Mapping[str, Any]) -> list[Table]:
    """Every table that the JSON object has the numbers for."""
    optional = (parts(result), world(result), failures(result), audit(result))
    first = [comparison(result), quality(result)]
    if result.get("greedy"):
        first.append(comparison(result["greedy"], "Greedy: "))
    return [*first, *(table for table in optional if table is not None)]


def bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """A benchmark's timings beside their floors, its figures; of training and FP8 a table of its own."""
    if "training" in result:
        return [training(result)]
    if "beside" in result:
        return [formats(result), *([_over_floors(result["floors"])] if "floors" in result else [])]
    figures = tuple(
        (name, _number(value, 3), "replayed" if name in result["replayed"] else "")
        for name, value in result["figures"].items()
    )
    tables = [
        _over_floors(result["floors"]),
        Table("Figures", ("figure", "value", ""), figures),
    ]
    whole = window(result)
    if whole is not None:
        tables.insert(0, whole)
    lengths = result["coc_lengths"]
    if lengths:
        header = tuple(lengths[0])
        rows = tuple(tuple(str(cell) for cell in row.values()) for row in lengths)
        tables.append(Table("Decode (ms, means) of CoCs of the lengths of real ones", header, rows))
    return tables


def _over_floors(found: Mapping[str, Any]) -> Table:
    """Timings beside what bounds them, of `bench.floors`."""
    read, product = found["read_bytes_per_s"] / 1e9, found["product_flop_per_s"] / 1e9
    rates = f"{read:,.0f} GB/s and {product:,.0f} GFLOP/s"
    if "fp8_product_flop_per_s" in found:
        rates += f" ({found['fp8_product_flop_per_s'] / 1e9:,.0f} in FP8)"
    rows = tuple(
        (
            row["what"],
            row["arm"],
            _number(row["measured_ms"], 2),
            _number(row["floor_ms"], 2),
            row["bound"],
            _times(row["over_floor"]),
        )
        for row in found["rows"]
    )
    header = ("what", "arm", "time", "floor", "bound by", "over floor")
    return Table(f"Times (ms) over their floors, at {rates}, measured too", header, rows)


def training(result: Mapping[str, Any]) -> Table:
    """Steps of training: time, label rows a second, utilisation, memory."""
    here = (result.get("gpu") or {}).get("name") or "CPU"
    rows = tuple(
        (
            row["case"].replace("_", " "),
            _number(row["blocks"], 0),
            _number(row["step_ms"], 2),
            _number(row["label_rows_per_s"], 0),
            _share(row["mfu"]),
            _number(row["peak_gib"], 2),
        )
        for row in result["training"]
    )
    header = ("draft", "blocks", "ms a step", "label rows/s", "of 989 TFLOP/s", "peak GiB")
    return Table(f"Training on {here} (medians)", header, rows)


def formats(result: Mapping[str, Any]) -> Table:
    """A target's parts in FP8 beside the same as its checkpoint holds them."""
    here = (result.get("gpu") or {}).get("name") or "CPU"
    rows = []
    for part, ms in result["beside"].items():
        name = part.removesuffix("_ms").removesuffix("_1").replace("_", " ")
        fp8, stored = ms["fp8"], ms["checkpoint"]
        rows.append((name, _number(fp8, 2), _number(stored, 2), _number(fp8 / stored, 3)))
    header = ("part", "FP8", "checkpoint", "FP8 over checkpoint")
    return Table(f"Parts of a window on {here} (ms, medians)", header, tuple(rows))


def window(result: Mapping[str, Any]) -> Table | None:
    """A window's parts on this card beside their floors and the cards that were measured before.

    Args:
        result: `parts` as `window_bars` takes them, of which `ours_1` and `floor` are shown; `gpu`, this
            card; `cards`, by name the `ours_1` of others.

    Returns:
        the table; None if no parts were timed.
    """
    parts = result.get("parts")
    if not parts:
        return None
    ours, floor, cards = parts["ours_1"], parts.get("floor", {}), result.get("cards") or {}
    here = (result.get("gpu") or {}).get("name") or "CPU"
    rows = []
    for part in (*WINDOW_PARTS, "whole"):
        measured, least = ours.get(part), floor.get(part)
        over = measured / least if measured is not None and least else None
        others = (_number(card["ours_1"].get(part), 2) for card in cards.values())
        rows.append((part, _number(measured, 2), _number(least, 2), _times(over), *others))
    header = ("part", f"{here}, here", "floor", "over floor", *(f"{card}, measured before" for card in cards))
    return Table("A window, camera to trajectory (ms, medians, one sample)", header, tuple(rows))


def study_tables(result: Mapping[str, Any]) -> list[Table]:
    """A study's recipes, a table for each amount of data; `result` holds its figures."""
    header = (
        "recipe",
        "seeds",
        "steps",
        "at T 0.6",
        "of the ceiling",
        "greedy",
        "passes",
        "ms",
        "over plain",
    )
    tables = []
    for data, found in result.items():
        if not isinstance(found, Mapping) or "recipes" not in found:
            continue
        rows = []
        for recipe, row in found["recipes"].items():
            ratio = row.get("over_dflash")
            rows.append(
                (
                    recipe + (" (best)" if recipe == found["best"] else ""),
                    str(row["seeds"]),
                    str(row["steps"]),
                    _number(row["acceptance_length"], 2),
                    _share(row.get("ceiling_share")),
                    _number(row["greedy_acceptance_length"], 2),
                    _number(row["passes_per_coc"], 2),
                    _number(row.get("ms_per_coc"), 1),
                    "{:.2f} [{:.2f}, {:.2f}]".format(*ratio) if ratio else "–",
                )
            )
        title = f"Tokens a pass on test clips, trained on {data} of the demo's clips; a CoC's passes and ms"
        tables.append(Table(title, header, tuple(rows)))
    return tables


def comparison(result: Mapping[str, Any], kind: str = "") -> Table:
    """Times of each arm, tokens a second of decode, and how many times faster DFlash is.

    Args:
        result: an evaluation's object, or the greedy part of a demo's summary.
        kind: stands before the title.
    """
    speedup = result["speedup"] or {}
    rows = []
    for arm, times in result["arms"].items():
        rows.append(
            (
                ARM_NAMES[arm],
                *(_number(times[name]) for name in ("prefill_ms", "decode_ms", "action_ms", "total_ms")),
                _number(times["tokens_per_s"]),
                _times(speedup.get(f"decode_vs_{arm}")),
                _times(speedup.get(f"total_vs_{arm}")),
            )
        )
    header = ("arm", "prefill", "decode", "action", "total", "tokens/s", "decode", "total")
    title = "times (ms, medians over clips), and how many times faster DFlash is"
    return Table(kind + title if kind else title[0].upper() + title[1:], header, tuple(rows))


def quality(result: Mapping[str, Any]) -> Table:
    """Acceptance, losslessness, errors of the trajectory and what the CoCs name."""
    lossless, clips = result["lossless"], result["clips"]
    rows = [
        ("clips attempted / done / failed", f"{clips['attempted']} / {clips['done']} / {clips['failed']}"),
        ("acceptance length (tokens a pass)", _number(result["acceptance_length"], 2)),
        ("acceptance rate", _share(result["acceptance_rate"])),
    ]
    if result.get("greedy"):
        greedy = result["greedy"]
        rows += [
            ("greedy acceptance length", _number(greedy["acceptance_length"], 2)),
            ("greedy acceptance rate", _share(greedy["acceptance_rate"])),
        ]
    if lossless["of"]:
        rows += [
            ("greedy CoC equal to autoregressive", f"{lossless['greedy_identical']} of {lossless['of']}"),
            ("sampled CoC equal to autoregressive", f"{lossless['sampled_identical']} of {lossless['of']}"),
            (
                "autoregressive greedy equal to transformers",
                f"{lossless['autoregressive_equals_transformers']} of {lossless['of']}",
            ),
        ]
        if lossless.get("near_ties") or lossless.get("not_near_ties"):
            parting = f"{lossless['near_ties']} / {lossless['not_near_ties']}"
            rows.append(("texts that part at a near-tie / elsewhere", parting))
    if result.get("audit"):
        audited = result["audit"]
        counts = f"{audited['equal']} / {audited['near_ties']} / {len(audited['differences'])}"
        rows.append((f"texts of {audited['clips']} audited clips equal / near-tie / wrong", counts))
    if result.get("trajectory"):
        trajectory = result["trajectory"]
        rows.append(("minADE, m", _number(trajectory["min_ade_m"], 2)))
        rows.append(("constant velocity's minADE, m", _number(trajectory["constant_velocity_min_ade_m"], 2)))
    if result.get("coc_names"):
        rows.append(("CoC names manoeuvre and cause", _share(result["coc_names"]["both"])))
    return Table("Acceptance and losslessness", ("measure", "value"), tuple(rows))


def parts(result: Mapping[str, Any]) -> Table | None:
    """Where decode's time goes; None if it was not timed in detail."""
    found = result.get("decode_parts")
    if not found:
        return None
    rows = tuple((part, _number(each["ms"], 2), _share(each["share"])) for part, each in found.items())
    return Table("Where decode's time goes", ("part", "ms a clip", "share"), rows)


def world(result: Mapping[str, Any]) -> Table | None:
    """The world's figures, shipped and measured here, beside their bounds; None if the JSON has none."""
    shipped, here, bounds = (result.get(name) for name in ("world", "world_here", "world_bounds"))
    if not shipped:
        return None
    rows = []
    for name, text in WORLD_FIGURES.items():
        low_high = f"{_share(bounds[name][0])} to {_share(bounds[name][1])}" if bounds else "–"
        rows.append((text, _share(shipped[name]), _share((here or {}).get(name)), low_high))
    return Table("The synthetic world", ("figure", "shipped", "this run", "bounds"), tuple(rows))


def failures(result: Mapping[str, Any]) -> Table | None:
    """The clips that failed and why; None if there are none."""
    found = result["clips"]["failures"]
    if not found:
        return None
    return Table(
        "Failed clips", ("clip", "reason"), tuple((each["clip_id"], each["error"]) for each in found)
    )


def audit(result: Mapping[str, Any]) -> Table | None:
    """What an audit found wrong; None if nothing was, or there was none."""
    found = result.get("audit")
    if not found or found["passed"]:
        return None
    rows = [
        (each["clip_id"], str(each["sample"]), str(each.get("position", "–")), _wrong(each))
        for each in found["differences"]
    ]
    rows += [(each["clip_id"], "–", "–", f"not decoded again: {each['error']}") for each in found["failures"]]
    return Table("The audit failed", ("clip", "sample", "position", "what is wrong"), tuple(rows))


def _plain(cell: str) -> str:
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _wrong(difference: Mapping[str, Any]) -> str:
    """A difference in short; its message in the JSON object has all of it."""
    if difference["kind"] != "token":
        return str(difference["message"])
    stored, own = (
        "the end" if each["token"] is None else f"{each['token']} {each['piece'] or ''}".rstrip()
        for each in (difference["stored"], difference["own"])
    )
    return f"stored {stored}, the target's own {own}"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ×"
