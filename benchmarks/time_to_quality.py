"""Fit pyrosc's SCVI with its defaults where the peer was fitted with its own, and compare time and quality.

Both see the same genes, training cells and held-out cells; one function evaluates both.  The peer's figures
are read from ``results/peer_NAME.json`` (written by peer_fit.py; ``--run-peer`` runs that first), ours go to
``results/ours_NAME.json``.  From pyrosc's environment::

    python benchmarks/time_to_quality.py --data kang_ifnb pbmc_3tech pbmc_cite --seeds 0 1 2 \
        --peer-python PATH_OF_THE_PEERS_PYTHON

Integration scores need scib-metrics, in this environment or in the peer's.  Every fit has a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _common as common  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

HERE = Path(__file__).resolve().parent


# --- ours ---------------------------------------------------------------------------------------------------


def adapter(model: torch.nn.Module) -> tuple[common.Encode, common.Decode]:
    """Encoder and decoder of a trained SCVI in the form ``heldout`` asks for.

    Only the model's Pyro side is used: ``model`` and ``guide`` with their arguments, the latent site ``z``
    and the law of the observed site ``x``.
    """
    from pyro import poutine

    model.eval()
    n_genes = model.registry.n_vars()

    def arguments(x: Tensor, batch: Tensor) -> dict[str, Tensor]:
        none = x.new_zeros(len(x), 0)
        return {
            "x": x,
            "batch": batch,
            "labels": torch.zeros_like(batch),
            "size_factor": x.new_ones(len(x)),
            "categorical_covariates": none.long(),
            "continuous_covariates": none,
        }

    def encode(x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        trace = poutine.trace(model.guide).get_trace(**arguments(x, batch))
        q = trace.nodes["z"]["fn"].base_dist
        return q.loc, q.scale

    def decode(z: Tensor, batch: Tensor, library: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # the decoder reads nothing of x but its total, so all counts may sit in the first gene
        x = z.new_zeros(len(z), n_genes)
        x[:, :1] = library.exp()
        held = poutine.condition(model.model, {"z": z})
        law = poutine.trace(held).get_trace(**arguments(x, batch)).nodes["x"]["fn"].base_dist
        nb = getattr(law, "nb", law)  # the count part of a zero-inflated law
        return nb.log_mean, nb.log_inverse_dispersion.exp(), getattr(law, "zi_logits", None)

    return encode, decode


def fit_ours(name: str, seed: int, folder: Path, data_dir: Path | None) -> None:
    """One fit with defaults: figures to ``ours.json``, latent space to ``ours.npz`` in a folder."""
    import pyrosc

    torch.set_num_threads(THREADS)
    data = common.load(name, data_dir)
    train, validation = common.split(data.adata.n_obs)
    train, validation = np.sort(train), np.sort(validation)
    with common.Meter() as total:
        model = pyrosc.SCVI.from_anndata(data.adata, batch_key=data.batch_key, seed=seed)
        with common.Meter() as fit:
            model.fit(train_indices=train, validation_indices=validation, seed=seed)

    encode, decode = adapter(model)
    codes = data.adata.obs[data.batch_key].cat.codes.to_numpy()  # sorted categories, as in the registry
    score = common.heldout(encode, decode, data.adata.X[validation], codes[validation])
    cells = {key: score.pop(key) for key in ("elbo_cells", "iwll_cells")}
    np.savez(folder / "ours.npz", latent=model.get_latent_representation(), validation=validation, **cells)
    history = model.history
    result = {
        "seed": seed,
        **fit.as_dict(),
        "peak_memory_mib": total.peak_mib,
        "peak_process_mib": total.process_mib,
        "epochs": len(history),
        "steps": int(history["steps"].iloc[-1]),
        "epoch_seconds": common.spread([0.0, *history["seconds"]]),
        **score,
        "history": {
            "seconds": history["seconds"].tolist(),
            "elbo_validation": history["elbo_validation"].tolist(),
        },
        "versions": common.versions("pyrosc", "pyro-ppl", "torch", "anndata", "numpy"),
    }
    common.save_json(folder / "ours.json", result)


def seconds_to_reach(history: dict[str, list[float]], elbo: float) -> float | None:
    """First second at which the held-out ELBO was at least the given one."""
    pairs = zip(history["seconds"], history["elbo_validation"], strict=True)
    return next((second for second, value in pairs if value is not None and value >= elbo), None)


# --- both ---------------------------------------------------------------------------------------------------


def scib_scores(name: str, latent: Path, python: str | None, data_dir: Path | None) -> dict[str, Any] | None:
    """Integration scores of a latent space, by this environment or the peer's; None where neither can."""
    if common.KEYS[name][1] is None:
        return None
    if importlib.util.find_spec("scib_metrics"):
        python = sys.executable
    if python is None:
        return None
    command = [python, str(HERE / "_common.py"), name, str(latent)]
    command += ["--data-dir", str(data_dir)] if data_dir else []
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All fits of ours on one data set beside the peer's kept one."""
    kept = common.RESULTS / f"peer_{name}.json"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        extra = ["--data-dir", str(args.data_dir)] if args.data_dir else []
        if args.run_peer:
            command = [args.peer_python, str(HERE / "peer_fit.py"), name, "--out", scratch, *extra]
            subprocess.run(command, check=True)
        if not kept.exists():
            raise SystemExit(
                f"{kept.name} is missing: run peer_fit.py in the peer's environment, or --run-peer"
            )
        peer = json.loads(kept.read_text())
        fits = []
        for seed in args.seeds:
            command = [sys.executable, __file__, "--fit", name, "--seeds", str(seed), "--scratch", scratch]
            subprocess.run(command + extra, check=True)
            fit = json.loads((folder / "ours.json").read_text())
            fit["seconds_to_peer_elbo"] = seconds_to_reach(fit["history"], peer["elbo"])
            fit["scib"] = scib_scores(name, folder / "ours.npz", args.peer_python, args.data_dir)
            fits.append(fit)
            print(row(f"pyrosc, seed {seed}", fit, peer), flush=True)
    result = {"tool": "pyrosc", "data": name, "machine": common.machine(), "fits": fits, "mean": mean(fits)}
    common.save_json(common.RESULTS / f"ours_{name}.json", result)
    return result


