"""A module that hands its batches through, and trainers that stay silent."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: column[i] for key, column in self.columns.items()}


def loader(batch_size: int = 16, **columns: Tensor) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(**columns), batch_size)


def clusters(n: int, classes: int = 4, d: int = 8, spread: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Rows around one centre per class; the centres do not depend on the seed."""
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99)) * 3
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return {"x": centres[labels] + spread * torch.randn(n, d, generator=generator), "label": labels}


class Echo(L.LightningModule):
    """Its features are the batch's own: `embedding` in the outputs, `label` in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.weight.sum(), "embedding": batch["x"]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(*callbacks: L.Callback, max_epochs: int = 1, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(callbacks=list(callbacks), max_epochs=max_epochs, **quiet | options)
