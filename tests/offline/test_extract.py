"""From a model and a loader to files that read back as the same features."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from faiss_knn.offline.features import extract, read_features
from faiss_knn.offline.formats import DataError


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


def folder_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def other_weights(model):
    model[0].weight.data[0, 0] += 1e-3
    return model


def other_buffer(model):
    model[1].running_mean[2] = 0.5
    return model


def other_module(model):
    return nn.Sequential(model[0], model[1], nn.ReLU())


def other_setting(model):
    model[1].eps = 0.1
    return model


@pytest.mark.parametrize("change", [other_weights, other_buffer, other_module, other_setting])
def test_a_folder_of_another_model_is_refused_and_overwritten_on_request(tmp_path, data, model, change):
    loader = DataLoader(data, 4)
    extract(model, loader, tmp_path / "f", shard_rows=8)
    (tmp_path / "f" / "notes.md").write_text("mine")
    before = folder_bytes(tmp_path / "f")
    other = change(model)
    with pytest.raises(ValueError, match=r"holds features of another model .*overwrite=True"):
        extract(other, loader, tmp_path / "f", shard_rows=8)
    assert folder_bytes(tmp_path / "f") == before
    extract(other, DataLoader(data, 23), tmp_path / "f", overwrite=True)
    found = read_features(tmp_path / "f")
    np.testing.assert_allclose(found.rows[0:23], expected(other, data), rtol=1e-6)
    names = sorted(file.name for file in (tmp_path / "f").iterdir())
    assert names == ["features-00000.npy", "labels-00000.npy", "manifest.json", "notes.md"]


def first_columns(width):
    return lambda module, inputs: module(inputs)[:, :width]


def last_columns(module, inputs):
    return module(inputs)[:, 3:]


def test_another_way_to_call_the_model_is_another_model(tmp_path, data, model):
    loader = DataLoader(data, 4)
    extract(model, loader, tmp_path / "f", forward=first_columns(2))
    extract(model, loader, tmp_path / "f", forward=first_columns(2))
    for forward, autocast in [(first_columns(3), None), (last_columns, None), (first_columns(2), torch.bfloat16)]:
        with pytest.raises(ValueError, match="holds features of another model"):
            extract(model, loader, tmp_path / "f", forward=forward, autocast=autocast)


def changed(data, rows, labels):
    return TensorDataset(data.tensors[0][rows], data.tensors[1][labels])


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda data: changed(data, slice(20), slice(20)), "holds features of a data set of 23 rows, not 20"),
        (lambda data: changed(data, range(22, -1, -1), range(22, -1, -1)), "gives other rows .* within rows 0 to 8"),
        (lambda data: changed(data, slice(None), range(22, -1, -1)), "gives other rows .* within rows 0 to 8"),
        (lambda data: changed(data, [*range(14), 15, 14, *range(16, 23)], slice(None)), "within rows 8 to 16"),
    ],
)
def test_other_data_into_a_used_folder_are_refused(tmp_path, data, model, finished, other, message):
    calls = []

    def forward(module, inputs):
        calls.append(len(inputs))
        if not finished and sum(calls) > 20:
            raise RuntimeError("cut")
        return module(inputs)

    try:
        extract(model, DataLoader(data, 4), tmp_path / "f", forward=forward, shard_rows=8)
    except RuntimeError:
        assert not finished
    before = folder_bytes(tmp_path / "f")
    with pytest.raises(ValueError, match=message):
        extract(model, DataLoader(other(data), 4), tmp_path / "f", forward=forward, shard_rows=8)
    assert folder_bytes(tmp_path / "f") == before


def test_a_loader_without_a_length_is_checked_by_its_rows(tmp_path, data, model):
    batches = [(data.tensors[0][i : i + 4], data.tensors[1][i : i + 4]) for i in range(0, 20, 4)]
    extract(model, batches, tmp_path / "f", shard_rows=8)
    extract(model, iter(batches), tmp_path / "f", shard_rows=8)
    for other in (batches[:3], batches[:4], [*batches, batches[0]]):
        with pytest.raises(ValueError, match="gives other rows than those saved"):
            extract(model, other, tmp_path / "f", shard_rows=8)


class OneRank(torch.utils.data.DistributedSampler):
    def __init__(self, data, ranks=1, shuffle=False):
        super().__init__(data, ranks, 0, shuffle=shuffle)


SHUFFLING = {
    "RandomSampler": lambda data: {"sampler": RandomSampler(data), "batch_size": 4},
    "SubsetRandomSampler": lambda data: {"sampler": SubsetRandomSampler(range(9))},
    "WeightedRandomSampler": lambda data: {"sampler": WeightedRandomSampler(torch.ones(9), 9)},
    "OneRank": lambda data: {"sampler": OneRank(data, shuffle=True)},
    "batches": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 4, False)},
    "wrapped": lambda data: {"sampler": BatchSampler(RandomSampler(data), 2, True), "batch_size": None},
}  # fmt: skip


@pytest.mark.parametrize("name", SHUFFLING)
def test_samplers_that_shuffle_are_refused(tmp_path, data, model, name):
    with pytest.raises(ValueError, match="`dataloader` shuffles"):
        extract(model, DataLoader(data, **SHUFFLING[name](data)), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_part_of_the_rows_is_refused_and_the_whole_in_order_is_not(tmp_path, data, model, logged):
    with pytest.raises(ValueError, match="gives one of 2 ranks its part of the rows, some of them twice"):
        extract(model, DataLoader(data, 4, sampler=OneRank(data, 2)), tmp_path / "f")
    extract(model, DataLoader(data, 4, sampler=OneRank(data)), tmp_path / "f")
    assert len(read_features(tmp_path / "f").rows) == 23
    assert logged == []
    extract(model, DataLoader(data, 4, drop_last=True), tmp_path / "g")
    assert len(read_features(tmp_path / "g").rows) == 20
    assert "incomplete last batch are left out" in logged[0]


class Reshuffling(torch.utils.data.Sampler):
    """In another order each time, and of no kind that is known."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def __iter__(self):
        self.epoch += 1
        yield from np.random.default_rng(self.epoch).permutation(self.length).tolist()

    def __len__(self):
        return self.length


