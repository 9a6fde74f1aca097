#!/usr/bin/env python3
"""The k-NN score in a loop of Hugging Face Accelerate.

python examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py   # on as many processes and devices as `accelerate config` was told
"""

import torch
from accelerate import Accelerator
from digits import BATCH, EPOCHS, Autoencoder, Digits, knn_options, optimizer_of
from torch.utils.data import DataLoader

from faiss_knn import OnlineEvaluator


def main(cpu: bool = False) -> dict[str, float]:
    accelerator = Accelerator(cpu=cpu)
    model = Autoencoder()
    model, optimizer, train, val = accelerator.prepare(
        model,
        optimizer_of(model),
        DataLoader(Digits("train"), BATCH // accelerator.num_processes),
        DataLoader(Digits("val"), BATCH // accelerator.num_processes),
    )
    knn = OnlineEvaluator(**knn_options())

    for epoch in range(EPOCHS):
        model.train()
        for batch in train:
            outputs = model(**batch)
            accelerator.backward(outputs["loss"])
            optimizer.step()
            optimizer.zero_grad()
            knn.observe(embedding=outputs["embedding"], label=batch["label"], index=batch["index"])

        model.eval()
        knn.start(val)
        with torch.no_grad():
            for batch in val:
                knn.score(embedding=model(**batch)["embedding"], label=batch["label"], index=batch["index"])
        values = knn.finish()  # the same on every process
        accelerator.print(f"epoch {epoch + 1}", {key: round(value, 4) for key, value in values.items()})

    return values


if __name__ == "__main__":
    main()
