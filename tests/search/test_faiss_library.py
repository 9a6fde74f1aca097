"""What FAISS runs on, tried in processes of their own: it is chosen once, at import."""

import os
import re
import subprocess
import sys

import pytest

from faiss_knn.search.engines.faiss_library import openblas_kernels
from faiss_knn.search.precision import cpu_flags

FULL = frozenset({"avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"})


def run(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        (FULL, "SkylakeX"),
        (FULL - {"avx512vl"}, "Haswell"),
        (frozenset({"avx2"}), None),
        (frozenset(), None),
    ],
)
def test_kernels_are_named_only_where_the_cpu_has_them(flags, kernels):
    assert openblas_kernels(flags) == kernels


def test_faiss_runs_the_kernels_of_the_cpu_and_leaves_the_environment_alone():
    said = run(
        "import os; from faiss_knn.search.engines import faiss_library; faiss_library.faiss();"
        "print(faiss_library.openblas_core(), 'OPENBLAS_CORETYPE' in os.environ)"
    )
    core, left = said.split()
    if core != "None" and openblas_kernels(cpu_flags()) is not None:
        assert core not in ("Prescott", "Barcelona")
    assert left == "False"


def test_a_users_choice_of_kernels_stays():
    said = run(
        "import os; from faiss_knn.search.engines import faiss_library; faiss_library.faiss();"
        "print(os.environ['OPENBLAS_CORETYPE'])",
        OPENBLAS_CORETYPE="Haswell",
    )
    assert said.strip() == "Haswell"


OLD_KERNELS = (
    "import os, torch, faiss; {after}; from faiss_knn import KNNIndex;"
    "x = torch.randn(500, 8); [KNNIndex('Flat').build(x) for _ in range(2)]"
)


@pytest.mark.skipif(openblas_kernels(cpu_flags()) is None, reason="needs a CPU with better kernels than SSE3's")
def test_faiss_imported_before_with_slow_kernels_is_told_once():
    said = run(OLD_KERNELS.format(after="del os.environ['OPENBLAS_CORETYPE']"), OPENBLAS_CORETYPE="Prescott")
    if "openblas" not in run("import faiss; print(open('/proc/self/maps').read())"):
        pytest.skip("this FAISS brings no OpenBLAS")
    assert said.count("its OpenBLAS runs Prescott kernels") == 1
    assert f"set OPENBLAS_CORETYPE={openblas_kernels(cpu_flags())}" in said
    advised = re.search(r"call (\S+)\.(\w+\(\)) before", said)
    assert advised, said
    module, call = advised.groups()
    core = run(f"import {module} as library; library.{call}; import faiss; print(library.openblas_core())")
    assert core.strip() == openblas_kernels(cpu_flags())


def test_slow_kernels_that_the_user_chose_are_not_remarked_on():
    assert "OpenBLAS" not in run(OLD_KERNELS.format(after="pass"), OPENBLAS_CORETYPE="Prescott")


def test_an_import_that_fails_says_how_to_install_and_leaves_the_environment_alone(tmp_path):
    (tmp_path / "faiss.py").write_text("raise RuntimeError('libcudart is missing')")
    said = run(
        "import os, torch; from faiss_knn.search.engines import faiss_library; before = dict(os.environ)\n"
        "try: faiss_library.faiss()\n"
        "except ImportError as error: print(error, before == os.environ)",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )
    assert "pip install faiss-cpu" in said
    assert said.split()[-3:] == ["is", "missing)", "True"]


def test_searches_leave_thread_counts_and_thresholds_alone():
    said = run(
        "import torch; torch.set_num_threads(1); from faiss_knn import KNNIndex;"
        "from faiss_knn.search.engines import faiss_library;"
        "f = faiss_library.faiss(); before = f.omp_get_max_threads(), f.cvar.distance_compute_blas_threshold;"
        "x = torch.randn(500, 8);"
        "[KNNIndex(s).build(x).search(x[:3], 2) for s in ('flat', 'Flat', 'ivf')];"
        "print(before == (f.omp_get_max_threads(), f.cvar.distance_compute_blas_threshold), torch.get_num_threads())"
    )
    assert said.split()[-2:] == ["True", "1"]


def test_flat_needs_no_faiss():
    said = run(
        "import sys; sys.modules['faiss'] = None; import torch; from faiss_knn import KNNIndex;"
        "print(KNNIndex().build(torch.eye(3)).search(torch.eye(3), 1).indices.tolist())"
    )
    assert said.strip() == "[[0], [1], [2]]"
