"""What a Lightning trainer is about to validate on: its dataloaders, and how many batches of each."""

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from faiss_knn.online.evaluation import Plan


def plan_of(trainer: Any) -> Plan:
    """Return what the validation (or test) that begins will read."""
    batches, loaders = _batch_counts(trainer), _dataloaders(trainer)
    return Plan(
        loaders if len(loaders) == len(batches) else [None] * len(batches),
        batches,
        is_rehearsal=trainer.sanity_checking,
    )


def check_bank_loader(trainer: Any, name: str, bank: int) -> None:
    """Check that the dataloader which fills the bank comes before those that are scored.

    Raises:
        ValueError: If it does not.
    """
    if _reads_at_once(trainer):
        raise ValueError(
            f"OnlineKNN[{name}]: bank_dataloader_idx={bank} needs dataloaders that run "
            "one after the other, got a CombinedLoader that reads them at once: give a list, or mode='sequential'"
        )
    if bank != 0 or len(_dataloaders(trainer)) < 2:
        raise ValueError(
            f"OnlineKNN[{name}]: the bank's dataloader must come first and others after it, got "
            f"bank_dataloader_idx={bank} of {len(_dataloaders(trainer))} validation dataloaders: they run in "
            "order, so return [bank_loader, *scored_loaders] and set bank_dataloader_idx=0"
        )


def cut_of_bank(trainer: Any, plan: Plan, bank: int) -> str | None:
    """Say how much smaller a bank is than its dataloader, because Lightning was told to read a part of it."""
    whole, read = _length(plan.dataloaders[bank]), plan.batches[bank]
    if plan.is_rehearsal or whole is None or read >= whole:
        return None
    limit = "limit_test_batches" if trainer.testing else "limit_val_batches"
    return (
        f"the bank holds {read:g} of the {whole} batches of dataloader {bank}, because {limit} cuts every dataloader: "
        "raise it, and shorten the others themselves, for the score of the whole bank"
    )


def _dataloaders(trainer: Any) -> list[Any]:
    return CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened


def _batch_counts(trainer: Any) -> list[float]:
    """Count the batches of each dataloader that this rank will see; of those read at once, one number."""
    if trainer.sanity_checking:
        counts = list(trainer.num_sanity_val_batches)
    else:
        counts = list(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
    return counts[:1] if _reads_at_once(trainer) else counts


def _reads_at_once(trainer: Any) -> bool:
    """Tell whether several dataloaders give their batches together, all under number 0."""
    loop = trainer.test_loop if trainer.testing else trainer.validate_loop
    if trainer.state.fn == TrainerFn.FITTING:
        loop = trainer.fit_loop.epoch_loop.val_loop
    combined = getattr(loop, "_combined_loader", None)
    return getattr(combined, "_mode", "sequential") != "sequential"


def _length(loader: Any) -> int | None:
    """Count the batches of a dataloader; None where it does not say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
