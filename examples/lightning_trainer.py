#!/usr/bin/env python3
"""The k-NN score in a Lightning Trainer: nothing but the callback.

python examples/lightning_trainer.py
"""

from typing import Any

import lightning as L
import torch
from digits import BATCH, EPOCHS, Autoencoder, Digits, knn_options, optimizer_of
from torch import Tensor
from torch.utils.data import DataLoader

from faiss_knn import OnlineKNN


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Autoencoder()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.model(**batch)
        return outputs

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def main(**options: Any) -> dict[str, float]:
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=[OnlineKNN(**knn_options())],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(Module(), DataLoader(Digits("train"), BATCH), DataLoader(Digits("val"), BATCH))
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("eval/knn")}


if __name__ == "__main__":
    print({key: round(value, 4) for key, value in main().items()})
