"""Pictures of the queries that a vote got most wrong, as loggers get them."""

import math

import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from faiss_knn import OnlineEvaluator, OnlineKNN
from faiss_knn.online.gallery import as_picture
from tests.online.parts import Echo, clusters, loader, trainer

TRAIN, VAL = clusters(100, spread=4.0), clusters(70, spread=4.0, seed=1)
IMAGES = torch.arange(70.0)[:, None, None, None] * torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # (70, 1, 2, 2)
VAL["image"] = IMAGES


class Pictures(Logger):
    """Takes pictures as Lightning's WandbLogger does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name, version, experiment = "pictures", 0, None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, images, step, kwargs["caption"]))


def knn(kind=OnlineKNN, **options):
    return kind("knn", "embedding", "label", 100, **{"k": 5, "num_classes": 4, "gallery": "image"} | options)


def wrongness():
    """By how much the best other class outvotes each query's own, its vote, and its neighbours, in float64."""
    found = []
    for query, label in zip(VAL["x"].double(), VAL["label"].tolist(), strict=True):
        distances, order = (TRAIN["x"].double() - query).norm(dim=1).sort(stable=True)
        votes = [0.0] * 4
        for distance, row in zip(distances[:5].tolist(), order[:5].tolist(), strict=True):
            votes[TRAIN["label"][row]] += 1 / (distance + 0.07)
        shares = [vote / sum(votes) for vote in votes]
        best = max((share, -c) for c, share in enumerate(shares) if c != label)[0]
        near = [(int(TRAIN["label"][row]), float(d)) for d, row in zip(distances[:5], order[:5], strict=True)]
        found.append((best - shares[label], shares, near))
    return found


def captions(rows):
    every = wrongness()
    worst = sorted(range(70), key=lambda row: (-every[row][0], row))[:rows]
    texts = []
    for row in worst:
        _, shares, near = every[row]
        voted = shares.index(max(shares))
        nearest = ", ".join(f"{label} ({distance:.3g})" for label, distance in near)
        texts.append(f"label {int(VAL['label'][row])}, voted {voted} ({shares[voted]:.2f}), nearest {nearest}")
    return texts, worst


def fit(logger, epochs=1, **options):
    run = trainer(knn(**options), max_epochs=epochs, logger=logger)
    run.fit(Echo(), loader(**TRAIN), loader(**VAL))
    return run


@pytest.mark.parametrize(("gallery", "rows"), [("image", 8), ({"key": "image", "rows": 3}, 3)])
def test_the_most_wrong_are_shown_once_an_epoch(gallery, rows):
    logger = Pictures()
    fit(logger, epochs=2, gallery=gallery)
    texts, worst = captions(rows)
    assert [call[0] for call in logger.calls] == ["eval/knn_gallery"] * 2
    assert [call[2] for call in logger.calls] == [7, 14]  # steps
    assert wrongness()[worst[0]][0] > 0.3
    for _, images, _, caption in logger.calls:
        assert caption == texts
        for image, row in zip(images, worst, strict=True):
            assert torch.equal(image, as_picture(IMAGES[row]))


def test_none_is_shown_unasked_nor_again_where_no_score_is_due():
    logger = Pictures()
    fit(logger, gallery=None)
    assert logger.calls == []
    fit(logger, epochs=3, every_n_epochs=2)
    assert [call[2] for call in logger.calls] == [14]


def test_tensorboard_gets_pictures_and_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(logger, gallery={"key": "image", "rows": 2})
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    assert events.Tags()["images"] == ["eval/knn_gallery/0", "eval/knn_gallery/1"]
    assert (events.Images("eval/knn_gallery/0")[0].width, events.Images("eval/knn_gallery/0")[0].step) == (2, 7)
    (text,) = events.Tensors("eval/knn_gallery/text_summary")[0].tensor_proto.string_val
    assert text.decode() == "0. {}\n1. {}".format(*captions(2)[0])


def test_the_evaluator_has_them_among_its_results():
    evaluator = knn(OnlineEvaluator, gallery={"key": "image", "rows": 2})
    evaluator.observe(embedding=TRAIN["x"], label=TRAIN["label"])
    evaluator.start()
    evaluator.score(embedding=VAL["x"], label=VAL["label"], image=VAL["image"])
    evaluator.finish()
    assert [picture.caption for picture in evaluator.results["eval/knn_gallery"]] == captions(2)[0]
    evaluator.start()
    with pytest.raises(ValueError, match="Key 'image' not found"):
        evaluator.score(embedding=VAL["x"], label=VAL["label"])


def test_rows_that_do_not_count_are_not_shown():
    evaluator = knn(OnlineEvaluator, gallery={"key": "image", "rows": 64})
    evaluator.observe(embedding=TRAIN["x"], label=TRAIN["label"])
    labels, features = VAL["label"].clone(), VAL["x"].clone()
    labels[::2], features[1::4] = -1, math.nan
    evaluator.start()
    evaluator.score(embedding=features, label=labels, image=VAL["image"])
    evaluator.finish()
    shown = {picture.image.tolist().__repr__() for picture in evaluator.results["eval/knn_gallery"]}
    assert len(evaluator.results["eval/knn_gallery"]) == 17  # rows 3, 7, …, 67
    assert len(shown) == 1  # each stretched to its own range


@pytest.mark.parametrize("shape", [(3, 20, 30), (20, 30, 3), (1, 20, 30), (20, 30), (20, 30, 1), (5, 20, 30)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_images_of_any_form_become_pictures(shape, dtype):
    image = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
    picture = as_picture(image)
    assert (picture.shape, picture.dtype) == ((3, 20, 30), torch.float32)
    assert 0 <= float(picture.min()) < 0.05
    assert 0.95 < float(picture.max()) <= 1
    if dtype == torch.uint8 and shape == (20, 30):
        assert torch.equal(picture[0], image / 255)


def test_large_images_are_made_small():
    assert as_picture(torch.rand(3, 1024, 512)).shape == (3, 128, 64)
    assert torch.equal(as_picture(torch.full((2, 2), math.nan)), torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        (3, "`gallery` key must be a name, got 3"),
        ({"rows": 3}, "`gallery` must be None, the key of the images, or"),
        ({"key": "image", "colour": 1}, "`gallery` must be None, .* with key, colour"),
        ({"key": "image", "rows": 0}, "`gallery` rows must be a positive integer, got 0"),
        ({"key": "image", "rows": 1000}, "`gallery` rows must be at most 64, got 1000"),
    ],
)
def test_bad_options_are_named(gallery, message):
    with pytest.raises(ValueError, match=message):
        knn(gallery=gallery)


def test_what_cannot_be_shown_is_named():
    with pytest.raises(ValueError, match="`gallery` needs search='batch'"):
        knn(search="epoch")
    evaluator = knn(OnlineEvaluator)
    evaluator.observe(embedding=TRAIN["x"], label=TRAIN["label"])
    evaluator.start()
    with pytest.raises(ValueError, match=r"`gallery` needs an image for each of 70 rows, .*, got shape \(70, 4\)"):
        evaluator.score(embedding=VAL["x"], label=VAL["label"], image=IMAGES.flatten(1))
