#!/usr/bin/env python3
"""The k-NN score in a Hugging Face Trainer, by a callback of twenty lines.

python examples/huggingface_trainer.py
"""

import tempfile
from typing import Any

from digits import BATCH, EPOCHS, Autoencoder, Digits, knn_options, optimizer_of
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from faiss_knn import OnlineEvaluator


class KNNCallback(TrainerCallback):
    """Reads what the model is given and returns: a Trainer shows its callbacks neither batches nor outputs.

    The scores are among the metrics of each evaluation, so that `metric_for_best_model="eval_knn_k20_acc"` finds them.
    """

    def __init__(self, knn: OnlineEvaluator) -> None:
        self.knn, self.is_scoring = knn, False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.handle = model.register_forward_hook(self.read, with_kwargs=True)

    def read(self, model: nn.Module, args: tuple[Any, ...], batch: dict[str, Tensor], outputs: Any) -> None:
        tensors = {"embedding": outputs["embedding"], "label": batch["label"], "index": batch["index"]}
        if model.training:
            self.knn.observe(**tensors)
            return
        if not self.is_scoring:
            self.knn.start()
        self.is_scoring = True
        self.knn.score(**tensors)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        values = {key.replace("/", "_"): value for key, value in self.knn.finish().items()}
        self.is_scoring = False
        metrics.update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.remove()


def main(**options: Any) -> dict[str, float]:
    model = Autoencoder()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            eval_strategy="epoch",
            save_strategy="no",
            lr_scheduler_type="constant",
            max_grad_norm=0,  # this and the next two: as in the other examples
            train_sampling_strategy="sequential",
            prediction_loss_only=True,
            report_to="none",
            **options,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=default_collate,  # the Trainer's own would rename "label"
            train_dataset=Digits("train"),
            eval_dataset=Digits("val"),
            optimizers=(optimizer_of(model), None),
            callbacks=[KNNCallback(OnlineEvaluator(**knn_options()))],
        )
        trainer.train()
    return {key: value for key, value in trainer.state.log_history[-2].items() if key.startswith("eval_knn")}


if __name__ == "__main__":
    print({key: round(value, 4) for key, value in main().items()})
