"""No factory string ends the process, hangs, or is answered with FAISS's own source."""

import pytest
import torch

from faiss_knn import FeatureBank, KNNIndex, OnlineEvaluator, OnlineKNN, evaluate
from faiss_knn.search import index as index_module
from faiss_knn.sklearn import KNNClassifier, KNNTransformer
from tests.online.parts import Echo, clusters, loader, trainer

ROWS = torch.randn(1200, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "spec",
    [
        "HNSW0",
        "HNSW1",
        "IVF8_HNSW0,Flat",
        "PQ4x0",
        "NSG0",
        "NSG1",
        "HNSW1000000",
        "RR0,Flat",
        "LSQ0x4",
        "RQ0x4",
        "IVF0,Flat",
    ],
)
def test_numbers_that_faiss_would_die_of_are_refused_at_once(spec):
    with pytest.raises(ValueError, match="`spec` must have") as refused:
        KNNIndex(spec)
    assert repr(spec) in str(refused.value)


@pytest.mark.parametrize("spec", ["HNSW32_SQ8", "RaBitQ", "IVF8,RaBitQ"])
def test_what_faiss_can_only_tell_by_dying_is_tried_in_another_process(spec):
    for distance, dies in (("manhattan", True), ("euclidean", False)):
        index = KNNIndex(spec, distance_metric=distance)
        if dies:
            with pytest.raises(ValueError, match="ends the whole process"):
                index.build(ROWS)
        else:
            assert index.build(ROWS).search(ROWS[:3], 2).indices.shape == (3, 2)


@pytest.mark.parametrize("spec", ["IDMap,Flat", "nonsense", "Flat,Flat", ",,", "IVFx,Flat", "PQ3", "NSG16"])
@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_errors_are_in_words(spec, distance):
    with pytest.raises(ValueError, match=r"^`(spec|features)` must") as refused:
        KNNIndex(spec, distance_metric=distance).build(ROWS[:50]).search(ROWS[:2], 1)
    assert not any(part in str(refused.value) for part in ("::", ".cpp", "/project", " failed:"))


@pytest.mark.parametrize("spec", ["flatt", "IVFx,Flat", "IVF64,Flatt", "Flat,Flat", ",,", "HNSW32,Flat,"])
def test_what_faiss_cannot_parse_is_refused_before_there_are_rows(spec):
    with pytest.raises(ValueError, match=r"^`spec` must be 'flat'.*got '.*': could not parse"):
        KNNIndex(spec)


@pytest.mark.parametrize("spec", ["PQ3", "PCA80,Flat", "PQ96x4fs,RFlat", "IMI2x8,Flat"])
def test_what_depends_on_the_width_waits_for_rows(spec):
    assert KNNIndex(spec).spec == spec


def test_without_faiss_no_string_is_refused_that_faiss_would_read(monkeypatch):
    def missing(*_):
        raise ImportError("FAISS is not installed")

    monkeypatch.setattr(index_module, "make_index", missing)
    index_module._check_spelling.cache_clear()
    assert KNNIndex("flatt").spec == "flatt"
    index_module._check_spelling.cache_clear()


LABELS = torch.arange(1200) % 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: OnlineKNN("knn", "embedding", "label", 64, index="flatt"),
        lambda: OnlineEvaluator("knn", "embedding", "label", 64, index="flatt"),
        lambda: FeatureBank(ROWS, LABELS, index="flatt"),
        lambda: FeatureBank(ROWS, LABELS, index="PQ3"),
        lambda: evaluate(ROWS, LABELS, ROWS[:9], LABELS[:9], index="flatt"),
        lambda: evaluate(ROWS, LABELS, ROWS[:9], LABELS[:9], index=("flat", "PQ3")),
        lambda: KNNClassifier(index="flatt").fit(ROWS.numpy(), LABELS.numpy()),
        lambda: KNNTransformer(index="PQ3").fit(ROWS.numpy()),
    ],
)
def test_a_bad_string_is_called_by_the_argument_that_it_was_given_as(make):
    with pytest.raises(ValueError, match=r"^`index` must be 'flat', 'ivf', 'fast', 'auto' or a FAISS factory string"):
        make()


def test_codes_in_a_graph_need_rows_for_their_training():
    with pytest.raises(ValueError, match="1000 rows or more"):
        KNNIndex("HNSW32_PQ4").build(ROWS[:50])


def test_a_bad_string_ends_a_run_at_its_first_step():
    class Counting(Echo):
        steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    callback = OnlineKNN("knn", "embedding", "label", 64, distance_metric="manhattan", index="RaBitQ")
    with pytest.raises(ValueError, match=r"^`index` must be .*ends the whole process"):
        trainer(callback).fit(module, loader(**clusters(64)), loader(**clusters(16, seed=1)))
    assert module.steps == 1
