"""The documentation: each page's Python blocks are run in order, its commands parsed, and its names looked up."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import faiss_knn
from faiss_knn.offline.cli import parse
from tests.printed import assert_printed, python_blocks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
TEXTS = {page: (DOCS / page).read_text() for page in PAGES}
COMMANDS = [
    line.split("  #")[0].strip()
    for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
]


# The blocks of sklearn.md need libraries of others: tests/test_sklearn_takers.py runs those that are installed.
RUN = [page for page in PAGES if "```python" in TEXTS[page] and page != "sklearn.md"]


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on small runs
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_print_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks, names = python_blocks(TEXTS[page]), {"__name__": "__main__"}
    assert len(blocks) == TEXTS[page].count("```python")
    for code, printed in blocks:
        capsys.readouterr()
        exec(compile(code, page, "exec"), names)
        shown = capsys.readouterr().out
        if printed:
            assert_printed(shown, printed)


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("faiss-knn")}))
def test_commands_of_the_pages_are_understood(command):
    parse(shlex.split(command)[1:])


def test_scripts_of_the_pages_are_there():
    for command in COMMANDS:
        words = shlex.split(command)
        if words and words[0] in ("bash", "python") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), command


def test_the_reference_has_every_public_name():
    told = set(re.findall(r"^::: faiss_knn\.(\w+)$", "".join(TEXTS.values()), re.MULTILINE))
    assert set(faiss_knn.__all__) <= told


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(site["nav"])) == PAGES
    assert site["theme"]["font"] is False  # nothing is fetched by a reader's browser either


def test_pages_link_only_to_pages():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("https://") or ((DOCS / page).parent / target).resolve().is_file(), (page, target)
