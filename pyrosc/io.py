"""Saving and loading models: safetensors for numbers, JSON for everything else, never pickle."""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from pyrosc.data import MAIN, DataError, Dataset, Registry, preflight
from pyrosc.data.errors import listed
from pyrosc.tools.surgery import Surgery

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model

#: Version of the format that `save` writes.
FORMAT = 2
#: Changes that bring a file of one version to the next: version found to function of its JSON.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda meta: meta | {"format": 2, "surgery": None, "origin": None},
}

_PARAMETERS, _MODEL = "params.safetensors", "model.json"


def save(model: Model, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to the folder `path`, in one step: a crash leaves what was there before.

    Parameters
    ----------
    model
        The model.
    path
        Folder; it and its parents are made.
    overwrite
        Replace a model that is there already.

    Raises
    ------
    FileExistsError
        If the folder exists and is not to be overwritten, or holds something else than a model.
    """
    path = Path(path)
    if path.exists():
        is_model = path.is_dir() and (path / _MODEL).exists()
        if not is_model and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not a pyrosc model; it was left alone")
        if is_model and not overwrite:
            raise FileExistsError(f"{path} holds a model already; pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path, "new")
    fresh.mkdir()
    try:
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(tensors, fresh / _PARAMETERS)
        (fresh / _MODEL).write_text(json.dumps(_describe(model), indent=1, allow_nan=True))
        shutil.copymode(fresh / _MODEL, fresh / _PARAMETERS)  # safetensors makes files for the owner alone
        _replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace(fresh: Path, path: Path) -> None:
    for file in fresh.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if not path.exists():
        os.rename(fresh, path)
        return
    old = _beside(path, "old")
    os.rename(path, old)  # between these two renames the old model is whole, beside its place
    try:
        os.rename(fresh, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, what: str) -> Path:
    return path.parent / f".{path.name}.{what}.{uuid.uuid4().hex[:8]}"


def _describe(model: Model) -> dict[str, Any]:
    history = model.history
    return {
        "format": FORMAT,
        "class": type(model).__name__,
        "config": model.config,
        "registries": {s: r.to_dict() for s, r in model.registries.items()},
        "n_train": model.n_train,
        "surgery": None if model.surgery is None else model.surgery.to_dict(),
        "split": {s: [a.tolist() for a in parts] for s, parts in model.split.items()},
        "history": None if history is None else history.reset_index().to_dict("list"),
        "versions": versions(),
        "origin": model.origin,
    }


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyrosc", "torch", "pyro-ppl", "anndata", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def load(path: str | Path, adata: AnnData | None = None, *, cls: type[Model] | None = None) -> Model:
    """Read a model that `save` wrote.

    Parameters
    ----------
    path
        The folder.
    adata
        The cells it was made with (checked against what it remembers), to train on or to ask about
        without naming them again. Or, by source name, a dict of them.
    cls
        The class, for models that are not pyrosc's own: no module named in a file is ever imported.

    Raises
    ------
    FileNotFoundError
        If the folder holds no model.
    ValueError
        If it was written by a newer version, or its class is not known or not `cls`.
    DataError
        If the data do not match; the message says which genes or categories differ.
    """
    import pyrosc.models as known
    from pyrosc.models.base import Model

    path = Path(path)
    if not (path / _MODEL).exists():
        raise FileNotFoundError(f"{path} holds no pyrosc model (no {_MODEL}){_left_over(path)}")
    meta = migrate(json.loads((path / _MODEL).read_text()))
    name = meta["class"]
    if cls is None or cls is Model:
        found = getattr(known, name, None)
        if not (isinstance(found, type) and issubclass(found, Model)) or found is Model:
            raise ValueError(f"{path} holds a '{name}', not a model of pyrosc; pyrosc.load(path, cls={name})")
        cls = found
    elif cls.__name__ != name:
        raise ValueError(f"{path} holds a '{name}', not a '{cls.__name__}'")
    registries = {s: Registry.from_dict(r) for s, r in meta["registries"].items()}
    datasets = _datasets(adata, registries, cls.__name__)
    with torch.random.fork_rng():
        one = next(iter(registries.values())) if list(registries) == ["main"] else registries
        model: Model = cls(one, **meta["config"])
        model.setup()
    if meta["surgery"] is not None:
        Surgery.from_dict(meta["surgery"]).apply(model)
    model.load_state_dict(load_file(path / _PARAMETERS))
    model.n_train, model.origin = meta["n_train"], meta["origin"]
    model.datasets = datasets
    model.split = {s: (np.array(a, np.int64), np.array(b, np.int64)) for s, (a, b) in meta["split"].items()}
    if meta["history"] is not None:
        model.history = pd.DataFrame(meta["history"]).set_index("epoch")
    for dataset in datasets.values():
        preflight(dataset, model.support(), query=True)
    return model.eval()


def migrate(meta: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a model in today's format."""
    if meta["format"] > FORMAT:
        raise ValueError(
            f"the model was written by a newer pyrosc ({meta['versions'].get('pyrosc')}; format "
            f"{meta['format']}, this version reads up to {FORMAT}); upgrade pyrosc"
        )
    while meta["format"] < FORMAT:
        meta = MIGRATIONS[meta["format"]](meta)
    return meta


def _left_over(path: Path) -> str:
    old = sorted(path.parent.glob(f".{path.name}.old.*"), key=os.path.getmtime)
    return f"; a save was cut short, and the model before it is in {old[-1]}" if old else ""


def _datasets(adata: Any, registries: dict[str, Registry], owner: str) -> dict[str, Dataset]:
    if adata is None:
        return {}
    adatas = adata if isinstance(adata, Mapping) else {MAIN: adata}
    if set(adatas) != set(registries):
        wanted = ", ".join(f"'{s}': adata" for s in registries)
        raise TypeError(f"{owner} reads the data sources {listed(registries)}; load(path, {{{wanted}}})")
    found = {}
    for source, registry in registries.items():
        dataset = Dataset(adatas[source], registry, owner)
        if dataset.n_obs != registry.n_obs:
            raise DataError(
                f"the model was made with {registry.n_obs:,} cells, the data have {dataset.n_obs:,}; load it "
                "without data and pass other cells to its methods as adata="
            )
        for name, now in dataset.fingerprints().items():
            was = registry.fingerprints.get(name)
            if was is not None and (was["checksum"], was["shape"]) != (now["checksum"], now["shape"]):
                raise DataError(
                    f"{registry.fields[name].where} is not the matrix that the model was made with (sum over "
                    f"the sampled cells {was['sum']:,.6g} then, {now['sum']:,.6g} now; genes "
                    f"{listed(registry.var_names(name), 2)}): other counts, or the cells in another order. "
                    "Load the model without data and pass these cells to its methods as adata="
                )
        found[source] = dataset
    return found
