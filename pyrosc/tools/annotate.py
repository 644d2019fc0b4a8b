"""Writing results into an AnnData: the only place that does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrosc.data.errors import listed
from pyrosc.io import versions
from pyrosc.train.history import kept_elbo

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model


def annotate(
    model: Model,
    adata: AnnData | None = None,
    *,
    sites: Sequence[str] | str | None = None,
    layers: bool = False,
    key_added: str | None = None,
    batch_size: int = 512,
) -> AnnData:
    """Write the standard results of a model under their documented keys.

    Parameters
    ----------
    model
        A model with ``slots``.
    adata
        Where to write; its cells are those asked about. Default: the AnnData the model was made with.
    sites
        Sites to write; default all of ``slots`` (``layers/…`` only where `layers` is True: they are dense).
    layers
        Also write dense layers, such as normalised expression (n × g float32).
    key_added
        Name put in place of the model's in the keys: ``"run2"`` gives ``obsm["X_run2"]``.
    batch_size
        Cells at a time.

    Returns
    -------
    AnnData
        `adata`, with ``obsm``/``obs``/``layers`` entries and the provenance in ``uns["pyrosc"][key]``: class,
        options, fields, keys written, epochs, held-out ELBO, versions (JSON text where nested).
    """
    if adata is None:
        adata = model.dataset().data
    assert adata is not None
    name = type(model).__name__
    if sites is None:
        wanted = [s for s, slot in model.slots.items() if layers or not slot.startswith("layers/")]
    else:
        wanted = [sites] if isinstance(sites, str) else list(sites)
    if strange := [s for s in wanted if s not in model.slots]:
        raise KeyError(f"{name}.slots has no site {listed(strange)}; it has {listed(model.slots, 20)}")
    if not wanted:
        raise ValueError(
            f"{name} has no slots: name some, for example slots = {{'z': 'obsm/X_z'}} in the class"
        )
    dense = any(model.slots[s].startswith("layers/") for s in wanted)
    if dense and adata.n_vars != model.registry.n_vars():
        raise ValueError(
            f"adata has {adata.n_vars:,} genes, the model {model.registry.n_vars():,}: a layer needs the "
            "same ones; use get_normalized_expression, or subset adata to the model's genes"
        )
    found = model.posterior(wanted, adata=adata, batch_size=batch_size)
    written = []
    for site in wanted:
        slot, key = model.slots[site].split("/", 1)
        if key_added is not None:
            key = _renamed(key, key_added)
        value = found[site]
        if slot == "layers":
            order = {g: i for i, g in enumerate(model.registry.var_names())}
            value = value[:, [order[g] for g in map(str, adata.var_names)]]
        getattr(adata, slot)[key] = value.reshape(-1) if slot == "obs" else value
        written.append(f"{slot}/{key}")
    record = dict(adata.uns.get("pyrosc", {}))
    record[key_added or name] = _provenance(model, written)
    adata.uns["pyrosc"] = record
    return adata


def _renamed(key: str, key_added: str) -> str:
    prefix, _, rest = key.partition("_")
    return f"X_{key_added}" if prefix == "X" else f"{key_added}_{rest}"


def _provenance(model: Model, written: list[str]) -> dict[str, Any]:
    history = model.history
    record: dict[str, Any] = {
        "model": type(model).__name__,
        "options": json.dumps(model.config),
        "fields": json.dumps(
            {
                n: [s.where]
                for r in model.registries.values()
                for n, s in r.fields.items()
                if s.given and s.kind != "index"
            }
        ),
        "written": np.array(written, dtype=str),
        "epochs": 0 if history is None else len(history),
        "versions": versions(),
    }
    if history is not None and (elbo := kept_elbo(history)) is not None:
        record["elbo_validation"] = elbo
    return record
