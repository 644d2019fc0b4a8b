"""What every benchmark script shares: data, split, one estimator of fit, one of integration.

The module runs unchanged in pyrosc's environment and in the peer's, so that both tools meet the same genes,
the same cells and the same arithmetic.  It imports neither tool.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import softplus

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


# --- data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """Counts with the names of the columns that a benchmark needs."""

    name: str
    adata: anndata.AnnData
    batch_key: str
    labels_key: str | None


KEYS: dict[str, tuple[str, str | None]] = {
    "pbmc_cite": ("batch", None),
    "kang_ifnb": ("condition", "cell_type"),
    "pbmc_3tech": ("donor", "cell_type"),
}


def data_folder() -> Path:
    """Folder of the test data: ``PYROSC_TEST_DATA``, or ``../shared/data`` seen from the project's root."""
    return Path(os.environ.get("PYROSC_TEST_DATA", ROOT.parent / "shared" / "data"))


def load(name: str, data_dir: str | Path | None = None) -> DataSet:
    """Read one benchmark data set; kang_ifnb comes with its 2000 highly variable genes only."""
    batch_key, labels_key = KEYS[name]
    adata = anndata.read_h5ad(Path(data_dir or data_folder()) / f"{name}.h5ad")
    if name == "kang_ifnb":
        adata = adata[:, variable_genes(name, adata, batch_key)].copy()
    for key in filter(None, (batch_key, labels_key)):
        adata.obs[key] = adata.obs[key].astype(str).astype("category")
    return DataSet(name, adata, batch_key, labels_key)


def variable_genes(name: str, adata: anndata.AnnData, batch_key: str, n_top: int = 2000) -> list[str]:
    """Highly variable genes, chosen once and kept as JSON, so that every environment uses the same."""
    path = RESULTS / f"hvg_{name}.json"
    if path.exists():
        return json.loads(path.read_text())["genes"]
    import scanpy as sc

    work = adata.copy()
    sc.pp.filter_genes(work, min_cells=3)
    sc.pp.highly_variable_genes(work, flavor="seurat_v3", n_top_genes=n_top, batch_key=batch_key)
    genes = work.var_names[work.var["highly_variable"]].tolist()
    how = {"min_cells": 3, "flavor": "seurat_v3", "n_top_genes": n_top, "batch_key": batch_key}
    save_json(path, {"how": how, "scanpy": metadata.version("scanpy"), "genes": genes})
    return genes


