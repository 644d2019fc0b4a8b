"""Checkpoints: everything a run needs to go on with exactly the weights it would have had."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from pyrosc.train.loop import Run

_FILE = "checkpoint.safetensors"


def write(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a checkpoint in one atomic step: a crash leaves the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_FILE}.{os.getpid()}"
    # tensors and record go into one file, so that they cannot be of different epochs
    contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(contiguous, temporary, metadata={"record": json.dumps(record)})
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, folder / _FILE)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint."""
    with safe_open(folder / _FILE, "pt") as handle:
        record = json.loads(handle.metadata()["record"])
    return load_file(folder / _FILE), record


def digest(values: Any) -> int:
    """Checksum of JSON values."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint."""
    return (folder / _FILE).exists()


def flatten_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """State of an optimiser as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{i}/{key}": torch.as_tensor(value)
        for i, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put back what `flatten_optimizer` gave."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    sparse = isinstance(optimizer, torch.optim.SparseAdam)
    for name, tensor in tensors.items():
        if name.startswith(prefix + "/"):
            _, index, key = name.rsplit("/", 2)
            state.setdefault(int(index), {})[key] = int(tensor) if sparse and key == "step" else tensor
    whole["state"] = state
    optimizer.load_state_dict(whole)


def save(run: Run, folder: Path) -> None:
    """Write a run's checkpoint."""
    tensors = {f"model/{k}": v for k, v in run.model.state_dict().items()}
    for i, optimizer in enumerate(run.optimizers.all()):
        tensors |= flatten_optimizer(optimizer, f"optimizer{i}")
    if run.best_weights is not None:
        tensors |= {f"best/{k}": v for k, v in run.best_weights.items()}
    write(folder, tensors, _record(run))


def _identity(run: Run) -> dict[str, Any]:
    """What a run must share with a checkpoint to go on from it, as JSON gives it back."""
    model = run.model
    fields = {s: r.to_dict() | {"fingerprints": None} for s, r in model.registries.items()}
    for registry in fields.values():  # what follows from the counts is left to their checksums
        for state in registry["fields"].values():
            state.pop("means")
    counts = {s: d.fingerprints() for s, d in model.datasets.items()}
    sums = {s: {n: f["checksum"] for n, f in found.items()} for s, found in counts.items()}
    identity = {
        "class": type(model).__name__,
        "config": model.config,
        "data": [digest(fields), sums],
        **asdict(run.plan),
        "seed": run.seed,
        "split": digest({s: rows.tolist() for s, rows in run.train_rows.items()}),
        "epochs": run.epochs,
        "max_steps": run.max_steps,
        "max_time": run.max_time,
    }
    return json.loads(json.dumps(identity))


def _record(run: Run) -> dict[str, Any]:
    model = run.model
    old = None if model.history is None else model.history.reset_index().to_dict("list")
    return {
        "run": _identity(run),
        "before": run.before,
        "history": old,
        "epoch": run.epoch,
        "step": run.step,
        "elapsed": run.elapsed,
        "best": run.best,
        "best_epoch": run.best_epoch,
        "records": run.records,
        "ended": run.ended,
    }


def restore(run: Run, folder: Path) -> None:
    """Put a run where its checkpoint was.

    Raises
    ------
    ValueError
        If the checkpoint is of another run, naming what differs.
    """
    tensors, record = read(folder)
    for key, here in _identity(run).items():
        there = record["run"][key]
        if there != here:
            raise ValueError(
                f"the checkpoint in {folder} is of another run: its {key} is {there!r}, here it is "
                f"{here!r}; a run is resumed with the arguments it was started with"
            )
    run.model.load_state_dict(
        {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    )
    for i, optimizer in enumerate(run.optimizers.all()):
        restore_optimizer(optimizer, tensors, f"optimizer{i}")
    best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
    run.best_weights = best or None
    for key in ("before", "epoch", "step", "elapsed", "best", "best_epoch", "records", "ended"):
        setattr(run, key, record[key])
    if record["history"] is not None:
        run.model.history = pd.DataFrame(record["history"]).set_index("epoch")
