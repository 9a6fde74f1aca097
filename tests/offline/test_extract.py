"""From a model and a loader to files that read back as the same features."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from faiss_knn.offline.features import extract, read_features


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(23, 6, generator=generator), torch.arange(23) % 3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))


def expected(model, data):
    copy = nn.Sequential(*model).eval()
    with torch.no_grad():
        return copy(data.tensors[0]).numpy()


@pytest.mark.parametrize("out", ["features.npz", "folder"])
def test_features_of_every_row_in_eval_mode(tmp_path, data, model, out):
    model.train()
    model[2].eval()  # a mode that must come back
    path = extract(model, DataLoader(data, 4), tmp_path / out, shard_rows=8)
    assert [module.training for module in model] == [True, True, False]
    found = read_features(path)
    model_rows = expected(model, data)
    np.testing.assert_allclose(found.rows[0:23], model_rows, rtol=1e-6)
    np.testing.assert_array_equal(found.labels, data.tensors[1])
    if out == "folder":
        assert len(list(path.glob("features-*.npy"))) == 3


def test_a_run_that_was_cut_goes_on_after_the_last_whole_shard(tmp_path, data, model):
    calls = []

    def forward(module, inputs):
        calls.append(len(inputs))
        if len(calls) == 4:
            raise RuntimeError("cut")
        return module(inputs)

    loader = DataLoader(data, 4)
    with pytest.raises(RuntimeError, match="cut"):
        extract(model, loader, tmp_path / "f", forward=forward, shard_rows=8)
    with pytest.raises(
        ValueError, match="end at row 8, inside a batch of rows 5 to 10: use the batch size of the first"
    ):
        extract(model, DataLoader(data, 5), tmp_path / "f", forward=forward, shard_rows=8)
    extract(model, loader, tmp_path / "f", forward=forward, shard_rows=8)
    assert len(calls) == 4 + 4  # the first two batches were saved
    np.testing.assert_allclose(read_features(tmp_path / "f").rows[0:23], expected(model, data), rtol=1e-6)
    extract(model, loader, tmp_path / "f", forward=forward, shard_rows=8)
    assert len(calls) == 8


def test_forward_and_unpack_fit_other_models_and_loaders(tmp_path, data):
    batches = [{"image": data.tensors[0], "label": data.tensors[1]}]
    path = extract(
        nn.Identity(), batches, tmp_path / "a.npz",
        forward=lambda model, inputs: model(inputs)[:, :2], unpack=lambda batch: (batch["image"], batch["label"]),
    )  # fmt: skip
    np.testing.assert_array_equal(read_features(path).rows, data.tensors[0][:, :2])


def test_features_without_labels_and_under_autocast(tmp_path, data, model):
    path = extract(model, [data.tensors[0]], tmp_path / "a.npz", autocast=torch.bfloat16)
    found = read_features(path)
    assert (found.labels, found.rows.dtype) == (None, np.float32)
    np.testing.assert_allclose(found.rows, expected(model, data), atol=0.05)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda data: DataLoader(data, 4, shuffle=True), "`dataloader` shuffles"),
        (lambda data: [{"x": 1}], "a batch must be .inputs, labels., got a dict: say how to unpack it"),
        (lambda data: [], "`dataloader` gave no batch"),
        (lambda data: [(data.tensors[0], data.tensors[1][:3])], "3 labels for 23 features"),
        (lambda data: [(data.tensors[0].view(-1, 1, 6), None)], r"must give \(B, d\) features, got shape \(23, 1, 6\)"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, data, loader, message):
    with pytest.raises(ValueError, match=message):
        extract(nn.Identity(), loader(data), tmp_path / "a.npz")
