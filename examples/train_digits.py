#!/usr/bin/env python3
"""Train a small encoder on the digits of scikit-learn without labels, and watch its features with OnlineKNN.

Two augmented views of each image are pulled together and away from all other images (NT-Xent, Chen et al. 2020,
arXiv 2002.05709, equation 1). The labels serve the k-NN vote alone. Writes the features of both splits as .npz files.
"""

import argparse
import logging
import math
import pathlib
import sys
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import FeatureBank, OnlineKNN


class Digits(Dataset[dict[str, Tensor]]):
    """8 × 8 grey images in [0, 1] and their digits."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
        self.labels = torch.from_numpy(labels).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "label": self.labels[i]}


def augment(images: Tensor) -> Tensor:
    """Rotate, scale, shift and add noise, each image by its own draw."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * math.radians(40)
    scale = 1 + (torch.rand(n) - 0.5) * 0.4
    shift = (torch.rand(n, 2) - 0.5) * 0.4
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.1 * torch.randn_like(images)


def contrastive_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent of two views (B, d): each row's positive is its other view, all other rows are negatives."""
    views = F.normalize(torch.cat([one, other]), dim=1)
    similarity = views @ views.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    positives = torch.arange(len(views), device=views.device).roll(len(one))
    return F.cross_entropy(similarity, positives)


class Contrastive(L.LightningModule):
    """A convolutional encoder with an 8-d embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(1024, 8),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        one, other = (self(augment(batch["image"])) for _ in range(2))
        return {"loss": contrastive_loss(one, other, temperature=0.2), "embedding": one}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"embedding": self(batch["image"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=7e-4)


class PrintAccuracy(L.Callback):
    """Print what OnlineKNN logged, a line per epoch."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        score = trainer.callback_metrics.get("eval/knn_acc")
        if score is not None:
            bar = trainer.progress_bar_callback
            (bar.print if bar else print)(f"epoch {trainer.current_epoch + 1:2d}  eval/knn_acc {score:.3f}")


@torch.no_grad()
def embed(model: Contrastive, data: Digits) -> Tensor:
    """Embed the images as they are, in evaluation mode."""
    features = model.eval()(data.images.to(model.device)).cpu()
    model.train()
    return features  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/digits"), help="folder for features")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    L.seed_everything(args.seed, workers=True, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # its advice on workers and its own deprecations

    images, labels = load_digits(return_X_y=True)
    split: list[Any] = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=args.seed)
    train, test = Digits(split[0], split[2]), Digits(split[1], split[3])
    model = Contrastive()
    bank = FeatureBank(embed(model, train), train.labels, distance_metric="cosine")
    accuracy = (bank.predict(embed(model, test)).argmax(1) == test.labels).float().mean()
    print(f"{len(train)} training images, {len(test)} validation images; random encoder: k-NN accuracy {accuracy:.3f}")

    knn = OnlineKNN(
        name="knn", input="embedding", target="label", queue_length=len(train),
        metrics={"acc": MulticlassAccuracy(num_classes=10, average="micro")}, input_dim=8, distance_metric="cosine",
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=args.epochs, callbacks=[knn, PrintAccuracy()], logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=sys.stderr.isatty(), num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(train, 128, shuffle=True, drop_last=True), DataLoader(test, 256))

    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in (("train", train), ("test", test)):
        np.savez(args.out / f"{name}.npz", features=embed(model, data).numpy(), labels=data.labels.numpy())
    print(f"features written to {args.out}/train.npz and {args.out}/test.npz")


if __name__ == "__main__":
    main()
