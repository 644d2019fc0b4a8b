"""Fit scvi-tools' Stereoscope on breast_reference → her2st_H1, and keep its figures as JSON.

Runs in the peer's own environment (scvi-tools 1.4.2, scikit-misc), never in pyrosc's::

    python benchmarks/peer_stereoscope.py --out SCRATCH_FOLDER

The reference model trains for its default of 400 epochs, the spatial one for the 5,000 of its paper; the
state after 400 epochs, the default of its ``train()``, and at some more is kept on the way. The clock runs
over the two ``train()`` alone. Proportions and parameters go to ``--out`` (not for git), figures to
``benchmarks/results/peer_stereoscope.json`` (``…_LABELS.json`` for other types than celltype_major).
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _common as common  # noqa: E402
import _spatial as spatial  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from scvi.external import RNAStereoscope, SpatialStereoscope  # noqa: E402

RNA_EPOCHS, SPATIAL_EPOCHS = 400, 5000
KEPT = (400, 1000, 2000, 3000, 4000)


class Snapshots(Callback):
    """Notes the time at the end of each epoch, and copies the parameters at some."""

    def __init__(self, epochs: tuple[int, ...]) -> None:
        self.epochs = set(epochs)
        self.times: list[float] = []
        self.kept: dict[int, dict[str, np.ndarray]] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Called by the trainer."""
        self.times.append(time.perf_counter())
        if len(self.times) in self.epochs:
            self.kept[len(self.times)] = parameters(pl_module.module)


def parameters(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Free parameters of the spatial model, v (spots, types + 1) after softplus."""
    raw = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    return {"v": spatial.softplus(raw["V"]).T, "beta": raw["beta"], "eta": raw["eta"]}


def main() -> None:
    """Fit, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the proportions (npz)")
    parser.add_argument("--labels", default="celltype_major", help="column of the reference with the types")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--epochs", type=int, nargs=2, default=None, help="for a trial; writes no JSON result"
    )
    args = parser.parse_args()
    rna_epochs, spatial_epochs = args.epochs or (RNA_EPOCHS, SPATIAL_EPOCHS)

    torch.set_num_threads(THREADS)
    reference, spots = spatial.load(args.labels, args.data_dir)
    scvi.settings.seed = args.seed
    quiet = {"enable_progress_bar": False}

    RNAStereoscope.setup_anndata(reference, labels_key=args.labels)
    rna = RNAStereoscope(reference)
    with common.Meter() as first:
        rna.train(max_epochs=rna_epochs, **quiet)
    W, o = rna.module.get_params()
    types = reference.obs[args.labels].cat.categories.tolist()
    mapping = rna.adata_manager.get_state_registry("labels").categorical_mapping
    assert list(mapping) == types
    codes = reference.obs[args.labels].cat.codes.to_numpy()

    SpatialStereoscope.setup_anndata(spots)
    model = SpatialStereoscope.from_rna_model(spots, rna)
    clock = Snapshots((*KEPT, spatial_epochs))
    with common.Meter() as second:
        started = time.perf_counter()
        model.train(max_epochs=spatial_epochs, callbacks=[clock], **quiet)

    path = []
    for epoch, state in sorted(clock.kept.items()):
        fit = spatial.spots(spots.X, W=W.T, o=o, **state)
        path.append({"epochs": epoch, "seconds": clock.times[epoch - 1] - started, **fit})
    last = clock.kept[spatial_epochs]
    proportions = model.get_proportions()
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(
        args.out / f"peer_stereoscope_{args.labels}.npz",
        W=W.T,
        o=o,
        types=np.array(types),
        spots=np.array(spots.obs_names, dtype=str),
        proportions=proportions.to_numpy(),
        **{f"v_{epoch}": state["v"] for epoch, state in clock.kept.items()},
        beta=last["beta"],
        eta=last["eta"],
    )
    result = {
        "tool": "scvi-tools",
        **spatial.provenance(args.labels, reference, spots),
        "seed": args.seed,
        "machine": common.machine(),
        "rna": first.as_dict()
        | {"epochs": rna_epochs, "log_likelihood": spatial.cells(reference.X, codes, W.T, o)},
        "spatial": second.as_dict()
        | {"epochs": spatial_epochs, "epoch_seconds": common.spread(clock.times), **path[-1], "path": path},
        "versions": common.versions("scvi-tools", "torch", "lightning", "anndata", "numpy"),
    }
    result["spatial"]["seconds"] = second.seconds
    for key, value in result.items():
        print(f"{key}: {value}")
    if args.epochs is None:
        suffix = "" if args.labels == "celltype_major" else f"_{args.labels}"
        common.save_json(common.RESULTS / f"peer_stereoscope{suffix}.json", result)


if __name__ == "__main__":
    main()
