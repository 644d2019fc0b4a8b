"""Query cells mapped to a trained reference, ours and scvi-tools', and labels carried to them.

Each technology of ``pbmc_3tech`` is the query in turn, the other two are the reference.  Both tools train
SCVI with two layers, LayerNorm and ``encode_covariates=True``, the reference for 400 epochs at most, which is
the peer's default for so few cells; the peer's query training is its 200 epochs without weight decay, ours
what `pyrosc.surgery` plans.  Labels go from the reference's cells to the query's
by the nearest neighbours in the latent space.  Either environment runs it::

    python benchmarks/surgery.py --tool pyrosc --seeds 0 1 2
    PEERS_PYTHON benchmarks/surgery.py --tool peer --seeds 0 1 2

Figures go to ``benchmarks/results/surgery_TOOL.json``, a record per task and seed; ``--table`` prints both.
``seconds_all``, of ours, is the time of training anew on all cells.
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import json  # noqa: E402
from typing import Any  # noqa: E402

import _common as common  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

TASKS = {name: i for i, name in enumerate(("3pv1", "3pv2", "5p"))}
NEIGHBOURS = (5, 15, 30)
REFERENCE = {"max_epochs": 400}  # our default plan has 150
KEPT = 15  # the number of neighbours that the table shows


def prepare(task: str) -> tuple[Any, Any]:
    """Reference and query."""
    adata = common.load("pbmc_3tech").adata
    level = sorted(adata.obs["donor"].unique())[TASKS[task]]
    query = (adata.obs["donor"] == level).to_numpy()
    parts = adata[~query].copy(), adata[query].copy()
    for part in parts:
        part.obs["donor"] = part.obs["donor"].cat.remove_unused_categories()
    return parts


def fit_pyrosc(reference: Any, query: Any, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Latent spaces before and after, and seconds."""
    import anndata

    import pyrosc

    shape = {"encode_covariates": True, "n_layers": 2, "batch_key": "donor", **options.pop("model", {})}
    before = options.pop("before", REFERENCE)
    with common.Meter() as first:
        model = pyrosc.SCVI.from_anndata(reference, seed=seed, **shape)
        model.fit(seed=seed, progress=False, **before)
    with common.Meter() as second:
        mapped = pyrosc.surgery(model, query, **options.pop("surgery", {}))
        mapped.fit(seed=seed, progress=False, **options)
    same = np.array_equal(model.get_latent_representation(), mapped.get_latent_representation(reference))
    found = {
        "reference": model.get_latent_representation(),
        "query": mapped.get_latent_representation(),
        "seconds_reference": first.as_dict()["seconds"],
        "reference_unchanged": bool(same),
        "meter": second,
    }
    with common.Meter() as third:
        whole = pyrosc.SCVI.from_anndata(anndata.concat([reference, query]), seed=seed, **shape)
        whole.fit(seed=seed, progress=False, **before)
    latent = whole.get_latent_representation()
    n = reference.n_obs
    anew = third.as_dict()
    found |= {"seconds_all": anew["seconds"], "cpu_seconds_all": anew["cpu_seconds"]}
    return found | {"whole": (latent[:n], latent[n:])}


def fit_peer(reference: Any, query: Any, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same by the peer."""
    import scvi

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(reference, batch_key="donor")
    with common.Meter() as first:
        model = scvi.model.SCVI(
            reference, n_layers=2, encode_covariates=True, use_layer_norm="both", use_batch_norm="none"
        )
        model.train(enable_progress_bar=False)
    with common.Meter() as second:
        mapped = scvi.model.SCVI.load_query_data(query, model)
        mapped.train(max_epochs=200, plan_kwargs={"weight_decay": 0.0}, enable_progress_bar=False)
    return {
        "reference": model.get_latent_representation(),
        "query": mapped.get_latent_representation(),
        "seconds_reference": first.as_dict()["seconds"],
        "meter": second,
    }


def accuracy(a: np.ndarray, labels: Any, b: np.ndarray, truth: Any) -> dict[str, float]:
    """Share of the query cells whose neighbours in the reference have their label."""
    from sklearn.neighbors import KNeighborsClassifier

    found = {}
    for k in NEIGHBOURS:
        classifier = KNeighborsClassifier(k).fit(a, labels.astype(str))
        found[f"accuracy_{k}"] = float((classifier.predict(b) == truth.astype(str).to_numpy()).mean())
    return found


def run_one(tool: str, task: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One reference and one query in this process."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    reference, query = prepare(task)
    fit = fit_pyrosc if tool == "pyrosc" else fit_peer
    found = fit(reference, query, seed, options)
    meter = found.pop("meter")
    labels = reference.obs["cell_type"], query.obs["cell_type"]
    result = accuracy(found.pop("reference"), labels[0], found.pop("query"), labels[1])
    if "whole" in found:
        a, b = found.pop("whole")
        result["accuracy_all"] = accuracy(a, labels[0], b, labels[1])[f"accuracy_{KEPT}"]
    return {"task": task, "seed": seed, **result, **found, **meter.as_dict()}


def table() -> None:
    """Means over seeds of both tools."""
    for tool in ("pyrosc", "peer"):
        path = common.RESULTS / f"surgery_{tool}.json"
        if not path.exists():
            continue
        fits = pd.DataFrame(json.loads(path.read_text())["fits"])
        for task, own in fits.groupby("task"):
            values = own[f"accuracy_{KEPT}"]
            anew = f", anew on all {own['seconds_all'].median():.1f} s" if "seconds_all" in own else ""
            print(
                f"{tool:8s} {task:6s} {len(own)} seeds: accuracy {values.mean():.3f} ± "
                f"{values.std() / np.sqrt(len(own)):.3f}, query {own['seconds'].median():.1f} s, reference "
                f"{own['seconds_reference'].median():.1f} s{anew}"
            )


if __name__ == "__main__":
    common.run_tasks(__doc__, __file__, "surgery", TASKS, run_one, table)
