"""Labels of held-back cells by SCANVI, ours and scvi-tools', with the defaults of each.

Tasks: ``kang_ifnb`` with the labels of all stimulated cells hidden; ``pbmc_3tech`` with those of one
technology hidden, each in turn.  Either environment runs it; each process fits once::

    python benchmarks/label_transfer.py --tool pyrosc --seeds 0 1 2 3 4
    PEERS_PYTHON benchmarks/label_transfer.py --tool peer --seeds 0 1 2

Figures go to ``benchmarks/results/labels_TOOL.json``, a record per task and seed; ``--table`` prints both.
The clock runs over training alone: for the peer over scVI and scANVI, since its advised use starts from scVI.
Accuracy and macro-F1 are over types with at least 10 query cells (``accuracy_all`` over all query cells).
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

#: Task to data set, column that tells the query cells, and its value.
TASKS = {
    "kang_ifnb": ("kang_ifnb", "condition", None),
    **{f"pbmc_3tech/{i}": ("pbmc_3tech", "donor", i) for i in range(3)},
}
HIDDEN = "unknown"
FEWEST = 10


def prepare(task: str) -> tuple[Any, str, np.ndarray]:
    """Cells with ``obs["label"]`` (hidden for the query), the batch column, and a mask of the query."""
    name, column, position = TASKS[task]
    adata = common.load(name).adata
    values = adata.obs[column].astype(str)
    levels = sorted(values.unique())
    level = next(v for v in levels if "stim" in v) if position is None else levels[position]
    query = (values == level).to_numpy()
    adata.obs["label"] = np.where(query, HIDDEN, adata.obs["cell_type"].astype(str))
    return adata, column, query


def fit_pyrosc(adata: Any, batch_key: str, seed: int, options: dict[str, Any]) -> tuple[pd.DataFrame, Any]:
    """Ours: from scratch."""
    import pyrosc

    fit = options.pop("fit", {})
    keys = {"batch_key": batch_key, "labels_key": "label", "unlabeled_category": HIDDEN}
    with common.Meter() as meter:
        model = pyrosc.SCANVI.from_anndata(adata, seed=seed, **keys, **options)
        model.fit(seed=seed, progress=False, **fit)
    return model.predict(soft=True), meter


def fit_peer(adata: Any, batch_key: str, seed: int, options: dict[str, Any]) -> tuple[pd.DataFrame, Any]:
    """The peer's: scVI, then scANVI from it."""
    import scvi

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch_key, labels_key="label")
    with common.Meter() as meter:
        first = scvi.model.SCVI(adata)
        first.train(enable_progress_bar=False)
        model = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category=HIDDEN)
        model.train(enable_progress_bar=False)
    return model.predict(soft=True), meter


def score(soft: pd.DataFrame, truth: pd.Series, query: np.ndarray) -> dict[str, Any]:
    """Accuracy, macro-F1 and calibration on the query cells."""
    from sklearn.metrics import f1_score

    found = soft.idxmax(axis=1).to_numpy()[query]
    true = truth.astype(str).to_numpy()[query]
    counts = pd.Series(true).value_counts()
    rare = counts.index[counts < FEWEST].tolist()
    keep = ~np.isin(true, rare)
    types = sorted(counts.index[counts >= FEWEST])
    confidence = soft.to_numpy().max(1)[query]
    right = found == true
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, 15)
    ece = sum(len(p) * abs(confidence[p].mean() - right[p].mean()) for p in parts) / len(order)
    return {
        "accuracy": float(right[keep].mean()),
        "macro_f1": float(f1_score(true[keep], found[keep], labels=types, average="macro")),
        "accuracy_all": float(right.mean()),
        "expected_calibration_error": float(ece),
        "query_cells": int(query.sum()),
        "left_out_types": {t: int(counts[t]) for t in rare},
    }


def run_one(tool: str, task: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One fit in this process."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    adata, batch_key, query = prepare(task)
    fit = fit_pyrosc if tool == "pyrosc" else fit_peer
    soft, meter = fit(adata, batch_key, seed, options)
    return {"task": task, "seed": seed, **score(soft, adata.obs["cell_type"], query), **meter.as_dict()}


def table() -> None:
    """Means over seeds of both tools, with standard errors of the accuracy."""
    for tool in ("pyrosc", "peer"):
        path = common.RESULTS / f"labels_{tool}.json"
        if not path.exists():
            continue
        fits = pd.DataFrame(json.loads(path.read_text())["fits"])
        for task, own in fits.groupby("task"):
            sem = own[["accuracy", "macro_f1"]].std() / np.sqrt(len(own))
            print(
                f"{tool:8s} {task:14s} {len(own)} seeds: accuracy {own['accuracy'].mean():.3f} ± "
                f"{sem['accuracy']:.3f}, macro-F1 {own['macro_f1'].mean():.3f} ± {sem['macro_f1']:.3f}, "
                f"ECE {own['expected_calibration_error'].mean():.3f}, {own['seconds'].median():.1f} s "
                f"(fastest {own['seconds'].min():.1f})"
            )


if __name__ == "__main__":
    common.run_tasks(__doc__, __file__, "labels", TASKS, run_one, table)
