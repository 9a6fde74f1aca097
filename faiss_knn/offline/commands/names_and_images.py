"""What rows are called and what they look like, where a command writes a page: names, and pictures."""

import argparse
from pathlib import Path
from typing import Any

LOOKS = ("names", "query_names", "images", "query_images")


def add_looks(group: Any, bank: str) -> None:
    """Add the arguments; `bank` is what the command calls the features that are searched."""
    group.add_argument("--names", type=Path, metavar="FILE", help=f"what to call the rows of {bank}, one a line")
    group.add_argument("--query-names", type=Path, metavar="FILE", help="what to call the queries, one a line")
    group.add_argument(
        "--images", metavar="KEY",
        help=f"pictures for the page: an array (N, H, W[, C]) or column of paths in {bank}, and in QUERIES if it is "
        f"there; or a file of those of {bank}",
    )  # fmt: skip
    group.add_argument("--query-images", metavar="KEY", help="the queries' pictures: likewise in QUERIES, or a file")


def check_looks(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program where the arguments do not go together."""
    for name in LOOKS:
        if getattr(given, name) is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if given.queries is None and name.startswith("query"):
            parser.error(f"{option} needs QUERIES")
        if given.out is None:
            parser.error(f"{option} needs --out, where they are shown")


def read_looks(given: argparse.Namespace, rows: int, queries: int | None) -> dict[str, Any]:
    """Read names and open pictures, as `save` of a report takes them.

    Args:
        given: The arguments.
        rows: How many rows BANK or FEATURES has.
        queries: How many QUERIES has, if it is there.

    Raises:
        DataError: If there are none such, or not as many as rows.
    """
    from faiss_knn.offline.images import names_array, read_album

    query_images = given.query_images
    if query_images is None and given.images is not None and queries is not None:
        query_images = names_array(given.queries, given.images)
    looks = {
        "names": _names(given.names, given.bank, rows),
        "query_names": _names(given.query_names, given.queries, queries),
        "images": None if given.images is None else read_album(given.images, given.bank, rows),
        "query_images": None if query_images is None else read_album(query_images, given.queries, queries or 0),
    }
    return {name: entries for name, entries in looks.items() if entries is not None}


def unread_pictures(looks: dict[str, Any]) -> list[str]:
    """Say how many pictures could not be read when they were shown, and which is the first; nothing if all could."""
    from faiss_knn.offline.report.tables import counted

    albums = [looks[name] for name in ("images", "query_images") if name in looks]
    broken = [album.name(number) for album in albums for number in album.broken]
    return [f"{counted(len(broken), 'picture')} could not be read, the first: {broken[0]}"] if broken else []


def _names(path: Path | None, features: Path | str, count: int | None) -> list[str] | None:
    """Read names of rows, one a line or a JSON list."""
    from faiss_knn.offline.features import read_class_names
    from faiss_knn.offline.formats import DataError

    if path is None:
        return None
    names = read_class_names(path)
    if len(names) != count:
        raise DataError(f"{path}: {len(names)} names for the {count} rows of {features}")
    return names