def split(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training (90 %) and validation cells (10 %)."""
    order = np.random.default_rng(seed).permutation(n)
    n_validation = round(n / 10)
    return order[n_validation:], order[:n_validation]


# --- held-out fit -------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout(
    encode: Encode,
    decode: Decode,
    x: sp.csr_matrix,
    batch: np.ndarray,
    *,
    draws: int = 25,
    importance_draws: int = 100,
    seed: int = 0,
    rows: int = 1024,
) -> dict[str, Any]:
    """Held-out ELBO at KL weight 1 and importance-weighted log-likelihood, nats per cell, higher is better.

    Parameters
    ----------
    encode
        ``(x, batch) -> (loc, scale)`` of q(z | x), with x as dense float32 counts.
    decode
        ``(z, batch, library) -> (log_mean, inverse_dispersion, zi_logits)``; ``library`` is the log of the
        total counts, shape (rows, 1).  ``inverse_dispersion`` broadcasts to the shape of ``log_mean``;
        ``zi_logits`` is None for a plain negative binomial.
    x, batch
        Counts (cells × genes) and batch codes of the held-out cells.
    draws
        Draws per cell for the ELBO; its KL(q || N(0, I)) is exact.
    importance_draws
        Draws per cell for the importance-weighted estimate; the first ``draws`` of them serve the ELBO.

    Returns
    -------
    dict
        ``elbo``, ``elbo_se`` (over cells), ``iwll``, ``iwll_se``, ``elbo_cells`` and ``iwll_cells``.
    """
    x = sp.csr_matrix(x)
    codes = torch.as_tensor(np.asarray(batch), dtype=torch.long)
    n = x.shape[0]
    parts = []
    for start in range(0, n, 512):
        dense = torch.from_numpy(x[start : start + 512].toarray().astype(np.float32))
        parts.append(encode(dense, codes[start : start + 512]))
    loc = torch.cat([p[0] for p in parts]).double()
    scale = torch.cat([p[1] for p in parts]).double()
    kl = 0.5 * (loc**2 + scale**2 - 1).sum(-1) - scale.log().sum(-1)

    generator = torch.Generator().manual_seed(seed)
    n_draws = max(draws, importance_draws)
    noise = torch.randn(n, n_draws, loc.shape[1], generator=generator, dtype=torch.float64)
    log_px = torch.empty(n, n_draws, dtype=torch.float64)
    step = max(1, rows // n_draws)
    for start in range(0, n, step):
        cells = slice(start, min(start + step, n))
        counts = torch.from_numpy(x[cells].toarray().astype(np.float64))
        z = loc[cells, None] + scale[cells, None] * noise[cells]
        library = counts.sum(1).log()[:, None].repeat_interleave(n_draws, 0)
        out = decode(z.flatten(0, 1).float(), codes[cells].repeat_interleave(n_draws), library.float())
        log_px[cells] = count_log_prob(counts, n_draws, *out)

    z = loc[:, None] + scale[:, None] * noise
    log_ratio = (scale[:, None].log() + 0.5 * noise**2 - 0.5 * z**2).sum(-1)
    log_weight = (log_px + log_ratio)[:, :importance_draws]
    elbo = log_px[:, :draws].mean(1) - kl
    iwll = log_weight.logsumexp(1) - math.log(importance_draws)
    return {
        "elbo": float(elbo.mean()),
        "elbo_se": float(elbo.std() / math.sqrt(n)),
        "iwll": float(iwll.mean()),
        "iwll_se": float(iwll.std() / math.sqrt(n)),
        "elbo_cells": elbo.numpy(),
        "iwll_cells": iwll.numpy(),
    }


def count_log_prob(
    counts: Tensor, n_draws: int, log_mean: Tensor, inverse_dispersion: Tensor, zi_logits: Tensor | None
) -> Tensor:
    """Log-probability of (c, g) counts under c·n_draws rows of parameters, cell by cell: shape (c, n_draws).

    Negative binomial by mean and inverse dispersion, or its zero-inflated form, in float64.  The terms with a
    log-gamma vanish at a zero count, so they are taken at the non-zeros only; this is exact.
    """
    log_mean = log_mean.double()
    theta = inverse_dispersion.double().expand(log_mean.shape)
    log_zero = -theta * torch.log1p(log_mean.exp() / theta)  # log-probability of a zero before inflation

    cell, gene = counts.nonzero(as_tuple=True)
    row = (cell[:, None] * n_draws + torch.arange(n_draws)).flatten()
    gene_ = gene.repeat_interleave(n_draws)
    k = counts[cell, gene].repeat_interleave(n_draws)
    t, m, z0 = theta[row, gene_], log_mean[row, gene_], log_zero[row, gene_]
    positive = z0 + k * (m + z0 / t - t.log()) + (k + t).lgamma() - t.lgamma() - (k + 1).lgamma()
    if zi_logits is None:
        dense, correction = log_zero, positive - z0
    else:
        logits = zi_logits.double()
        dense = softplus(log_zero - logits) - softplus(-logits)
        at = logits[row, gene_]
        correction = positive - at - softplus(z0 - at)
    total = dense.sum(1).index_add_(0, row, correction)
    return total.view(len(counts), n_draws)


# --- integration --------------------------------------------------------------------------------------------


def scib(
    adata: anndata.AnnData, latent: dict[str, np.ndarray], batch_key: str, labels_key: str
) -> dict[str, Any]:
    """Scores of scib-metrics for named latent spaces: ``{name: {"total", "bio", "batch", "metrics"}}``.

    The unintegrated reference is the PCA of the log-normalised counts.  Needs scib-metrics.
    """
    import scanpy as sc
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    work = anndata.AnnData(sp.csr_matrix(adata.X).copy(), obs=adata.obs[[batch_key, labels_key]].copy())
    sc.pp.normalize_total(work)
    sc.pp.log1p(work)
    sc.pp.pca(work, random_state=0)
    for name, z in latent.items():
        work.obsm[name] = np.ascontiguousarray(z, dtype=np.float32)
    bench = Benchmarker(
        work,
        batch_key=batch_key,
        label_key=labels_key,
        embedding_obsm_keys=list(latent),
        bio_conservation_metrics=BioConservation(),
        batch_correction_metrics=BatchCorrection(),
        pre_integrated_embedding_obsm_key="X_pca",
        progress_bar=False,
    )
    bench.benchmark()
    table = bench.get_results(min_max_scale=False)
    totals = {"Total": "total", "Bio conservation": "bio", "Batch correction": "batch"}
    return {
        name: {short: float(table.loc[name, column]) for column, short in totals.items()}
        | {"metrics": {m: float(table.loc[name, m]) for m in table.columns if m not in totals}}
        for name in latent
    }


# --- clock, memory, machine ---------------------------------------------------------------------------------


class Meter:
    """Context manager: wall clock, processor time, load average, and peak memory.

    ``peak_mib`` is beyond the memory at entry, ``process_mib`` that of the whole process: what a library
    imports late counts in the one, what it imports early only in the other.
    """

    def __enter__(self) -> Meter:
        self.load_before = os.getloadavg()
        self._memory = _status_mib("VmRSS")
        _reset_peak()
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_seconds = time.process_time() - self._cpu
        self.process_mib = _status_mib("VmHWM")
        self.peak_mib = self.process_mib - self._memory
        self.load_after = os.getloadavg()

    def as_dict(self) -> dict[str, Any]:
        """Figures for the JSON file."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_memory_mib": self.peak_mib,
            "load": {"before": self.load_before, "after": self.load_after},
        }


