"""Tables (Parquet, Arrow, CSV, JSON lines): which columns are vectors, and reading those alone that are asked for.

A vector is one column of lists, or scalar columns whose names differ in a number at their end alone: `emb_0`, `emb_1`
and so on are the array `emb_*`. Whatever else a table holds is never read.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UNKNOWN = -1  # a length that only reading tells
LABEL_NAMES = ("labels", "label", "targets", "target", "y", "classes", "class")
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Member:
    """An array of a file, not read yet.

    Attributes:
        shape: As far as the file's head tells it; `UNKNOWN` where it does not.
        dtype: Of numpy.
        read: Reads it; what it gives may be a memmap, or a dataset of a file that stays open.
        class_names: Names of the classes by id, if these are labels and the file says so.
        doubt: From the rows to why they may not be what they seem, or None; asked unless the user named the array.
        columns: The arrays that this one is made of, by name, where it is columns of a table.
        read_labels: Reads it as labels, rows without one marked; None: as `read` does.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Any]
    class_names: list[str] | None = None
    doubt: Callable[[npt.NDArray[Any]], str | None] | None = None
    columns: Mapping[str, "Member"] = field(default_factory=dict)
    read_labels: Callable[[], Any] | None = None


Read = Callable[[list[str], bool], Any]  # names, and whether they are numbers, to a pyarrow table


def open_arrow(path: Path) -> dict[str, Member]:
    """Open an Arrow file in either of its formats: the file format, which is Feather's too, or the stream format."""
    import pyarrow as pa  # an extra

    with path.open("rb") as file:
        is_stream = file.read(6) != b"ARROW1"
    make = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    with pa.memory_map(str(path)) as source, make(source) as reader:
        schema = reader.schema

    def read(names: list[str], _: bool) -> Any:
        fields = [schema.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        with make(pa.memory_map(str(path)), options=options) as reader:
            return reader.read_all().select(names)

    return members(schema, UNKNOWN, read)


def open_csv(path: Path) -> dict[str, Member]:
    """Open a table of text, with a line of names or without."""
    import pyarrow as pa  # an extra
    from pyarrow import csv as arrow_csv

    delimiter, named = _csv_layout(path)
    options = {
        "read_options": arrow_csv.ReadOptions(autogenerate_column_names=not named),
        "parse_options": arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    }
    with arrow_csv.open_csv(path, **options) as reader:
        schema = reader.schema

    def read(names: list[str], as_numbers: bool) -> Any:
        kind = pa.float64() if as_numbers else pa.string()
        convert = arrow_csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, kind))
        return arrow_csv.read_csv(path, convert_options=convert, **options)

    return members(schema, UNKNOWN, read, is_text=True, nameless=not named)


def open_json_lines(path: Path) -> dict[str, Member]:
    """Open a file of one JSON object a line; the first line tells the columns and their types."""
    import pyarrow as pa  # an extra
    from pyarrow import json as arrow_json

    with path.open(encoding="utf-8-sig") as file:
        first = json.loads(file.readline())
    if not isinstance(first, dict):
        raise TypeError(f"each line must be a JSON object, the first is a {type(first).__name__}")
    schema = pa.schema([(name, _json_type(pa, value)) for name, value in first.items()])

    def read(names: list[str], _: bool) -> Any:
        wanted = pa.schema([schema.field(name) for name in names])
        parse = arrow_json.ParseOptions(explicit_schema=wanted, unexpected_field_behavior="ignore")
        longest = arrow_json.ReadOptions(block_size=64 << 20)  # no line may be longer
        return arrow_json.read_json(path, read_options=longest, parse_options=parse).select(names)

    return members(schema, UNKNOWN, read)


