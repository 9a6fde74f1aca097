"""A report as Markdown."""

import re

from faiss_knn.offline.report.content import Section, Table


def markdown(title: str, sections: list[Section], plots: dict[str, str]) -> str:
    """Render the sections; `plots` are file names by plot name."""
    return (
        "\n\n".join([f"# {_escaped(title)}", *(part for section in sections for part in _parts(section, plots))]) + "\n"
    )


def _parts(section: Section, plots: dict[str, str]) -> list[str]:
    parts = [f"## {section.title}", *map(_escaped, section.text)]
    parts += ["\n".join(f"- **{_escaped(warning)}**" for warning in section.warnings)] if section.warnings else []
    if section.plot in plots:
        parts.append(f"![{section.title}]({plots[section.plot]})")
    return parts + ([_table(section.table)] if section.table else [])


def _table(table: Table) -> str:
    marks = ["---" if i < table.words else "---:" for i in range(len(table.headings))]
    rows = [table.headings, marks, *table.rows]
    return "\n".join(
        "| " + " | ".join(_escaped(cell) if row is not marks else cell for cell in row) + " |" for row in rows
    )


def _escaped(text: str) -> str:
    """Escape what Markdown would render: raw HTML, and a bar, which ends a table's cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"([\\|`*_\[\]$])", r"\\\1", text).split())
