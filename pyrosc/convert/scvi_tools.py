"""Models saved by scvi-tools 1.x as models of pyrosc."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrosc.convert.archive import Saved, read
from pyrosc.convert.weights import copy_weights
from pyrosc.data import MAIN, DataError, Dataset, FieldState, Registry, preflight
from pyrosc.data.encode import category_names
from pyrosc.data.errors import listed
from pyrosc.models import SCANVI, SCVI, LinearSCVI

if TYPE_CHECKING:
    from anndata import AnnData

#: Classes that are read, by the name that scvi-tools gives them.
KINDS: Mapping[str, type[SCVI]] = {"SCVI": SCVI, "SCANVI": SCANVI, "LinearSCVI": LinearSCVI}

#: Options with the name and meaning that they have here.
_SAME = (
    "n_hidden",
    "n_latent",
    "n_layers",
    "dropout_rate",
    "dispersion",
    "gene_likelihood",
    "latent_distribution",
    "use_observed_lib_size",
    "encode_covariates",
    "deeply_inject_covariates",
    "batch_representation",
    "linear_classifier",
)
#: Options that are read where they have one of these values, which ask for nothing.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "var_activation": (None,),
    "extra_encoder_kwargs": (None, {}),
    "extra_decoder_kwargs": (None, {}),
    "classifier_parameters": (None, {}),
    "y_prior": (None,),
    "labels_groups": (None,),
    "use_labels_groups": (None, False),
    "datamodule": (None,),
}
#: Options that do not change the networks, or show in the weights (bias) or the registry (size factor).
_IDLE = ("extra_payload_autotune", "use_size_factor_key", "bias")


def from_scvi_tools(path: str | Path, adata: AnnData | None = None, *, prefix: str = "") -> SCVI:
    """A model of pyrosc from a folder that scvi-tools 1.x saved: `SCVI`, `SCANVI` or `LinearSCVI`.

    Weights, options, genes, categories and the split into training and held-out cells are carried over, and
    the latent means, normalised expression and label probabilities are the same. The training history and
    the optimiser are not. The file is read without running anything in it: what is not a tensor, an array or
    a plain value is refused.

    Parameters
    ----------
    path
        Folder with ``model.pt``.
    adata
        The cells it was trained on, in the same order, to train on or to ask about without naming them
        again; ``adata.h5ad`` of the folder, where there is one, is not read by itself.
    prefix
        What the names of the files begin with, where ``save(prefix=)`` was used.

    Returns
    -------
    SCVI
        Trained, in evaluation mode. ``origin`` says where it comes from. Batch normalisation in only one of
        encoder and decoder, or before layer normalisation, is folded into the weights.

    Raises
    ------
    FileNotFoundError
        If the folder holds no model of scvi-tools.
    ValueError
        If the file holds anything but data, is of another version or class, or of options that pyrosc does
        not have; the message names them.
    DataError
        If `adata` does not match.
    RuntimeError
        With a torch before 2.6, which cannot tell what a file calls.
    """
    path = Path(path)
    saved = read(path, prefix)
    registered = saved.attributes.get("registry_")
    if not isinstance(registered, Mapping):
        raise ValueError(f"{path} is not a model of scvi-tools 1.x: it has no registry")
    cls = _kind(path, registered)
    if not saved.attributes.get("is_trained_"):
        raise ValueError(f"{path} holds a model that was not trained; there is nothing to carry over")
    given = _options(saved.attributes.get("init_params_")) | {
        "use_observed_lib_size": "library_log_means" not in saved.tensors
    }
    config, folded = translate_options(cls, given)
    registry = _registry(cls, registered, saved)
    datasets = {}
    if adata is not None:
        datasets[MAIN] = _dataset(adata, registry, cls.__name__)
        registry = registry.with_fingerprints(datasets[MAIN].fingerprints())
        registry = registry.with_means(datasets[MAIN].gene_sums())
    with torch.random.fork_rng():
        model: SCVI = cls(registry, **config)
        model.setup()
    copy_weights(model, saved.tensors)
    model.split = _split(saved.attributes, registry.n_obs)
    model.n_train = {MAIN: len(model.split[MAIN][0]) if model.split else registry.n_obs}
    model.datasets = datasets
    model.origin = {
        "tool": "scvi-tools",
        "version": str(registered["scvi_version"]),
        "class": str(registered["model_name"]),
        "folded_batch_norm": folded,
    }
    for dataset in datasets.values():
        preflight(dataset, model.support(), query=True)
    return model.eval()


def _kind(path: Path, registered: Mapping[str, Any]) -> type[SCVI]:
    version, name = str(registered.get("scvi_version")), str(registered.get("model_name"))
    if version.split(".")[0] != "1":
        raise ValueError(
            f"{path} was written by scvi-tools {version}, and 1.x is read; load it with scvi-tools 1.x and "
            "save it again"
        )
    if name not in KINDS:
        raise ValueError(f"{path} holds a model of the class {name}; those read are {listed(KINDS)}")
    method = registered.get("setup_method_name", "setup_anndata")
    if method != "setup_anndata":
        raise ValueError(f"{path} was made with {method}; models made with setup_anndata are read")
    return KINDS[name]


def _options(init: Any) -> dict[str, Any]:
    """Options as the user gave them, those passed on by keyword included."""
    if not isinstance(init, Mapping) or "non_kwargs" not in init:
        raise ValueError("the saved model does not say with which options it was made (init_params_)")
    given = dict(init["non_kwargs"])
    for more in init.get("kwargs", {}).values():
        given |= more
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}


def translate_options(cls: type[SCVI], given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Options of scvi-tools in our words.

    Parameters
    ----------
    cls
        Our class.
    given
        Options of the peer's model or module; those left out have the peer's defaults.

    Returns
    -------
    tuple
        Our options, and whether batch normalisation has to be folded into the weights.

    Raises
    ------
    ValueError
        If one has no counterpart; the message names it and its value.
    """
    given = dict(given)
    config = {name: given.pop(name) for name in _SAME if name in given}
    config["log_variational"] = bool(given.pop("log_variational", True))
    embedding = dict(given.pop("batch_embedding_kwargs", None) or {})
    if "embedding_dim" in embedding:
        config["batch_embedding_dim"] = int(embedding.pop("embedding_dim"))
    batch_norm = given.pop("use_batch_norm", True if cls is LinearSCVI else "both")
    layer_norm = given.pop("use_layer_norm", "none")
    for name in _IDLE:
        given.pop(name, None)
    odd = {k: v for k, v in given.items() if not any(v is x or v == x for x in _NOTHING.get(k, ()))}
    odd |= {f"batch_embedding_kwargs[{k!r}]": v for k, v in embedding.items()}
    if odd:
        raise ValueError(
            "the saved model has options that pyrosc does not have: "
            + ", ".join(f"{k}={_short(v)}" for k, v in odd.items())
        )
    if cls is LinearSCVI:
        # its encoder has batch normalisation always, and sees no covariates
        config |= {"norm": "batch", "decoder_norm": "batch" if batch_norm else "none"}
        config["encode_covariates"] = False
        return config, False
    config["norm"], folded = _norm(batch_norm, layer_norm)
    return config, folded