def members(
    schema: Any, length: int, read: Read, *, is_text: bool = False, nameless: bool = False
) -> dict[str, Member]:
    """List the arrays of a table by name: vectors from lists or from numbered columns (`prefix*`), and scalars."""
    from pyarrow import types  # an extra

    names = _class_names(schema)
    arrays: dict[str, Member] = {}
    numbers: list[str] = []
    has_labels = any(name.lower() in LABEL_NAMES for name in schema.names)
    for name in dict.fromkeys(schema.names):
        if schema.names.count(name) > 1:
            continue  # no name tells which of them is meant
        kind = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            width = kind.list_size if types.is_fixed_size_list(kind) else UNKNOWN
            arrays[name] = Member((length, width), _numpy_dtype(kind.value_type), _reader(read, [name]))
            continue
        if types.is_integer(kind) or types.is_floating(kind):
            numbers.append(name)
        readers = [_reader(read, [name], is_text, as_labels=as_labels) for as_labels in (False, True)]
        arrays[name] = Member((length,), _numpy_dtype(kind), readers[0], names.get(name), read_labels=readers[1])
    for prefix, columns in _numbered(numbers).items():
        parts = {name: arrays.pop(name) for name in columns}
        dtype = np.dtype(np.float64) if is_text else np.result_type(*(part.dtype for part in parts.values()))
        doubt = _doubt(columns, nameless or (not prefix and not has_labels), schema)
        shape, whole = (length, len(columns)), _columns_reader(read, columns)
        arrays[f"{prefix}*"] = Member(shape, dtype, whole, doubt=doubt, columns=parts)
    return arrays


def _numpy_dtype(kind: Any) -> np.dtype[Any]:
    from pyarrow import types

    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return np.dtype(kind.to_pandas_dtype()) if is_number else np.dtype(object)


def _numbered(columns: list[str]) -> dict[str, list[str]]:
    """Group columns that belong together by their common prefix, in the order of their numbers."""
    groups: dict[str, dict[int, str]] = {}
    for name in columns:
        prefix, number = re.fullmatch(r"(.*?)([0-9]*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        if number:
            groups.setdefault(prefix, {})[int(number)] = name
    ordered = {prefix: [group[number] for number in sorted(group)] for prefix, group in groups.items()}
    return {prefix: names for prefix, names in ordered.items() if len(names) > 1}


def _doubt(columns: list[str], nameless: bool, schema: Any) -> Callable[[npt.NDArray[Any]], str | None]:
    numbers = [int(re.search(r"[0-9]+$", name).group()) for name in columns]  # type: ignore[union-attr]
    gap = next((before + 1 for before, after in pairwise(numbers) if after != before + 1), None)
    kinds = {str(schema.field(name).type): name for name in columns}

    def doubt(rows: npt.NDArray[Any]) -> str | None:
        if gap is not None:
            return f"columns {columns[0]} to {columns[-1]} lack number {gap}"
        if not nameless:
            return None
        whole = (rows == np.floor(rows)).all(0)
        if whole.all():
            return "its columns have numbers for names and hold whole numbers alone, labels may be among them"
        suspects = np.flatnonzero(whole & (rows != rows[:1]).any(0))
        if len(suspects) or len(kinds) > 1:
            suspect = columns[suspects[0]] if len(suspects) else list(kinds.values())[-1]
            return f"column {suspect!r} holds whole numbers, unlike others: it may be labels"
        return None

    return doubt


def _reader(
    read: Read, names: list[str], is_text: bool = False, *, as_labels: bool = False
) -> Callable[[], npt.NDArray[Any]]:
    def one() -> npt.NDArray[Any]:
        column = read(names, False).column(0)
        values = (label_array if as_labels else column_array)(names[0], column)
        return parsed([str(word) for word in values]) if is_text else values

    return one


def _columns_reader(read: Read, names: list[str]) -> Callable[[], npt.NDArray[Any]]:
    def stacked() -> npt.NDArray[Any]:
        table = read(names, True)
        return np.stack([column_array(name, table.column(name)) for name in names], axis=1)

    return stacked


def column_array(name: str, column: Any, first: int = 0) -> npt.NDArray[Any]:
    """Read a column as (N,), or (N, d) for lists; its first row is number `first`.

    Raises:
        ValueError: If an entry is missing, or lists differ in length.
    """
    from pyarrow import types

    column.validate(full=True)  # offsets of a damaged file may point anywhere
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    _refuse_rows(f"column {name!r} has {{}} nulls", _missing(column), first)
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        return _vectors(name, column, first)
    values = np.asarray(column.to_numpy())
    is_empty = np.asarray([word == "" for word in values]) if values.dtype.kind == "O" else np.zeros(0, bool)
    _refuse_rows(f"column {name!r} has {{}} empty entries", is_empty, first)
    return values


def label_array(name: str, column: Any) -> npt.NDArray[Any]:
    """Read a column of labels as (N,), or (N, C) for lists: a null is -1 among numbers, None among names.

    Raises:
        ValueError: As `column_array`, but for nulls.
    """
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = _missing(column)
    if not missing.any():
        return column_array(name, column)
    if types.is_integer(column.type) or types.is_floating(column.type):
        return column_array(name, column.fill_null(-1))
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        return column_array(name, column)
    names = column_array(name, column.fill_null("-")).astype(object)
    names[missing] = None
    return names


def _missing(column: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(column.is_null()) if column.null_count else np.zeros(0, bool)


def _refuse_rows(what: str, bad: npt.NDArray[np.bool_], first: int = 0) -> None:
    rows = first + np.flatnonzero(bad)
    if len(rows):
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", …" if len(rows) > _SHOWN_ROWS else "")
        raise ValueError(f"{what.format(len(rows))}, in rows {shown}")


def _vectors(name: str, column: Any, first: int) -> npt.NDArray[Any]:
    """Read lists of one length as rows, chunk by chunk: all together can be more than their offsets can count."""
    from pyarrow import types

    if not (types.is_integer(column.type.value_type) or types.is_floating(column.type.value_type)):
        raise ValueError(f"column {name!r} holds lists of {column.type.value_type}, not of numbers")
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, 1))
    width = len(chunks[0][0])
    out = np.empty((len(column), width), _numpy_dtype(column.type.value_type))
    start = 0
    for chunk in chunks:
        lengths = chunk.value_lengths().to_numpy(zero_copy_only=False)
        values = chunk.flatten()
        if (lengths != width).any():
            row = first + start + int(np.flatnonzero(lengths != width)[0])
            raise ValueError(
                f"column {name!r} holds vectors of different lengths, {width} in row {first}, but not in {row}"
            )
        if values.null_count:
            holes = np.asarray(values.is_null()).reshape(-1, width).any(1)
            _refuse_rows(
                f"column {name!r} has nulls within {{}} vectors", np.concatenate([np.zeros(start, bool), holes]), first
            )
        out[start : start + len(chunk)] = values.to_numpy(zero_copy_only=False).reshape(-1, width)
        start += len(chunk)
    return out


