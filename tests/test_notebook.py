"""The notebooks are run, cell by cell."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    cells = json.loads((ROOT / "examples" / name).read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    assert (tmp_path / "results/report.html").stat().st_size
    shown = capsys.readouterr().out
    assert "3 of 450 queries are in the bank" in shown
    assert int(re.search(r"(\d) of the 8 changed labels", shown).group(1)) >= 5