def mean(fits: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; None where a figure is missing in any of them."""
    table: dict[str, Any] = {}
    for key in (
        "seconds",
        "seconds_to_peer_elbo",
        "elbo",
        "elbo_se",
        "iwll",
        "peak_memory_mib",
        "peak_process_mib",
    ):
        values = [fit.get(key) for fit in fits]
        table[key] = None if None in values else float(np.mean(values))
    scores = [fit["scib"] for fit in fits]
    table["scib"] = None
    if None not in scores:
        table["scib"] = {key: float(np.mean([s[key] for s in scores])) for key in ("total", "bio", "batch")}
    return table


COLUMNS = "seconds", "ratio", "reached", "ratio", "ELBO", "± se", "IWLL", "total", "bio", "batch", "MiB"
WIDTHS = 9, 7, 9, 7, 10, 6, 10, 7, 7, 7, 7


def row(title: str, fit: dict[str, Any], peer: dict[str, Any]) -> str:
    """A line of the table; the ratios are the peer's seconds over ours."""
    seconds, reached = fit["seconds"], fit.get("seconds_to_peer_elbo")
    scib = fit.get("scib") or {}
    values = (
        f"{seconds:.1f}",
        f"{peer['seconds'] / seconds:.1f}x",
        "-" if reached is None else f"{reached:.1f}",
        "-" if reached is None else f"{peer['seconds'] / reached:.1f}x",
        f"{fit['elbo']:.2f}",
        f"{fit['elbo_se']:.2f}",
        f"{fit['iwll']:.2f}",
        *(f"{scib[key]:.3f}" if key in scib else "-" for key in ("total", "bio", "batch")),
        f"{fit['peak_memory_mib']:.0f}",
    )
    return title.ljust(22) + "".join(v.rjust(w) for v, w in zip(values, WIDTHS, strict=True))


def pace(fits: list[dict[str, Any]], peer: dict[str, Any]) -> str:
    """The same times were the machine idle: the 10th percentile of the epoch times by the epochs."""
    if "epoch_seconds" not in peer:
        return ""
    theirs = peer["epoch_seconds"]["p10"] * peer["epochs"]
    ours = float(np.mean([fit["epoch_seconds"]["p10"] * fit["epochs"] for fit in fits]))
    return f"at undisturbed pace: scvi-tools {theirs:.1f} s, pyrosc {ours:.1f} s, {theirs / ours:.1f}x"


def main() -> None:
    """Compare on each data set, print one table per set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=sorted(common.KEYS), default=sorted(common.KEYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peer-python", help="interpreter of the environment that holds scvi-tools")
    parser.add_argument(
        "--run-peer", action="store_true", help="fit the peer first (up to an hour on pbmc_cite)"
    )
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--fit", choices=sorted(common.KEYS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        return fit_ours(args.fit, args.seeds[0], args.scratch, args.data_dir)
    if args.run_peer and not args.peer_python:
        parser.error("--run-peer needs --peer-python")

    torch.set_num_threads(THREADS)
    for name in args.data:
        print(name.ljust(22) + "".join(c.rjust(w) for c, w in zip(COLUMNS, WIDTHS, strict=True)))
        result = compare(name, args)
        print(row("pyrosc, mean", result["mean"], peer := read_peer(name)))
        print(row("scvi-tools", peer, peer))
        print(pace(result["fits"], peer), end="\n\n", flush=True)


def read_peer(name: str) -> dict[str, Any]:
    """The peer's kept figures."""
    return json.loads((common.RESULTS / f"peer_{name}.json").read_text())


if __name__ == "__main__":
    main()
