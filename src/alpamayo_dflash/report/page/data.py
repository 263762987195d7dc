"""Tables of values with what formats them: what a chart draws, and what its readers can look up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlencode

from alpamayo_dflash.report.page.islands import visible
from alpamayo_dflash.report.tables import Table

Kind = Literal["text", "count", "number", "times", "share"]


_AROUND = 60
"""Pixels above and below a chart's bars and marks: legend, axis and title."""


class Measured(NamedTuple):
    """A number and the ends of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, interval: Sequence[float] | None) -> Measured | float:
        """A number with its interval; the number alone where there is none."""
        return value if interval is None else cls(value, interval[0], interval[1])


Value = str | float | int | bool | Measured | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: its name in a row's object.
        label: its heading, with the unit.
        kind: how its values are written: text, whole numbers, numbers with `digits`, such with a ×, shares in
            percent.
        digits: after the point, of numbers.
    """

    key: str
    label: str
    kind: Kind = "text"
    digits: int = 2

    def shown(self, value: Value) -> str:
        """A value as text."""
        if value is None:
            return "–"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, Measured):
            low, high = self._number(value.low), self._number(value.high)
            return f"{self._number(value.value)}{self._unit()} [{low}, {high}]"
        if self.kind == "text" or isinstance(value, str):
            return str(value)
        return self._number(value) + self._unit()

    def _number(self, value: float) -> str:
        if self.kind == "share":
            return f"{100 * value:.1f}"
        return f"{value:,.0f}" if self.kind == "count" else f"{value:,.{self.digits}f}"

    def _unit(self) -> str:
        return {"share": " %", "times": " ×"}.get(self.kind, "")


@dataclass(frozen=True)
class DataTable:
    """Rows of values. Characters without a form of their own are made visible.

    Attributes:
        title: what it shows.
        columns: what each row holds, in order.
        rows: values, as many as there are columns.
        note: how the numbers came about, in a sentence or two; "" where the headings say it all.
        links: where each row leads to on the page; () for nowhere.
        sortable: whether its rows may stand in any order.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""
    links: tuple[str, ...] = ()
    sortable: bool = True

    def __post_init__(self) -> None:
        """Make every character of its texts visible: they are texts of models, and names of files."""
        assert not self.links or len(self.links) == len(self.rows), "a link a row"
        columns = tuple(replace(column, label=visible(column.label)) for column in self.columns)
        rows = tuple(
            tuple(visible(value) if isinstance(value, str) else value for value in row) for row in self.rows
        )
        for name, value in (("title", visible(self.title)), ("columns", columns), ("rows", rows)):
            object.__setattr__(self, name, value)

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns' keys."""
        return tuple(column.key for column in self.columns)

    def objects(self) -> list[dict[str, Value]]:
        """Each row as an object by key, as charts take them."""
        return [dict(zip(self.keys, row, strict=True)) for row in self.rows]

    def cells(self) -> list[list[tuple[str, Value, str]]]:
        """Each row's cells: text, value to sort by, and the column's kind."""
        return [
            [
                (column.shown(value), value.value if isinstance(value, Measured) else value, column.kind)
                for column, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def as_text(self) -> Table:
        """The same with its values written out, for Markdown and terminals."""
        rows = tuple(tuple(text for text, _, _ in row) for row in self.cells())
        return Table(self.title, tuple(column.label for column in self.columns), rows)


@dataclass(frozen=True)
class Figure:
    """A chart and the table behind it.

    Attributes:
        name: of its files and of its element on the page.
        spec: the Vega-Lite specification, without its values: its data are the table's rows, named "rows".
        table: what it draws.
        description: what can be seen, for those who do not see it.
    """

    name: str
    spec: Mapping[str, Any]
    table: DataTable
    description: str

    @property
    def height(self) -> int:
        """About how many pixels the chart takes, so that its place can be kept free."""
        return int(self.spec["height"]) + _AROUND


def of_objects(
    title: str,
    columns: Sequence[Column],
    objects: Sequence[Mapping[str, Value]],
    note: str = "",
    links: Sequence[str] = (),
) -> DataTable:
    """A table out of objects; what one lacks is None."""
    rows = tuple(tuple(each.get(column.key) for column in columns) for each in objects)
    return DataTable(title, tuple(columns), rows, note, tuple(links))


def clip_link(run: int, clip_id: str) -> str:
    """The link of a clip's view.

    Args:
        run: the run's number on the page, from 0.
        clip_id: the clip.
    """
    return "#" + urlencode({"run": run, "clip": clip_id}, quote_via=quote, errors="replace")
