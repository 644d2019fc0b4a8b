"""Writing results into an AnnData: the only place that does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.data.errors import listed
from pyrosc.data.schema import MAIN
from pyrosc.infer.structure import sites_of_cells
from pyrosc.io import versions
from pyrosc.tools.predict import likeliest, predict
from pyrosc.train.history import kept_elbo

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.data import Registry
    from pyrosc.models.base import Model


def annotate(
    model: Model,
    adata: AnnData | None = None,
    *,
    sites: Sequence[str] | str | None = None,
    layers: bool = False,
    key_added: str | None = None,
    batch_size: int = 512,
    source: str = MAIN,
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
    source
        Data source of the cells, for models that read several; of the slots those of its cells are written.

    Returns
    -------
    AnnData
        `adata`, with ``obsm``/``obs``/``layers`` entries (a DataFrame in ``obsm`` where the model names the
        columns), the model's results per gene in ``var`` or ``varm`` (where `sites` is None), and the
        provenance in ``uns["pyrosc"][key]``: class, options, fields, keys written, epochs, held-out ELBO,
        versions, origin of a converted model (JSON text where nested). In a MuData, what is per gene or
        protein of a modality goes to the ``layers`` of that modality, all else to the MuData itself.
    """
    if source not in model.registries:
        raise ValueError(f"name the data source: source= one of {sorted(model.registries)}")
    registry, several = model.registries[source], len(model.registries) > 1
    if adata is None:
        adata = model.home() if source == MAIN else model.dataset(source=source).data
    name = type(model).__name__
    if sites is None:
        wanted = [s for s, slot in model.slots.items() if layers or not slot.startswith("layers/")]
        if several:
            here = sites_of_cells(model, source)
            wanted = [s for s in wanted if s in here]
    else:
        wanted = [sites] if isinstance(sites, str) else list(sites)
    if strange := [s for s in wanted if s not in model.slots]:
        raise KeyError(f"{name}.slots has no site {listed(strange)}; it has {listed(model.slots, 20)}")
    if not wanted:
        raise ValueError(
            f"{name} has no slots: name some, for example slots = {{'z': 'obsm/X_z'}} in the class"
        )
    places = {site: _place(model, adata, site, registry) for site in wanted}
    for site, (holder, features, _) in places.items():
        if model.slots[site].startswith("layers/") and holder.n_vars != len(features):
            raise ValueError(
                f"adata has {holder.n_vars:,} genes, the model {len(features):,}: a layer needs the "
                "same ones; use get_normalized_expression, or subset adata to the model's genes"
            )
    plain = [s for s in wanted if s != model.label]
    found = model.posterior(plain, adata=adata, batch_size=batch_size, source=source) if plain else {}
    written = []
    for site in wanted:
        slot, key = model.slots[site].split("/", 1)
        if key_added is not None:
            key = _renamed(key, key_added)
        if site == model.label:
            probabilities: Any = predict(model, adata, soft=True, batch_size=batch_size)
            written += _write_labels(adata, key, probabilities, model.positive)
            continue
        value = model.annotated(site, found[site], adata, batch_size)
        holder, features, prefix = places[site]
        if slot == "layers" or holder is not adata:
            holder.layers[key] = _in_order(value, features, holder, adata)
            written.append(f"{prefix}layers/{key}")
            continue
        names = model.columns(site)
        if slot == "obs":
            adata.obs[key] = value.reshape(-1)
        elif slot == "obsm" and names is not None:
            adata.obsm[key] = pd.DataFrame(value, index=adata.obs_names, columns=list(names))
        else:
            getattr(adata, slot)[key] = value
        written.append(f"{slot}/{key}")
    if sites is None:
        written += _write_genes(adata, model.gene_results(), key_added)
    record = dict(adata.uns.get("pyrosc", {}))
    record[key_added or name] = _provenance(model, written)
    adata.uns["pyrosc"] = record
    return adata


def _field_of(model: Model, site: str, registry: Registry) -> str:
    """Field whose features are the columns of a site; the first counts field for want of another."""
    names = model.columns(site)
    if site not in model.features and names is not None:
        for name, state in registry.fields.items():
            if state.kind in ("counts", "protein") and tuple(names) == state.names:
                return name
    counts = next((n for n, s in registry.fields.items() if s.kind == "counts"), "")
    return model.features.get(site, counts)


def _place(model: Model, adata: Any, site: str, registry: Registry) -> tuple[Any, tuple[str, ...], str]:
    """Where values of a site go (a MuData's modality, for its features), their columns' names, the path."""
    state = registry.fields.get(_field_of(model, site, registry))
    if state is None:
        return adata, (), ""
    per_feature = model.slots[site].startswith("layers/") or model.columns(site) is not None
    if hasattr(adata, "mod") and state.modality is not None and per_feature:
        modality = adata.mod[state.modality]
        if set(state.names) <= set(map(str, modality.var_names)) and (state.matrix or state.kind == "counts"):
            return modality, state.names, f"mod/{state.modality}/"
    return adata, state.names, ""


def _in_order(value: np.ndarray, names: Sequence[str], holder: Any, adata: Any) -> np.ndarray:
    """Columns in the order of the holder's features, NaN for others; rows of the cells that it has."""
    position = {g: i for i, g in enumerate(names)}
    if holder is not adata and not holder.obs_names.equals(adata.obs_names):
        value = value[adata.obs_names.get_indexer(holder.obs_names)]
    features = list(map(str, holder.var_names))
    if all(f in position for f in features):
        return value[:, [position[f] for f in features]]
    out = np.full((len(value), len(features)), np.nan, value.dtype)
    for column, feature in enumerate(features):
        if feature in position:
            out[:, column] = value[:, position[feature]]
    return out


def _write_genes(adata: AnnData, results: Mapping[str, Any], key_added: str | None) -> list[str]:
    """Tables per gene; genes that the model does not have get NaN."""
    written = []
    for place, table in results.items():
        slot, key = place.split("/", 1)
        if key_added is not None:
            key = _renamed(key, key_added)
        here = table.reindex(adata.var_names.astype(str)).set_axis(adata.var_names, axis=0)
        if slot == "varm":
            adata.varm[key] = here.rename_axis(columns=None)
            written.append(f"varm/{key}")
            continue
        columns = {key: here} if isinstance(here, pd.Series) else {f"{key}_{c}": here[c] for c in here}
        for name, values in columns.items():
            adata.var[name] = values.to_numpy()
            written.append(f"var/{name}")
    return written


def _write_labels(adata: AnnData, key: str, probabilities: pd.DataFrame, positive: str | None) -> list[str]:
    """The likeliest class, and its probability and those of all classes, or that of the class of interest."""
    values = probabilities.to_numpy()
    adata.obs[key] = likeliest(probabilities)
    if positive is not None:
        name = f"{key.rpartition('_')[0]}_{positive}_probability"
        adata.obs[name] = probabilities[positive].to_numpy()
        return [f"obs/{key}", f"obs/{name}"]
    adata.obs[f"{key}_probability"] = values.max(1)
    adata.obsm[f"{key}_probabilities"] = probabilities.set_axis(adata.obs_names, axis=0)
    return [f"obs/{key}", f"obs/{key}_probability", f"obsm/{key}_probabilities"]


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
    if model.origin is not None:
        record["origin"] = json.dumps(model.origin)
    if history is not None and (elbo := kept_elbo(history)) is not None:
        record["elbo_validation"] = elbo
    return record
