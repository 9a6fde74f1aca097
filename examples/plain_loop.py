#!/usr/bin/env python3
"""The k-NN score in a plain PyTorch loop, on one process or under torchrun.

python examples/plain_loop.py
torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import gc
import os

import torch
import torch.distributed as dist
from digits import BATCH, EPOCHS, Autoencoder, Digits, knn_options, optimizer_of
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from faiss_knn import OnlineEvaluator


def main() -> dict[str, float]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return train_and_score(ranks)
    dist.init_process_group("gloo")
    values = train_and_score(ranks)
    gc.collect()  # the model, which holds on to the group: threads of a group that outlives Python would abort it
    dist.destroy_process_group()
    return values


def train_and_score(ranks: int) -> dict[str, float]:
    sets = [Digits("train"), Digits("val")]
    train, val = (
        DataLoader(data, BATCH // ranks, sampler=DistributedSampler(data, shuffle=False) if ranks > 1 else None)
        for data in sets
    )
    model: torch.nn.Module = Autoencoder()
    if ranks > 1:
        model = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    knn = OnlineEvaluator(**knn_options())

    for epoch in range(EPOCHS):
        model.train()
        for batch in train:
            outputs = model(**batch)
            optimizer.zero_grad()
            outputs["loss"].backward()
            optimizer.step()
            knn.observe(embedding=outputs["embedding"], label=batch["label"], index=batch["index"])

        model.eval()
        knn.start(val)
        with torch.no_grad():
            for batch in val:
                knn.score(embedding=model(**batch)["embedding"], label=batch["label"], index=batch["index"])
        values = knn.finish()  # the same on every rank
        if ranks == 1 or dist.get_rank() == 0:
            print(f"epoch {epoch + 1}", {key: round(value, 4) for key, value in values.items()})
    return values


if __name__ == "__main__":
    main()
