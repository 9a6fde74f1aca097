"""The examples of docs/online.md print what stands below them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent.parent / "docs/online.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", PAGE, re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+")


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_print_what_the_page_says(code, printed, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert NUMBER.sub("#", shown.stdout) == NUMBER.sub("#", printed)
    values = [[float(x) for x in NUMBER.findall(text)] for text in (shown.stdout, printed)]
    assert values[0] == pytest.approx(values[1], abs=0.05)  # training differs a little between machines


def test_every_example_has_its_output():
    assert len(EXAMPLES) == PAGE.count("```python")
