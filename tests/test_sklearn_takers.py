"""The examples of docs/sklearn.md: each library that is installed gets from our neighbours what it finds by its own."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import DBSCAN
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsTransformer
from sklearn.pipeline import make_pipeline

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # 150 rows are done long before numba has compiled UMAP

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs/sklearn.md").read_text(), re.DOTALL)
FEATURES, LABELS = load_digits(return_X_y=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # those libraries' own


def run_example(of):
    """What the names of the example that says `of` stand for after it."""
    (code,) = (block for block in BLOCKS if of in block)
    names = {"features": FEATURES, "labels": LABELS}
    exec(code, names)
    return names


def test_the_page_has_these_examples():
    assert len(BLOCKS) == 5


def test_scikit_learn(capsys):
    run_example("GridSearchCV")
    assert re.fullmatch(r"\{.*\} 0\.9\d+", capsys.readouterr().out.strip())
    clusters = run_example("DBSCAN")["clusters"]
    theirs = make_pipeline(KNeighborsTransformer(n_neighbors=10), DBSCAN(eps=22, min_samples=5, metric="precomputed"))
    assert clusters.max() > 5
    np.testing.assert_array_equal(clusters, theirs.fit_predict(FEATURES))


def test_umap_draws_the_same():
    umap = pytest.importorskip("umap")
    ours = run_example("import umap")["flat"]
    theirs = umap.UMAP(n_neighbors=15, n_epochs=10, n_jobs=1, random_state=0).fit_transform(FEATURES[:150])
    np.testing.assert_array_equal(ours, theirs)


def test_scanpy_connects_the_same():
    sc = pytest.importorskip("scanpy")
    cells = run_example("import scanpy")["cells"]
    theirs = cells.copy()
    sc.pp.neighbors(theirs, use_rep="X", transformer=KNeighborsTransformer(n_neighbors=15))
    for name in ("distances", "connectivities"):
        assert cells.obsp[name].nnz == theirs.obsp[name].nnz
        np.testing.assert_allclose(cells.obsp[name].toarray(), theirs.obsp[name].toarray(), rtol=1e-5, atol=1e-3)
    sc.pp.neighbors(theirs, n_neighbors=15, use_rep="X")
    own = theirs.obsp["connectivities"].toarray()
    np.testing.assert_allclose(cells.obsp["connectivities"].toarray(), own, rtol=1e-5, atol=1e-3)


def test_cleanlab_finds_the_same_issues():
    cleanlab = pytest.importorskip("cleanlab")
    pytest.importorskip("datasets")
    ours = run_example("Datalab")["lab"].issues
    theirs = cleanlab.Datalab({"label": LABELS[:150]}, label_name="label", verbosity=0)
    theirs.find_issues(features=FEATURES[:150])
    assert {"outlier_score", "near_duplicate_score"} <= set(ours.columns)
    for name in ours.columns:
        np.testing.assert_allclose(ours[name].astype(float), theirs.issues[name].astype(float), atol=1e-12)
