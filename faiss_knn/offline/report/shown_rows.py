"""Rows of the data as a page shows them: by their names, with their labels, their pictures and their neighbours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from faiss_knn.offline.report.content import Section, Strip, Table, Tile
from faiss_knn.offline.report.findings import Confusion, Side
from faiss_knn.offline.report.tables import counted, percent
from faiss_knn.offline.report.thumbnails import Album

STRIPS = 12  # of a section
MEMBERS = 9  # rows of a strip

Names = Sequence[str] | None


class Described(Protocol):
    """What knows the rows that a page shows."""

    @property
    def labels(self) -> Mapping[tuple[Side, int], Any]:
        """Labels by ("row" or "query", number)."""

    @property
    def neighbors(self) -> Mapping[tuple[Side, int], Sequence[int]]:
        """The bank's rows that are nearest, likewise."""

    def class_name(self, label: Any, /) -> str:
        """Name a class."""


@dataclass(frozen=True)
class Looks:
    """What rows are called, and what they look like.

    Attributes:
        names: By "row" (of the bank) and "query", or None.
        albums: Their pictures, or None.
    """

    names: Mapping[Side, Names]
    albums: Mapping[Side, Album | None]


PLAIN = Looks({"row": None, "query": None}, {"row": None, "query": None})


def looks_of(counts: Mapping[Side, int], *, names: Names, query_names: Names, images: Any, query_images: Any) -> Looks:
    """Check what rows are called and their pictures; there are `counts` rows and queries.

    Raises:
        ValueError: If there are not as many names or pictures as rows.
    """
    albums = {"row": _album(images), "query": _album(query_images)}
    given = {"names": names, "query_names": query_names, "images": albums["row"], "query_images": albums["query"]}
    for argument, entries in given.items():
        side = "query" if argument.startswith("query") else "row"
        if entries is not None and len(entries) != counts[side]:
            raise ValueError(f"`{argument}` must have one entry per {side}, {counts[side]}, got {len(entries)}")
    return Looks({"row": names, "query": query_names}, albums)


def _album(images: Any) -> Album | None:
    return images if images is None or isinstance(images, Album) else Album(images)


@dataclass(frozen=True)
class Rows:
    """How rows of the bank and queries are shown.

    Attributes:
        report: What knows their labels and neighbours.
        looks: Their names and pictures.
    """

    report: Described
    looks: Looks

    @property
    def has_pictures(self) -> bool:
        """Whether there are any."""
        return any(album is not None for album in self.looks.albums.values())

    def name(self, side: str, number: int) -> str:
        """Name a row: by its name, or else its number."""
        names = self.looks.names[side]
        return f"{side} {number}" if names is None else str(names[number])

    def tile(self, side: str, number: int, *, is_first: bool = False) -> Tile:
        """Show a row with its label and picture."""
        label = self.report.labels.get((side, number))
        caption = self.name(side, number) + ("" if label is None else f" · {self.report.class_name(label)}")
        album = self.looks.albums[side]
        return Tile(caption, None if album is None else album.thumbnail(number), is_first)

    def beside(self, title: str, side: str, number: int) -> Strip:
        """Show a row before its neighbours."""
        near = self.report.neighbors.get((side, number), [])
        tiles = (self.tile("row", row) for row in near[: MEMBERS - 1])
        return Strip(title, (self.tile(side, number, is_first=True), *tiles))

    def strips(self, findings: Iterable[Strip]) -> tuple[Strip, ...]:
        """Return strips where there are pictures; without, the table says the same."""
        return tuple(findings) if self.has_pictures else ()

    def with_broken(self, sections: list[Section]) -> list[Section]:
        """Say in the first section how many pictures could not be read."""
        broken = sum(len(album.broken) for album in self.looks.albums.values() if album is not None)
        if broken and sections:
            note = f"{counted(broken, 'picture')} could not be read."
            sections = [replace(sections[0], text=(*sections[0].text, note)), *sections[1:]]
        return sections


def confused_section(pairs: Sequence[Confusion], count: int, rows: Rows, side: str, whose: str) -> Section | None:
    """Show classes that are taken for another: the most frequent of `count` pairs, and of `whose` rows they are."""
    if not pairs:
        return None
    names = rows.report.class_name
    shown = counted(count, "pair")
    shown = f"the {len(pairs)} most frequent of {shown}" if count > len(pairs) else shown
    cells = [[names(pair.label), names(pair.predicted), f"{pair.count:,}", percent(pair.share)] for pair in pairs]
    strips = rows.strips(_confused(rows, side, pair) for pair in pairs[:STRIPS])
    table = Table(["class", "taken for", "how often", "of the class %"], cells, 2)
    text = f"Classes that are taken for another, {whose}: {shown}."
    return Section("Classes that are confused", (text,), (), table, None, strips)


def _confused(rows: Rows, side: str, pair: Confusion) -> Strip:
    names = rows.report.class_name
    title = f"{names(pair.label)} taken for {names(pair.predicted)}: {pair.count:,} times"
    return Strip(title, tuple(rows.tile(side, row, is_first=True) for row in pair.rows[:MEMBERS]))
