"""Every command and example of the README is run, or, where it installs, checked to name what exists."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.printed import assert_printed, python_blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = python_blocks(README)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
NUMBER = re.compile(r"\d+\.\d+")


def run(arguments, cwd, **environment):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_what_these_tests_look_for():
    assert len(EXAMPLES) == README.count("```python") == 2
    assert {command.split()[0] for command in COMMANDS} == {"bash", "faiss-knn", "pip", "conda"}


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_print_what_the_readme_says(code, printed, tmp_path):
    assert_printed(run([sys.executable, "-W", "ignore", "-c", code], tmp_path), printed)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("faiss-knn")])
def test_eval_commands_run(command, tmp_path):
    features, labels = load_digits(return_X_y=True)
    np.savez(tmp_path / "train.npz", features=features[:1347], labels=labels[:1347])
    np.savez(tmp_path / "test.npz", features=features[1347:], labels=labels[1347:])
    _, header, *rows = run(shlex.split(command), tmp_path).splitlines()
    assert header.split()[:5] == ["index", "k", "T", "vote", "top1"]
    assert rows
    assert not (tmp_path / "report").exists() or (tmp_path / "report/report.html").stat().st_size


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash")])
def test_scripts_are_there_and_parse(command):
    run(["bash", "-n", *command.split()[1:]], ROOT)


@pytest.mark.timeout(600)
def test_the_demo_ends_with_what_ran_the_numbers_and_where_the_files_are(tmp_path):
    what, numbers, where = run(["bash", ROOT / "scripts/demo.sh"], tmp_path, OUT="demo").splitlines()[-3:]
    assert "20 epochs with OnlineKNN" in what
    first, last, best = (float(x) for x in NUMBER.findall(numbers)[:3])
    assert first < last
    assert min(last, best) > 0.93
    assert str(tmp_path / "demo/report/report.html") in where
    for name in ("train.npz", "test.npz", "training.log", "report/results.jsonl", "report/report.html"):
        assert (tmp_path / "demo" / name).stat().st_size


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("pip", "conda"))])
def test_installation_commands_name_what_exists(command):
    words = shlex.split(command)
    if words[0] == "conda":
        assert words[1:4] == ["env", "create", "-f"]
        assert (ROOT / words[4]).is_file()
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.fullmatch(r"\.\[([\w,]+)\]", words[-1]).group(1).split(",")
        assert set(named) <= set(extras)