def _norm(batch: str, layer: str) -> tuple[str, bool]:
    """Our normalisation for where the peer has batch and layer normalisation; whether the former folds."""
    if layer == "both":
        return "layer", batch != "none"
    if layer == "none":
        return ("batch", False) if batch == "both" else ("none", batch != "none")
    raise ValueError(
        f"the saved model has use_layer_norm={layer!r}; pyrosc has it in encoder and decoder or in neither"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- registry ---------------------------------------------------------------------------------------------


def _registry(cls: type[SCVI], registered: Mapping[str, Any], saved: Saved) -> Registry:
    """The fields as they were registered, with the categories in the order of the peer's codes."""
    setup, found = registered.get("setup_args", {}), registered.get("field_registries", {})

    def state(field: str) -> Mapping[str, Any]:
        return found.get(field, {}).get("state_registry", {})

    def columns(keyword: str) -> tuple[str, ...]:
        value = setup.get(keyword)
        return () if value is None else (str(value),) if isinstance(value, str) else tuple(map(str, value))

    keys = {name: columns(field.keyword) for name, field in cls.fields().items() if field.keyword}
    states = {n: FieldState(f.kind, given=bool(keys[n])) for n, f in cls.fields().items()}
    states["x"] = FieldState("counts", keys=keys["x"], names=saved.genes)
    if keys["batch"]:
        order = _names("batch", state("batch").get("categorical_mapping"))
        states["batch"] = FieldState("categorical", keys=keys["batch"], categories=(order,))
    if keys["labels"]:
        order = _names("labels", state("labels").get("categorical_mapping"))
        unlabeled = None
        if "unlabeled_category" in state("labels"):
            (unlabeled,) = _names("labels", [state("labels")["unlabeled_category"]])
        order = tuple(c for c in order if c != unlabeled)
        states["labels"] = FieldState("labels", keys=keys["labels"], categories=(order,), unlabeled=unlabeled)
    if several := keys["categorical_covariates"]:
        mappings = state("extra_categorical_covs").get("mappings", {})
        orders = tuple(_names(key, mappings.get(key)) for key in several)
        states["categorical_covariates"] = FieldState("categoricals", keys=several, categories=orders)
    for name in ("continuous_covariates", "size_factor"):
        if several := keys[name]:  # taken as they are, not standardised
            zeros, ones = (0.0,) * len(several), (1.0,) * len(several)
            states[name] = replace(states[name], keys=several, loc=zeros, scale=ones)
    summary = found.get("X", {}).get("summary_stats", {})
    n_obs = summary.get("n_cells", state("X").get("n_obs", 0))
    return Registry(n_obs=int(n_obs), fields=states)


def _names(field: str, mapping: Iterable[Any] | None) -> tuple[str, ...]:
    """Category names in code order, as pyrosc writes them."""
    names = () if mapping is None else tuple(category_names(pd.Series(list(mapping), dtype=object)))
    if not names or None in names or len(set(names)) < len(names):
        raise ValueError(f"the categories of '{field}' in the saved model cannot be read: {listed(names)}")
    return names


def _dataset(adata: AnnData, registry: Registry, owner: str) -> Dataset:
    if adata.uns.get("_scvi_adata_minify_type") == "latent_posterior_parameters":
        raise DataError(
            "adata was minified by scvi-tools: its counts were dropped, and there is nothing to encode. Give "
            "the cells with their counts, or none: the model itself is whole"
        )
    if adata.n_obs != registry.n_obs:
        raise DataError(
            f"the model was made with {registry.n_obs:,} cells, the data have {adata.n_obs:,}; read it "
            "without data and pass other cells to its methods as adata="
        )
    return Dataset(adata, registry, owner)


def _split(attributes: Mapping[str, Any], n_obs: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows that trained and that were held out; empty where the file does not say."""
    parts = [attributes.get(f"{name}_indices_") for name in ("train", "validation")]
    if any(p is None for p in parts):
        return {}
    train, held_out = (np.unique(np.asarray(p, np.int64)) for p in parts)
    inside = all(len(p) == 0 or (p[0] >= 0 and p[-1] < n_obs) for p in (train, held_out))
    if not len(train) or not inside or len(np.intersect1d(train, held_out)):
        return {}
    return {MAIN: (train, held_out)}
