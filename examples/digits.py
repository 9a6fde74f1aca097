"""What the examples share: the digits of scikit-learn in a fixed order, an autoencoder, and what is scored."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

EPOCHS, BATCH, RATE = 3, 64, 0.002


class Digits(Dataset[dict[str, Tensor]]):
    """8 × 8 images in [0, 1] as 64 numbers, their digits, and their places in the data set."""

    def __init__(self, split: str) -> None:
        images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        order = order[:1347] if split == "train" else order[1347:]
        self.images, self.labels = images[order].float() / 16, labels[order]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "label": self.labels[i], "index": torch.tensor(i)}


class Autoencoder(nn.Module):
    """Its forward takes a batch by name and returns the loss and the features; labels and places it passes over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(64, 8), nn.Linear(8, 64)

    def forward(self, image: Tensor, label: Tensor | None = None, index: Tensor | None = None) -> dict[str, Tensor]:
        embedding = self.encoder(image)
        return {"loss": (self.decoder(embedding) - image).square().mean(), "embedding": embedding}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=RATE)


def knn_options() -> dict[str, Any]:
    """The arguments of OnlineEvaluator and OnlineKNN, which are the same."""
    return {
        "name": "knn",
        "input": "embedding",
        "target": "label",
        "id": "index",  # each sample counts once, however often a sampler that evens out ranks repeats it
        "queue_length": 1347,
        "metrics": {"acc": MulticlassAccuracy(10, average="micro")},
        "k": (1, 20),
        "diagnostics": ("effective_rank", "neighbor_churn"),
    }
