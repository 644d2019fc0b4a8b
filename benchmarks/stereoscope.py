"""Fit pyrosc's Stereoscope on breast_reference → her2st_H1, and compare it with the peer's fit.

Both tools see the same genes, cells and spots; one function gives both log-likelihoods (`_spatial.py`). The
peer's figures are read from ``results/peer_stereoscope.json`` and its proportions from the file that
peer_stereoscope.py wrote; ours go to ``results/ours_stereoscope.json``. From pyrosc's environment::

    python benchmarks/stereoscope.py --peer SCRATCH/peer_stereoscope_celltype_major.npz

Each seed is fitted twice: once for its time, and once more, off the clock, with the objective taken at each
tenth epoch, to see when it passed the peer's.
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _common as common  # noqa: E402
import _spatial as spatial  # noqa: E402
import anndata  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import pyrosc  # noqa: E402


def state(model: pyrosc.SpatialStereoscope) -> dict[str, np.ndarray]:
    """Parameters in the form that ``_spatial.spots`` asks for."""
    mode = model.training
    v = model.posterior("v")["v"]
    model.train(mode)
    arrays = {n: getattr(model, n).detach().cpu().numpy() for n in ("W", "o", "beta", "eta")}
    return {"v": v, **arrays}


def fit(
    reference: anndata.AnnData, spots: anndata.AnnData, labels: str, seed: int
) -> tuple[dict[str, Any], pyrosc.SpatialStereoscope]:
    """Both fits with defaults, timed; then once more for the path of the objective."""
    with common.Meter() as first:
        rna = pyrosc.RNAStereoscope.from_anndata(reference, labels_key=labels, seed=seed)
        rna.fit(seed=seed, progress=False)
    with common.Meter() as second:
        model = pyrosc.SpatialStereoscope.from_rna_model(spots, rna, seed=seed)
        model.fit(seed=seed, progress=False)

    path: list[dict[str, float]] = []

    def watch(fitted: pyrosc.SpatialStereoscope, record: dict[str, Any]) -> None:
        if (record["epoch"] + 1) % 10 == 0:
            path.append({"seconds": record["seconds"], **spatial.spots(spots.X, **state(fitted))})

    again = pyrosc.SpatialStereoscope.from_rna_model(spots, rna, seed=seed)
    again.fit(seed=seed, progress=False, callbacks=[watch])

    codes = reference.obs[labels].cat.codes.to_numpy()
    W, o = rna.W.rows.detach().numpy(), rna.o.detach().numpy()
    result = {
        "seed": seed,
        "rna": first.as_dict()
        | {"epochs": len(rna.history), "log_likelihood": spatial.cells(reference.X, codes, W, o)},
        "spatial": second.as_dict()
        | {"epochs": len(model.history), **spatial.spots(spots.X, **state(model)), "path": path},
        "seconds": first.seconds + second.seconds,
    }
    return result, model


def same_reference(
    reference: anndata.AnnData, spots: anndata.AnnData, labels: str, peer: Any
) -> dict[str, Any]:
    """Both tools with the peer's profiles: how far the peer's end is from the maximum.

    Our fit from our start; the peer's parameters as they ended, and as they end when our fit goes on from
    there; and how its proportions still changed in its last epochs.
    """
    rna = pyrosc.RNAStereoscope.from_anndata(reference, labels_key=labels)
    rna.fit(1, progress=False)  # so that it counts as trained
    with torch.no_grad():
        rna.W.rows.copy_(torch.as_tensor(peer["W"]))
        rna.o.copy_(torch.as_tensor(peer["o"]))
    ours, continued = (pyrosc.SpatialStereoscope.from_rna_model(spots, rna) for _ in range(2))
    ours.fit(progress=False)
    last = max((k for k in peer if k.startswith("v_")), key=lambda k: int(k[2:]))
    unit = np.asarray(spots.X.sum(1)) * continued.scale.numpy()
    with torch.no_grad():
        ratio = np.maximum(peer[last] / unit, 1e-6)
        continued.V.rows.copy_(torch.as_tensor(np.log(np.expm1(ratio))))
        for name in ("beta", "eta"):
            getattr(continued, name).copy_(torch.as_tensor(peer[name]))
    at_end = spatial.spots(spots.X, **state(continued))
    continued.fit(progress=False)
    types = list(ours.cell_types)
    own, on = (m.get_proportions().to_numpy() for m in (ours, continued))
    before = {k: peer[k][:, :-1] / peer[k][:, :-1].sum(1, keepdims=True) for k in peer if k.startswith("v_")}
    return {
        "ours": spatial.spots(spots.X, **state(ours)),
        "peer_at_its_end": at_end,
        "going_on_from_there": spatial.spots(spots.X, **state(continued)),
        "ours_and_peer": agreement(own, peer["proportions"], types),
        "ours_and_going_on": agreement(own, on, types),
        "peer_earlier_and_at_its_end": {
            k[2:]: agreement(v, peer["proportions"], types)["median"] for k, v in before.items()
        },
    }


def agreement(ours: np.ndarray, theirs: np.ndarray, types: list[str]) -> dict[str, Any]:
    """Spearman correlation over spots, type by type."""
    found = {t: float(spearmanr(ours[:, i], theirs[:, i]).statistic) for i, t in enumerate(types)}
    return {
        "spearman": found,
        "median": float(np.median(list(found.values()))),
        "mean_difference": float(np.abs(ours - theirs).mean()),
        "mean_proportion": {t: float(theirs[:, i].mean()) for i, t in enumerate(types)},
    }


def main() -> None:
    """Fit each seed, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, default=None, help="the peer's npz; none: no correlations")
    parser.add_argument("--labels", default="celltype_major")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    suffix = "" if args.labels == "celltype_major" else f"_{args.labels}"
    kept = common.RESULTS / f"peer_stereoscope{suffix}.json"
    peer = json.loads(kept.read_text()) if kept.exists() else None
    arrays = np.load(args.peer) if args.peer else None
    reference, spots = spatial.load(args.labels, args.data_dir)

    fits, tables = [], []
    for seed in args.seeds:
        result, model = fit(reference, spots, args.labels, seed)
        tables.append(model.get_proportions())
        if arrays is not None:
            assert list(arrays["spots"]) == list(spots.obs_names)
            assert list(arrays["types"]) == list(tables[-1])
            result["peer"] = agreement(tables[-1].to_numpy(), arrays["proportions"], list(tables[-1]))
        if peer is not None:
            goal = peer["spatial"]["objective"]
            reached = [p["seconds"] for p in result["spatial"]["path"] if p["objective"] >= goal]
            result["seconds_to_peer_objective"] = reached[0] if reached else None
        fits.append(result)
        print(summary(result, peer), flush=True)
    content = {
        "tool": "pyrosc",
        **spatial.provenance(args.labels, reference, spots),
        "machine": common.machine(),
        "fits": fits,
        "between_seeds": [
            agreement(a.to_numpy(), tables[0].to_numpy(), list(a))["median"] for a in tables[1:]
        ],
        "versions": common.versions("pyrosc", "pyro-ppl", "torch", "anndata", "numpy"),
    }
    if arrays is not None:
        content["same_reference"] = found = same_reference(reference, spots, args.labels, dict(arrays))
        for what, value in found.items():
            print(what, value if "spearman" not in value else f"median Spearman {value['median']:.3f}")
    common.save_json(common.RESULTS / f"ours_stereoscope{suffix}.json", content)


def summary(fit: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """A few lines on one fit."""
    lines = [f"seed {fit['seed']}"]
    for part in ("rna", "spatial"):
        theirs = peer[part] if peer else {}
        line = f"  {part}: {fit[part]['seconds']:.1f} s, log-likelihood {fit[part]['log_likelihood']:.2f}"
        if theirs:
            line += f"; peer {theirs['seconds']:.1f} s, {theirs['log_likelihood']:.2f}"
            line += f"; {theirs['seconds'] / fit[part]['seconds']:.1f}x"
        lines.append(line)
    if peer:
        lines.append(
            f"  objective {fit['spatial']['objective']:.2f}, peer {peer['spatial']['objective']:.2f}, "
            f"passed after {fit['seconds_to_peer_objective']} s"
        )
    if "peer" in fit:
        lines.append(f"  Spearman with the peer, median over types {fit['peer']['median']:.3f}")
        lines += [f"    {t}: {r:.3f}" for t, r in fit["peer"]["spearman"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
