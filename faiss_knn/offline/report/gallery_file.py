"""gallery.jsonl: sections with pictures of a results folder, so that its page can be made anew without the pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faiss_knn.offline.report.content import Section, Strip, Table, Tile

GALLERY = "gallery.jsonl"


def read_galleries(folder: Path) -> dict[str, list[Section]]:
    """Read the sections that a folder keeps of each evaluation, by `task_key`; none where there is no such file.

    Raises:
        ValueError: If the file is something else.
    """
    path = folder / GALLERY
    if not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {line["task"]: [_section(one) for one in line["sections"]] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): remove it, or choose another folder") from error


def gallery_text(galleries: Mapping[str, Sequence[Section]]) -> str:
    """Write sections by `task_key` as the content of gallery.jsonl.

    Example:
        >>> gallery_text({"a": [Section("Title", ("Text.",))]})[:50]
        '{"task": "a", "sections": [{"title": "Title", "tex'
    """
    return "".join(
        json.dumps({"task": task, "sections": [asdict(section) for section in sections]}) + "\n"
        for task, sections in galleries.items()
    )


def _section(held: dict[str, Any]) -> Section:
    strips = tuple(
        Strip(strip["title"], tuple(Tile(**tile) for tile in strip["tiles"])) for strip in held.pop("strips")
    )
    table = held.pop("table")
    text, warnings = tuple(held.pop("text")), tuple(held.pop("warnings"))
    return Section(**held, text=text, warnings=warnings, table=None if table is None else Table(**table), strips=strips)
