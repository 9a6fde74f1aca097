"""The examples run, and the four ways to train score the same rows to the same bits."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DIAGNOSTICS = ("effective_rank", "neighbor_churn")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps this small gain nothing by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example():
    """Imports an example by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module


@pytest.fixture(scope="module")
def of_plain_loop(example):
    return example("plain_loop").main()


def test_the_plain_loop_learns(of_plain_loop):
    assert list(of_plain_loop) == [f"eval/knn_{name}" for name in ("k1_acc", "k20_acc", *DIAGNOSTICS)]
    assert of_plain_loop["eval/knn_k20_acc"] > 0.6


@pytest.mark.parametrize(
    ("name", "library", "options"),
    [
        ("accelerate_loop", "accelerate", {"cpu": True}),
        ("huggingface_trainer", "transformers", {"use_cpu": True, "disable_tqdm": True}),
        ("lightning_trainer", "lightning", {"accelerator": "cpu", "enable_progress_bar": False}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # those of the other libraries
def test_every_trainer_scores_as_the_plain_loop_does(name, library, options, of_plain_loop, example):
    pytest.importorskip(library)
    found = example(name).main(**options)
    assert {key.replace("eval_", "eval/"): value for key, value in found.items()} == of_plain_loop


def test_on_two_ranks_the_plain_loop_scores_the_same_samples(of_plain_loop):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "plain_loop.py")],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3  # rank zero's
    found = {key: float(value) for key, value in re.findall(r"'(eval/\w+)': ([\d.]+)", lines[-1])}
    assert found == pytest.approx(of_plain_loop, abs=0.03)  # gradients are averaged in another order


def test_the_page_names_examples_that_are_there():
    named = set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text()))
    assert len(named) > 4
    assert named <= {path.name for path in EXAMPLES.glob("*.py")}