def spread(times: list[float]) -> dict[str, float]:
    """Seconds between successive times: 10th percentile, median, 90th percentile.

    Other work on the machine shows as a wide spread; the 10th percentile is the undisturbed pace.
    """
    between = np.diff(times)
    return {f"p{q}": float(np.percentile(between, q)) for q in (10, 50, 90)} if len(between) else {}


def _status_mib(field: str) -> float:
    """A memory figure of this process in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _reset_peak() -> None:
    """Set the kernel's high-water mark of this process to its present size; without it, it can only rise."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, Any]:
    """Processor, cores and threads in use."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, with Python's."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a result; the file is either the old one or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    """Print the integration scores of a saved latent space: ``python _common.py NAME FILE.npz``."""
    parser = argparse.ArgumentParser(description="Integration scores (scib-metrics) of a saved latent space.")
    parser.add_argument("name", choices=sorted(KEYS))
    parser.add_argument("file", type=Path, help="npz with an array `latent`, cells in the order of the data")
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    data = load(args.name, args.data_dir)
    assert data.labels_key is not None, f"{args.name} has no labels"
    latent = np.load(args.file)["latent"]
    print(json.dumps(scib(data.adata, {"latent": latent}, data.batch_key, data.labels_key)["latent"]))


if __name__ == "__main__":
    main()


# --- fits in processes of their own -------------------------------------------------------------------------


def run_tasks(
    doc: str,
    script: str,
    prefix: str,
    tasks: Iterable[str],
    run_one: Callable[[str, str, int, dict[str, Any]], dict[str, Any]],
    table: Callable[[], None],
) -> None:
    """Command line of a script that fits each task and seed in a process of its own and keeps the records.

    Records go to ``results/PREFIX_TOOL.json``. `run_one` takes tool, task, seed and the options of our model.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--tool", choices=["pyrosc", "peer"])
    parser.add_argument("--tasks", nargs="+", choices=sorted(tasks), default=sorted(tasks))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--options", default="{}", help="of our model, as JSON; such fits are not kept")
    parser.add_argument("--table", action="store_true", help="print what is kept")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        return table()
    options = json.loads(args.options)
    if args.one:
        print(json.dumps(run_one(args.tool, args.tasks[0], args.seeds[0], options)))
        return None
    path = RESULTS / f"{prefix}_{args.tool}.json"
    kept = json.loads(path.read_text())["fits"] if path.exists() else []
    for task in args.tasks:
        for seed in args.seeds:
            command = [sys.executable, script, "--one", "--tool", args.tool, "--tasks", task]
            command += ["--seeds", str(seed), "--options", args.options]
            done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
            fit = json.loads(done.stdout.splitlines()[-1])
            print({k: v for k, v in fit.items() if k != "load"}, flush=True)
            if options:
                continue
            kept = [f for f in kept if (f["task"], f["seed"]) != (task, seed)] + [fit]
            packages = ("pyrosc",) if args.tool == "pyrosc" else ("scvi-tools",)
            result = {
                "tool": args.tool,
                "machine": machine(),
                "versions": versions(*packages, "torch"),
                "fits": sorted(kept, key=lambda f: (f["task"], f["seed"])),
            }
            save_json(path, result)
    return None
