"""Differential expression by SCVI: calibration, time, memory, and known biology.

    python benchmarks/differential_expression.py simulations donors time kang memory

Each task adds its figures to ``results/differential_expression.json``; `peer_differential_expression.py`
runs the first and the third for scvi-tools. Simulations that are done are kept, so that a run can go on.
"""

import os

THREADS = 1
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))  # before torch is imported

import argparse  # noqa: E402
import json  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _common as common  # noqa: E402
import _differential as cases  # noqa: E402
import anndata  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.sparse as sp  # noqa: E402
import torch  # noqa: E402

import pyrosc  # noqa: E402

PACKAGES = ("pyrosc", "torch", "pyro-ppl", "anndata", "numpy", "scipy")
PATH = common.RESULTS / "differential_expression.json"
INTERFERON = ("ISG15", "IFI6", "IFIT1", "IFIT3", "ISG20")
#: What the parts of the method do: the default, and it without its parts.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "without shrinkage": {"shrink": False},
    "without counts": {"calibrate": False},
    "without both": {"calibrate": False, "shrink": False},
}


def _judge(adata: anndata.AnnData, truth: np.ndarray, table: pd.DataFrame) -> dict[str, float]:
    found = table.loc[adata.var_names]
    lfc = found["lfc_mean"].to_numpy()
    score = np.where(found["is_expressed"], found["proba_de"] + 1e-6 * np.abs(lfc), -1)
    inside = (truth >= found["lfc_lower"]) & (truth <= found["lfc_upper"])
    return {
        **cases.judge(truth, lfc, found["is_de_fdr"].to_numpy(), score),
        "coverage": float(inside[found["is_expressed"].to_numpy()].mean()),
        "lfc_rmse": float(np.sqrt(np.mean((lfc - truth) ** 2))),
        "silent_called": int((found["is_de_fdr"] & (found["raw_mean1"] + found["raw_mean2"] == 0)).sum()),
    }


