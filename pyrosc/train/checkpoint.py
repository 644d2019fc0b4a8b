"""Checkpoints: everything a run needs to go on with exactly the weights it would have had."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

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
