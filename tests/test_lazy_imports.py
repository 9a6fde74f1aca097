"""What is loaded when: the front door alone loads nothing heavy, and only training loads Lightning."""

import subprocess
import sys
from pathlib import Path

import pytest

import faiss_knn

ROOT = Path(__file__).parent.parent


def modules_after(statement):
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_import_alone_loads_nothing_heavy():
    heavy = {"torch", "lightning", "pytorch_lightning", "faiss", "numpy", "torchmetrics", "sklearn", "matplotlib"}
    assert not modules_after("import faiss_knn, faiss_knn.offline.cli") & heavy


@pytest.mark.parametrize(
    "statement",
    [
        "from faiss_knn import KNNIndex, FeatureBank, vote, evaluate, EvalReport, retrieval_metrics",
        "import faiss_knn.online.evaluation",  # a validation epoch
    ],
)
def test_lightning_is_left_alone_without_a_callback(statement):
    assert not modules_after(statement) & {"lightning", "pytorch_lightning"}


def test_faiss_waits_for_a_factory_string():
    assert "faiss" not in modules_after("from faiss_knn import KNNIndex; KNNIndex(); KNNIndex('auto')")


def test_every_public_name_is_there_and_listed():
    for name in faiss_knn.__all__:
        assert getattr(faiss_knn, name).__name__ == name
        assert name in dir(faiss_knn)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = faiss_knn.nope