def simulations(args: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """Realised FDR and power against known truth; with each, calls for labels that mean nothing."""
    done: dict[str, Any] = kept.get("each", {})
    for seed in args.seeds:
        if str(seed) in done:
            continue
        adata, truth = cases.simulate(seed)
        model = pyrosc.SCVI.from_anndata(adata).fit(progress=False)
        here: dict[str, Any] = {}
        for name, options in VARIANTS.items():
            with common.Meter() as meter:
                table = model.differential_expression(
                    groupby="type", group1="a", group2="b", seed=seed, **options
                )
            here[name] = {**_judge(adata, truth, table), "seconds": meter.seconds}
        shuffled = adata.copy()
        shuffled.obs["type"] = np.random.default_rng(seed).permutation(adata.obs["type"].astype(str))
        nothing = model.differential_expression(shuffled, groupby="type", seed=seed)
        here["permuted"] = {"calls": int(nothing["is_de_fdr"].sum()), "tests": len(nothing)}
        done[str(seed)] = here
        print(seed, here["default"], here["permuted"], flush=True)
        _save("simulations", {"each": done})
    found: dict[str, Any] = {"each": done, "mean": {}}
    for name in VARIANTS:
        keys = done[next(iter(done))][name]
        found["mean"][name] = {k: float(np.mean([d[name][k] for d in done.values()])) for k in keys}
    found["fdr_se"] = float(np.std([d["default"]["fdr"] for d in done.values()], ddof=1) / np.sqrt(len(done)))
    found["permuted_calls"] = sum(d["permuted"]["calls"] for d in done.values())
    found["permuted_tests"] = sum(d["permuted"]["tests"] for d in done.values())
    peer = cases.kept(common.RESULTS / "peer_de_simulations.json")
    both = sorted(set(peer) & set(done), key=int)
    if both:
        ours = [done[s]["default"] for s in both]
        found["with_peer"] = {
            "simulations": len(both),
            **{f"ours_{k}": float(np.mean([o[k] for o in ours])) for k in ("fdr", "power", "power_ranked")},
            **{
                f"peer_{k}": float(np.mean([peer[s][k] for s in both]))
                for k in ("fdr", "power", "power_ranked")
            },
        }
    print(found["mean"], found.get("with_peer"))
    return found


def donors(args: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """Realised FDR where donors differ, by number of donors and design, with and without ``donor_key``."""
    done: dict[str, Any] = kept.get("each", {})
    for paired in (True, False):
        for n in (3, 4, 8):
            name = f"{n} {'in both conditions' if paired else 'in each condition'}"
            if name in done:
                continue
            runs = []
            for seed in range(3):
                adata, truth = cases.simulate_donors(seed, n, paired)
                model = pyrosc.SCVI.from_anndata(adata).fit(progress=False)
                options = {"groupby": "condition", "group1": "treated", "group2": "control"}
                runs.append(
                    {
                        key or "cells": _judge(
                            adata, truth, model.differential_expression(**options, donor_key=key)
                        )
                        for key in ("donor", None)
                    }
                )
            done[name] = {
                k: {m: float(np.mean([r[k][m] for r in runs])) for m in ("fdr", "power", "calls", "coverage")}
                for k in ("donor", "cells")
            }
            print(name, done[name], flush=True)
            _save("donors", {"each": done})
    return {"each": done}


def clock(args: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """One-vs-rest over the cell types of kang_ifnb, 4000 variable genes, five times."""
    adata = cases.kang(args.data_dir, n_genes=4000)
    # time does not depend on the weights
    model = pyrosc.SCVI.from_anndata(adata, batch_key="condition").fit(2, progress=False)
    meters = []
    for _ in range(5):
        with common.Meter() as meter:
            model.differential_expression(groupby="cell_type")
        meters.append(meter)
    found = {
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "seconds": [m.seconds for m in meters],
        "cpu_seconds": [m.cpu_seconds for m in meters],
        "median": float(np.median([m.seconds for m in meters])),
        "median_cpu": float(np.median([m.cpu_seconds for m in meters])),
        "load": os.getloadavg(),
    }
    peer = common.RESULTS / "peer_de_time.json"
    if peer.exists():
        other = json.loads(peer.read_text())
        found["peer_median"], found["peer_median_cpu"] = other["median"], other.get("median_cpu")
        found["ratio"] = other["median"] / found["median"]
    print(found)
    return found


def kang(args: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """Stimulated against control in each cell type: interferon genes, Wilcoxon's test, pseudobulk."""
    import scanpy as sc
    from scipy.stats import spearmanr, ttest_rel

    adata = cases.kang(args.data_dir)
    with common.Meter() as fitting:
        model = pyrosc.SCVI.from_anndata(adata, batch_key="condition").fit(progress=False)
    options = {"groupby": "condition", "group1": "stimulated", "group2": "control", "within": "cell_type"}
    tables = {
        "cells": model.differential_expression(**options),
        "donors": model.differential_expression(**options, donor_key="donor"),
    }
    normal = adata.copy()
    sc.pp.normalize_total(normal)
    sc.pp.log1p(normal)
    found: dict[str, Any] = {"genes": adata.n_vars, "fit_seconds": fitting.seconds, "types": {}}
    for kind in adata.obs["cell_type"].cat.categories:
        mine = normal[normal.obs["cell_type"] == kind].copy()
        sc.tl.rank_genes_groups(
            mine, "condition", groups=["stimulated"], reference="control", method="wilcoxon"
        )
        wilcoxon = sc.get.rank_genes_groups_df(mine, "stimulated").set_index("names")["scores"]
        change, t = _pseudobulk(adata[adata.obs["cell_type"] == kind], ttest_rel)
        here: dict[str, Any] = {"n_cells": mine.n_obs}
        for name, table in tables.items():
            own = table[table["within"] == kind]
            ranks = {g: int(own.index.get_loc(g)) + 1 for g in INTERFERON if g in own.index}
            tested = own.index[own["is_expressed"]]
            z = (own["lfc_unshrunken"] / own["lfc_std"]).loc[tested]
            strong = own.loc[tested].sort_values("proba_de").index[-50:]
            here[name] = {
                "called": int(own["is_de_fdr"].sum()),
                "expressed": len(tested),
                "ranks": ranks,
                "lfc_and_pseudobulk": float(
                    spearmanr(own.loc[tested, "lfc_mean"], change[tested], nan_policy="omit").statistic
                ),
                "lfc_and_wilcoxon": float(spearmanr(own.loc[tested, "lfc_mean"], wilcoxon[tested]).statistic),
                "score_and_wilcoxon": float(spearmanr(z, wilcoxon[tested]).statistic),
                "score_and_pseudobulk_t": float(spearmanr(z, t[tested], nan_policy="omit").statistic),
                "top50_also_wilcoxon": float(np.mean(np.isin(strong, wilcoxon.abs().nlargest(50).index))),
            }
        found["types"][str(kind)] = here
        print(kind, here, flush=True)
    return found


def _pseudobulk(adata: anndata.AnnData, test: Callable[..., Any]) -> tuple[pd.Series, pd.Series]:
    """Mean change in log2 CPM of paired donor sums, and its t statistic."""
    sums: dict[str, list[np.ndarray]] = {"stimulated": [], "control": []}
    for donor in adata.obs["donor"].unique():
        both = {
            c: adata[((adata.obs["donor"] == donor) & (adata.obs["condition"] == c)).to_numpy()] for c in sums
        }
        if min(b.n_obs for b in both.values()) < 3:
            continue
        for c, cells in both.items():
            total = np.asarray(cells.X.sum(0)).ravel()
            sums[c].append(np.log2(1e6 * (total + 0.5) / (total.sum() + 1)))
    one, two = (np.stack(sums[c]) for c in sums)
    t = np.asarray(test(one, two).statistic)
    return pd.Series((one - two).mean(0), adata.var_names), pd.Series(t, adata.var_names)


def memory(args: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """30,000 genes × 100,000 cells in 20 groups: peak memory beyond the loaded data."""
    rng = np.random.default_rng(0)
    n, g, per_cell = 100_000, 30_000, 800
    share = rng.lognormal(0, 2, g)
    columns = rng.choice(g, (n, per_cell), p=share / share.sum()).astype(np.int32)
    columns.sort(axis=1)
    values = 1 + rng.poisson(0.3, n * per_cell).astype(np.float32)
    x = sp.csr_matrix((values, columns.ravel(), np.arange(0, n * per_cell + 1, per_cell)), shape=(n, g))
    del columns, values
    x.sum_duplicates()
    obs = pd.DataFrame(
        {"group": pd.Categorical.from_codes(rng.integers(0, 20, n), [f"g{i}" for i in range(20)])}
    )
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(x, obs=obs)
    warnings.simplefilter("ignore")
    model = pyrosc.SCVI.from_anndata(adata)  # weights do not matter here
    with common.Meter() as meter:
        table = model.differential_expression(groupby="group")
    found = {
        "cells": n,
        "genes": g,
        "groups": 20,
        "rows": len(table),
        "nonzeros": int(x.nnz),
        "cells_decoded": table.attrs["differential_expression"]["cells_decoded"],
        "table_mib": float(table.memory_usage().sum() / 2**20),
        **meter.as_dict(),
    }
    print(found)
    return found


TASKS = {"simulations": simulations, "donors": donors, "time": clock, "kang": kang, "memory": memory}


def _save(task: str, result: dict[str, Any]) -> None:
    content = json.loads(PATH.read_text()) if PATH.exists() else {}
    content[task] = {**result, "machine": common.machine(), "versions": common.versions(*PACKAGES)}
    common.save_json(PATH, content)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=cases.SEEDS)
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    for task in args.tasks:
        kept = json.loads(PATH.read_text()).get(task, {}) if PATH.exists() else {}
        _save(task, TASKS[task](args, kept))


if __name__ == "__main__":
    main()
