"""Parquet tables of others: the columns that are read, of their kinds, within limits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.extras import needs

MOST_ROWS = 2**24
"""The most rows of a table; the dataset has 306,152 clips."""

MOST_BYTES = 2**31
"""The most that a table's columns take unpacked, by what the file says and by what comes out."""

_WORDS = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false", list: "lists of ids"}


def read_columns(
    source: Path | bytes, columns: Mapping[str, Any], where: str, *, most_rows: int = MOST_ROWS
) -> Any:
    """Read columns of a Parquet file.

    Args:
        source: the file, or its bytes.
        columns: name to int, float (whole numbers pass), str, bool, list (of whole numbers), or object for
            any kind that is no list, struct or map. Other columns are not read.
        where: the file, for messages.
        most_rows: the most rows that it may have.

    Returns:
        A `pyarrow.Table` with these columns in this order, without empty places.

    Raises:
        ValueError: it is missing or none, lacks a column, has one of another kind, or one with empty places,
            or is too large; the message names file and column.
    """
    with needs("clips"):
        import pyarrow
        import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            _check_size(file.metadata, most_rows)
            _check_kinds(file.schema_arrow, columns)
            table = _read(file, list(columns))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{where}: no such file") from None
    except (pyarrow.ArrowException, ValueError, OSError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{where}: not a Parquet file that can be read ({reason})") from None
    for name in columns:
        if table[name].null_count:
            raise ValueError(
                f"{where}: column {name} has {table[name].null_count} empty places; it must have none"
            )
    return table


def _check_size(metadata: Any, most_rows: int) -> None:
    """Refuse by what the file says of itself, before anything is unpacked.

    Columns' own records are not looked at: for damaged ones pyarrow ends the process.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    size = sum(max(group.total_byte_size, 0) for group in groups)
    if not 0 <= metadata.num_rows <= most_rows:
        raise ValueError(f"it has {metadata.num_rows} rows; at most {most_rows} are read")
    if size > MOST_BYTES:
        raise ValueError(f"it unpacks to {size} bytes; at most {MOST_BYTES} are read")


def _check_kinds(schema: Any, columns: Mapping[str, Any]) -> None:
    with needs("clips"):
        from pyarrow import types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_string(kind) or types.is_large_string(kind))

    def is_list(kind: Any) -> bool:
        return bool(types.is_list(kind) or types.is_large_list(kind)) and bool(
            types.is_integer(kind.value_type)
        )

    fits: dict[Any, Any] = {
        int: types.is_integer,
        float: lambda kind: types.is_floating(kind) or types.is_integer(kind),
        str: is_text,
        bool: types.is_boolean,
        list: is_list,
        object: lambda kind: not types.is_nested(kind),
    }
    names = list(schema.names)
    for name, kind in columns.items():
        if names.count(name) != 1:
            raise ValueError(
                f"it has {names.count(name)} columns {name}, and must have one; it has {names!r:.300}"
            )
        found = schema.field(name).type
        if not fits[kind](found):
            raise ValueError(f"column {name} is {found}; it must be {_WORDS.get(kind, 'plain values')}")


def _read(file: Any, names: list[str]) -> Any:
    """Read in pieces, so that what unpacks to far more than it says ends early.

    One piece has at most 2 GiB of a text or list column: its places are counted in 31 bits.
    """
    with needs("clips"):
        import pyarrow

    pieces, size = [], 0
    schema = pyarrow.schema([file.schema_arrow.field(name) for name in names])
    for piece in file.iter_batches(batch_size=2**10, columns=names, use_threads=False):
        size += piece.nbytes
        if size > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES} bytes")
        pieces.append(piece)
    table = pyarrow.Table.from_batches(pieces, schema.remove_metadata()) if pieces else schema.empty_table()
    table.validate(full=True)  # texts are UTF-8, lists lie within what they point into
    return table