def test_an_unknown_sampler_that_shuffles_is_found_when_it_resumes(tmp_path, data, model):
    loader = DataLoader(data, 4, sampler=Reshuffling(23))
    extract(model, loader, tmp_path / "f", shard_rows=8)
    with pytest.raises(ValueError, match=r"gives other rows than those saved .*it shuffles"):
        extract(model, loader, tmp_path / "f", shard_rows=8)


def test_a_cut_folder_is_no_data_set_until_it_is_finished(tmp_path, data, model):
    def forward(module, inputs):
        if len(inputs) == 3:  # the last batch
            raise RuntimeError("cut")
        return module(inputs)

    with pytest.raises(RuntimeError, match="cut"):
        extract(model, DataLoader(data, 4), tmp_path / "f", forward=forward, shard_rows=8)
    with pytest.raises(DataError, match=r"was cut off after 16 rows: run extract again .*allow_partial=True"):
        read_features(tmp_path / "f")
    part = read_features(tmp_path / "f", allow_partial=True)
    np.testing.assert_allclose(part.rows[0:23], expected(model, data)[:16], rtol=1e-6)
    np.testing.assert_array_equal(part.labels, data.tensors[1][:16])


def test_what_the_manifest_does_not_list_or_lacks_is_refused(tmp_path, data, model):
    folder = extract(model, DataLoader(data, 4), tmp_path / "f", shard_rows=8)
    np.save(folder / "features-00007.npy", np.ones((2, 5)))
    with pytest.raises(DataError, match=r"features-00007\.npy is not listed in manifest\.json"):
        read_features(folder)
    (folder / "features-00007.npy").unlink()
    np.save(folder / "labels-00001.npy", np.zeros(7, int))
    with pytest.raises(DataError, match="7 labels for the 8 rows"):
        read_features(folder)
    (folder / "labels-00001.npy").unlink()
    with pytest.raises(DataError, match=r"labels-00001\.npy is missing"):
        read_features(folder)
    with pytest.raises(ValueError, match=r"labels-00001\.npy is missing: .*overwrite=True"):
        extract(model, DataLoader(data, 4), folder, shard_rows=8)
    (folder / "manifest.json").write_text('{"format": "faiss-knn extraction 1", "shards')
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read as JSON"):
        read_features(folder)


@pytest.mark.parametrize(("name", "text"), [("features-00000.npy", "x"), ("manifest.json", "{}")])
def test_files_of_others_are_left_alone(tmp_path, data, model, name, text):
    (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"holds {name}, of which it is not known what wrote it"):
            extract(model, DataLoader(data, 4), tmp_path, overwrite=overwrite)
    assert folder_bytes(tmp_path) == {name: text.encode()}


@pytest.mark.parametrize(("out", "shard_rows"), [("f.pt", 8), ("f.parquet", 8), ("f", 0), ("f", 2.5), ("f", True)])
def test_other_places_and_sizes_are_refused(tmp_path, data, model, out, shard_rows):
    with pytest.raises(ValueError, match=r"`out` must be|`shard_rows` must be"):
        extract(model, DataLoader(data, 4), tmp_path / out, shard_rows=shard_rows)


def test_labels_may_be_names_but_all_batches_have_them_or_none(tmp_path, data):
    rows = data.tensors[0]
    extract(nn.Identity(), [(rows[:2], ["cat", "dog"]), (rows[2:4], ["emu", "zebra"])], tmp_path / "f", shard_rows=2)
    assert read_features(tmp_path / "f").labels.tolist() == ["cat", "dog", "emu", "zebra"]
    with pytest.raises(ValueError, match="1 of 2 batches have labels"):
        extract(nn.Identity(), [(rows[:2], torch.tensor([1, 2])), (rows[2:4], None)], tmp_path / "g")


KILLED = """
import os, signal, sys
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
from faiss_knn.offline.features import extract

torch.manual_seed(0)
model = torch.nn.Linear(6, 5)
data = TensorDataset(torch.randn(23, 6), torch.arange(23) % 3)
left = int(sys.argv[2])
write, replace = np.save, os.replace

def counted(what):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return what(*args, **kwargs)
    return call

np.save, os.replace = counted(write), counted(replace)
extract(model, DataLoader(data, 4), sys.argv[1], shard_rows=8)
write(sys.argv[1] + ".done.npy", model(data.tensors[0]).detach().numpy())
"""


def test_killed_at_each_write_nothing_is_doubled_or_lost(tmp_path):
    """Three shards take 17 writes and renames; the process is killed before each of some, then run to its end."""
    for killed_at in (0, 4, 6, 9):
        folder = tmp_path / str(killed_at)
        run = [sys.executable, "-c", KILLED, str(folder)]
        assert subprocess.run([*run, str(killed_at)]).returncode == -signal.SIGKILL
        if killed_at:
            with pytest.raises(DataError, match="was cut off"):
                read_features(folder)
        subprocess.run([*run, "1000"], check=True)
        found = read_features(folder)
        np.testing.assert_allclose(found.rows[0:99], np.load(f"{folder}.done.npy"), rtol=1e-6)
        np.testing.assert_array_equal(found.labels, np.arange(23) % 3)