def parsed(words: list[str]) -> npt.NDArray[Any]:
    """Read words as whole numbers if all of them are, else as numbers, else as they are."""
    for kind in (int, float):
        try:
            return np.asarray([kind(word) for word in words])
        except ValueError:
            continue
    return np.asarray(words, dtype=str)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Read the classes' names by column from what the `datasets` library notes in a table's head."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return class_labels(noted)


def class_labels(features: Any) -> dict[str, list[str]]:
    """Read the classes' names by column from the features of a `datasets` description."""
    if not isinstance(features, Mapping):
        return {}
    return {
        name: [str(label) for label in feature["names"]]
        for name, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _json_type(pa: Any, value: Any) -> Any:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, list) and value and all(isinstance(x, (int, float)) for x in value):
        return pa.list_(pa.float64())  # whole numbers in the first line may be followed by others
    return pa.string()


def _csv_layout(path: Path) -> tuple[str, bool]:
    """Find the delimiter, and whether the first line holds names."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [file.readline().rstrip("\r\n"), file.readline().rstrip("\r\n")]
    known = ["\t"] if path.suffix.lower() == ".tsv" else [",", ";", "\t"]
    delimiter = max(known, key=lines[0].count)
    first, second = (next(csv.reader([line], delimiter=delimiter), []) for line in lines)
    if len(first) == 1:
        named = not _is_number(first[0]) and (first[0].strip().lower() in LABEL_NAMES or _is_number("".join(second)))
        return delimiter, named
    numbers = [cell for cell in first if _is_number(cell)]
    counted = len(numbers) > 2 and {str(i) for i in range(len(numbers))} == set(numbers)  # as pandas names columns
    return delimiter, not numbers or counted


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
