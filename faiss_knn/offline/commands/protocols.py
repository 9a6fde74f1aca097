"""`faiss-knn protocols`: what other libraries count as a k-NN number."""

import argparse
from textwrap import fill

from faiss_knn.protocol import Protocol, protocols

_WIDTH = 100
_COLUMNS = ("protocol", "k", "T", "weighting", "distance", "features", "top", "bank")


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Print a table of settings, and below it where each is from and what to know of it."""
    del given
    if first:
        print("\n".join([*_table(), "", *_notes()]))
    return 0


def _table() -> list[str]:
    rows = [_COLUMNS, *(_row(name, protocol) for name, protocol in protocols().items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(name: str, protocol: Protocol) -> tuple[str, ...]:
    steps = {"centred": protocol.center, "normalised": protocol.normalize}
    return (
        name,
        " ".join(map(str, protocol.k)),
        "-" if protocol.weighting == "uniform" else f"{protocol.temperature:g}",
        protocol.weighting,
        protocol.distance_metric,
        ", ".join(step for step, taken in steps.items() if taken) or "as they are",
        " ".join(map(str, protocol.top)),
        _bank(protocol),
    )


def _bank(protocol: Protocol) -> str:
    if protocol.draws is not None:
        return "{} per class, {} draws".format(*protocol.draws)
    return "without the query" if protocol.excludes_self else "whole"


def _notes() -> list[str]:
    notes = []
    for name, protocol in protocols().items():
        text = f"{protocol.source}. {protocol.quirks} Equal votes: {protocol.tie_break}."
        notes += [name, fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)]
    return notes
