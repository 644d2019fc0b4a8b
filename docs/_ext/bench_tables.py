"""Tables of ``benchmarks/results/*.json``, for these pages and for the README.

In a page, ``{bench-table} NAME`` is replaced by the table of that name, made when the pages are built. In the
README a table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``;

    python docs/_ext/bench_tables.py

writes it anew. NAME is that of a function below, or a data set: ``pbmc_cite``, ``kang_ifnb``, ``pbmc_3tech``.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SETS = {"pbmc_cite": "batch", "kang_ifnb": "condition", "pbmc_3tech": "technology"}
PENDING = "*Not measured yet.*"


def read(name: str) -> dict[str, Any] | None:
    """A result, or None where it has not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """As text; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def data_set(name: str) -> str:
    """Every measure of both tools on one data set."""
    peer, ours = read(f"peer_{name}"), read(f"ours_{name}")
    if peer is None and ours is None:
        return PENDING
    rows = []
    if peer is not None:
        rows.append(["scvi-tools 1.4.2", *_measures(peer, None)])
    if ours is not None:
        rows += [[f"pyrosc, seed {f['seed']}", *_measures(f, peer)] for f in ours["fits"]]
        rows.append(["pyrosc, mean", *_measures(ours["mean"], peer)])
    header = ["", "seconds", "ratio", "seconds to peer's ELBO", "held-out ELBO", "log-likelihood"]
    return table([*header, "scIB total", "bio", "batch", "peak memory (MiB)"], rows)


def _measures(fit: dict[str, Any], peer: dict[str, Any] | None) -> list[str]:
    scib = fit.get("scib") or {}
    ratio = "–" if peer is None else f"{peer['seconds'] / fit['seconds']:.1f}×"
    return [
        number(fit["seconds"]),
        ratio,
        number(fit.get("seconds_to_peer_elbo")),
        f"{number(fit['elbo'])} ± {number(fit['elbo_se'])}",
        number(fit["iwll"]),
        *(number(scib.get(key), 3) for key in ("total", "bio", "batch")),
        number(fit["peak_memory_mib"], 0),
    ]


def summary() -> str:
    """The main figures of all data sets."""
    rows = []
    for name, nuisance in SETS.items():
        peer, ours = read(f"peer_{name}"), read(f"ours_{name}")
        if peer is None or ours is None:
            continue
        mean = ours["mean"]
        reached = mean["seconds_to_peer_elbo"]
        pair = [(t.get("scib") or {}).get("total") for t in (peer, mean)]
        size = f"{peer['cells']:,} × {peer['genes']:,}, {nuisance}"
        rows.append(
            [
                f"{name} ({size})",
                f"{number(peer['seconds'])} / {number(mean['seconds'])}",
                "–" if reached is None else f"{number(reached)} ({peer['seconds'] / reached:.0f}×)",
                f"{number(peer['elbo'])} / {number(mean['elbo'])}",
                f"{number(pair[0], 3)} / {number(pair[1], 3)}",
            ]
        )
    header = ["scvi-tools / pyrosc", "seconds of a fit", "seconds until the peer's final ELBO is passed"]
    return table([*header, "held-out ELBO", "scIB total"], rows) if rows else PENDING


def step() -> str:
    """Time of one training step."""
    found = read("step_time")
    if found is None:
        return PENDING
    header = ["", "scvi-tools (ms)", "pyrosc (ms)", "ratio"]
    rows = [["scVI, 128 × 4,000, ZINB", *_step(found, "median_ms")]]
    more = {"step_time_totalvi": "totalVI, 256 × (4,000 genes + 14 proteins), processor time"}
    rows += [[label, *_step(other, "median_ms")] for name, label in more.items() if (other := read(name))]
    return table(header, rows)


def _step(found: dict[str, Any], key: str) -> list[str]:
    return [*(number(found[tool][key]) for tool in ("peer", "ours")), f"{found['ratio']:.2f}×"]


def peakvi() -> str:
    """PeakVI on accessibility of blood cells."""
    peer, ours = read("peer_peakvi"), read("peakvi")
    if peer is None or ours is None:
        return PENDING
    rows, few = [], peer["cells"]
    for sample, words in ((0, ""), (1, ", other cells")):
        theirs = read(f"peer_peakvi_sample{sample}") if sample else peer
        rows += [] if theirs is None else [[f"scvi-tools 1.4.2{words}", *_accessibility(theirs)]]
        mine = [f for f in ours["fits"] if f["cells"] == few and f.get("sample", 0) == sample]
        rows += [[f"pyrosc, seed {f['seed']}{words}", *_accessibility(f)] for f in mine]
    rows += [
        [f"pyrosc, all {f['cells']:,} cells × {f['peaks']:,}", *_accessibility(f)]
        for f in ours["fits"]
        if f["cells"] != few
    ]
    header = ["", "processor seconds", "seconds", "held-out ELBO", "log-likelihood", "NMI, ARI at 1"]
    return table([*header, "NMI, ARI at best (clusters)", "scIB total", "bio", "batch"], rows)


def _accessibility(fit: dict[str, Any]) -> list[str]:
    clusters, scib = fit["clusters"], fit.get("scib") or {}
    best = max(clusters, key=lambda r: clusters[r]["nmi"])
    one, top = clusters["1"], clusters[best]
    return [
        number(fit["cpu_seconds"]),
        number(fit["seconds"]),
        f"{number(fit['elbo'])} ± {number(fit['elbo_se'])}",
        number(fit["iwll"]),
        f"{number(one['nmi'], 3)}, {number(one['ari'], 3)}",
        f"{number(top['nmi'], 3)}, {number(top['ari'], 3)} ({number(top['clusters'], 0)})",
        *(number(scib.get(key), 3) for key in ("total", "bio", "batch")),
    ]


def peakvi_likelihoods() -> str:
    """PeakVI's three laws on the same cells."""
    found = read("peakvi_likelihoods")
    if found is None:
        return PENDING
    rows = []
    for fit in found["fits"]:
        nats = [
            f"{number(fit[k])} ± {number(fit[f'{k}_se'])}" if k in fit else "" for k in ("seen", "fragments")
        ]
        rows.append([f"`{fit['likelihood']}`", number(fit["cpu_seconds"]), *nats])
    return table(["law", "processor seconds", "whether seen", "fragments, up to 4"], rows)


def peakvi_steps() -> str:
    """Time of one training step of PeakVI."""
    found = read("peakvi_steps")
    if found is None:
        return PENDING
    ms = found["median_ms"]
    rows = [["scvi-tools 1.4.2", number(ms["peer"])], ["pyrosc", number(ms["pyrosc"])]]
    rows.append(["ratio", f"{found['ratio']:.2f}×"])
    return table(["one training step, 128 cells × all peaks", "milliseconds"], rows)


def cellassign() -> str:
    """CellAssign on sorted cells, and on a large made-up matrix."""
    found = read("cellassign")
    if found is None:
        return PENDING
    names = {
        "pbmc_facs": "800 cells: B, CD4 T, CD8 T",
        "pbmc_facs_gene_dispersion": 'the same, `dispersion="gene"`',
        "pbmc_facs_and_zheng": '1,300 cells: these and NK, `other="other"`',
    }
    keys = ("accuracy", "accuracy_b", "confidence", "calibration_error")
    rows = [
        [
            label,
            *(number(found[name]["mean"][key], 3) for key in keys),
            number(found[name]["mean"]["seconds"]),
            number(found[name]["mean"]["peak_memory_mib"], 0),
        ]
        for name, label in names.items()
    ]
    large = found["large"]
    label = f"{large['cells']:,} cells, {large['markers']} markers, {large['types']} types, made up"
    rows.append(
        [
            label,
            number(large["accuracy"], 3),
            *["–"] * 3,
            number(large["seconds"]),
            number(large["peak_memory_mib"], 0),
        ]
    )
    header = ["", "accuracy", "B against others", "mean confidence", "calibration error", "seconds"]
    return table([*header, "peak memory (MiB)"], rows)


def solo() -> str:
    """Known doublets, found by both tools."""
    found = read("solo")
    if found is None:
        return PENDING
    names = {
        "hashing_doublets": "hashing_doublets",
        "kang_ifnb": "kang_ifnb",
        "pbmc3k": "pbmc3k, doublets put in",
        "brain10k": "brain10k (3,000 cells), doublets put in",
    }
    rows = []
    for name, label in names.items():
        peer, ours = read(f"peer_solo_{name}"), found.get(name)
        tools = {"scvi-tools 1.4.2": peer, "pyrosc": ours and ours["mean"]}
        rows += [[f"{label}, {tool}", *_doublets(figures)] for tool, figures in tools.items() if figures]
    return table(["", "AUROC", "average precision", "rate", "true rate", "seconds"], rows)


TASKS = {
    "kang_ifnb": "kang_ifnb, stimulated hidden",
    "pbmc_3tech/0": "pbmc_3tech, first technology hidden",
    "pbmc_3tech/1": "pbmc_3tech, second hidden",
    "pbmc_3tech/2": "pbmc_3tech, third hidden",
}


def labels() -> str:
    """Labels carried to other cells: means over seeds, ± standard error over them."""
    rows = []
    for task, label in TASKS.items():
        for tool, title in {"peer": "scvi-tools 1.4.2", "pyrosc": "pyrosc"}.items():
            found = read(f"labels_{tool}") or {"fits": []}
            fits = [f for f in found["fits"] if f["task"] == task]
            if fits:
                rows.append([f"{label}, {title}", str(len(fits)), *map(_mean, *_columns(fits))])
    header = ["", "seeds", "accuracy", "macro-F1", "calibration error", "seconds of processor"]
    return table(header, rows) if rows else PENDING


def _columns(fits: list[dict[str, Any]]) -> tuple[list[list[float]], list[int]]:
    keys = ("accuracy", "macro_f1", "expected_calibration_error", "cpu_seconds")
    return [[f[k] for f in fits] for k in keys], [3, 3, 3, 0]


def _mean(values: list[float], digits: int) -> str:
    n = len(values)
    mean = sum(values) / n
    if n < 2 or not digits:
        return number(mean, digits)
    spread = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return f"{number(mean, digits)} ± {number(spread, digits)}"


QUERIES = {"3pv1": "3' v1", "3pv2": "3' v2", "5p": "5'"}


def surgery() -> str:
    """Labels carried to a query by both tools, and seconds: means over seeds, ± standard error."""
    rows = []
    for task, label in QUERIES.items():
        for tool, title in {"peer": "scvi-tools 1.4.2", "pyrosc": "pyrosc"}.items():
            fits = [f for f in (read(f"surgery_{tool}") or {"fits": []})["fits"] if f["task"] == task]
            if fits:
                columns = [[f[k] for f in fits] for k in ("accuracy_15", "cpu_seconds")]
                anew = [f["cpu_seconds_all"] for f in fits if "cpu_seconds_all" in f]
                shown = [*map(_mean, columns, [3, 0]), _mean(anew, 0) if anew else "–"]
                rows.append([f"{label}, {title}", str(len(fits)), *shown])
    header = ["query", "seeds", "accuracy", "query: seconds of processor", "anew on all cells"]
    return table(header, rows) if rows else PENDING


def stereoscope() -> str:
    """Spots and reference, fitted by both tools."""
    peer, ours = read("peer_stereoscope"), read("ours_stereoscope")
    if peer is None or ours is None:
        return PENDING
    rows = [["scvi-tools 1.4.2", *_spots(peer), "–", "–"]]
    rows += [
        [
            f"pyrosc, seed {fit['seed']}",
            *_spots(fit),
            number(fit.get("seconds_to_peer_objective")),
            number(fit["peer"]["median"], 3),
        ]
        for fit in ours["fits"]
    ]
    header = ["", "reference: seconds", "log-likelihood", "spots: seconds", "of processor", "objective"]
    return table([*header, "seconds to the peer's objective", "Spearman with the peer"], rows)


def _spots(fit: dict[str, Any]) -> list[str]:
    return [
        number(fit["rna"]["seconds"]),
        number(fit["rna"]["log_likelihood"]),
        number(fit["spatial"]["seconds"]),
        number(fit["spatial"]["cpu_seconds"], 0),
        number(fit["spatial"]["objective"], 2),
    ]


def linear_decoder() -> str:
    """Held-out ELBO of LinearSCVI's decoders, and how often intervals hold true loadings."""
    found = read("linear_decoder")
    if found is None:
        return PENDING
    kinds = list(next(iter(found["heldout_elbo"].values())))
    rows = [[k, *(_mean(v[k], 1) for v in found["heldout_elbo"].values())] for k in kinds]
    return table(["held-out ELBO", *found["heldout_elbo"]], rows)


def coverage() -> str:
    """How often credible intervals of LinearSCVI hold the true loadings."""
    found = read("linear_decoder")
    if found is None:
        return PENDING
    rows = [[f"{int(n):,} cells", *(f"{c:.0%}" for c in v)] for n, v in found["covered"].items()]
    return table(["", *(f"{level:.0%} intervals" for level in found["levels"])], rows)


def covariates() -> str:
    """Nuisances and what is to be kept, by workflow: medians over genes, means over seeds."""
    found = read("covariates") or {}
    cells, cycle = found.get("kang", {}), found.get("fucci", {})
    names = dict.fromkeys([*next(iter(cells.values()), {}), *next(iter(cycle.values()), {})])
    rows = []
    for name in names:
        own = [run[name] for run in cells.values() if name in run]
        angle = [run[name] for run in cycle.values() if name in run]
        shown = [_median([r["geary"][k] for r in own]) for k in ("interferon", "ribosomal", "markers")]
        shown += [_average([r["purity_cell_type"] for r in own])]
        shown += [_average([r[k] for r in angle]) for k in ("variance_explained", "purity_chip_id")]
        rows.append([name, *(number(v, 3) for v in shown)])
    header = ["", "C, interferon", "C, ribosomal", "C, markers", "neighbours of one type"]
    return table([*header, "cell cycle explained", "neighbours of one individual"], rows) if rows else PENDING


def _average(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _median(runs: list[dict[str, float]]) -> float | None:
    return _average([statistics.median(run.values()) for run in runs])


def criticism() -> str:
    """Calibration of scVI's predictions and of its guide."""
    found = read("criticism")
    if found is None:
        return PENDING
    rows = []
    for row in found["rows"]:
        predictive, sbc = row["predictive_coverage"], row["sbc"]["coverage"]
        rows.append(
            [
                f"{row['data']}, {row['gene_likelihood']}",
                number(row["pit_deviation"], 3),
                *(number(100 * predictive[g]["0.9"], 1) for g in ("all", "mean 1 and more")),
                number(100 * row["khat"]["khat_above_0.7"], 0),
                number(row["khat"]["khat"], 2),
                number(row["khat"]["gap"]),
                *(number(100 * sbc[level], 0) for level in ("0.5", "0.9")),
            ]
        )
    header = ["", "PIT deviation", "counts in 90 % intervals (%)", "of genes with mean ≥ 1 (%)"]
    header += ["cells with k-hat > 0.7 (%)", "median k-hat", "gap (nats)"]
    return table([*header, "simulated truth in 50 % intervals (%)", "in 90 % intervals (%)"], rows)


def differential_expression() -> str:
    """Calls against known truth: both tools, and ours without its parts."""
    found = (read("differential_expression") or {}).get("simulations")
    if found is None or "mean" not in found:
        return PENDING
    keys = ("fdr", "power", "power_ranked", "coverage")
    rows = []
    if peer := (read("peer_de_simulations") or {}).get("simulations"):
        means = [sum(s[k] for s in peer.values()) / len(peer) for k in keys[:3]]
        rows.append(["scvi-tools 1.4.2, change", str(len(peer)), *(number(m, 3) for m in means), "–"])
    n = str(len(found["each"]))
    for name, mean in found["mean"].items():
        label = "pyrosc" if name == "default" else f"pyrosc, {name}"
        rows.append([label, n, *(number(mean[k], 3) for k in keys)])
    header = ["", "data sets", "realised FDR at .05", "power", "power in order", "95 % intervals hold"]
    return table(header, rows)


def donors() -> str:
    """Calls where donors differ."""
    found = (read("differential_expression") or {}).get("donors")
    if found is None:
        return PENDING
    rows = [
        [name, *(number(figures[k][m], 3) for k in ("donor", "cells") for m in ("fdr", "power"))]
        for name, figures in found["each"].items()
    ]
    return table(["donors", "FDR, `donor_key`", "power", "FDR, cells as replicates", "power"], rows)


def interferon() -> str:
    """Known genes of interferon's effect, and other tests."""
    found = (read("differential_expression") or {}).get("kang")
    if found is None:
        return PENDING
    types = found["types"]
    genes = list(next(iter(types.values()))["donors"]["ranks"])
    rows = [
        [
            f"{name}, {figures['n_cells']} cells",
            f"{figures['donors']['called']:,} / {figures['donors']['expressed']:,}",
            *(str(figures["donors"]["ranks"].get(g, "–")) for g in genes),
            number(figures["donors"]["score_and_wilcoxon"], 2),
            number(figures["donors"]["lfc_and_pseudobulk"], 2),
        ]
        for name, figures in types.items()
    ]
    return table(["", "called", *(f"rank of {g}" for g in genes), "Wilcoxon", "pseudobulk"], rows)


def differential_expression_cost() -> str:
    """Seconds and memory."""
    found = read("differential_expression") or {}
    clock, large = found.get("time"), found.get("memory")
    rows = []
    if clock is not None:
        name = f"{clock['cells']:,} cells × {clock['genes']:,} genes, 7 types against the rest"
        if peer := read("peer_de_time"):
            rows.append(
                [f"{name}, scvi-tools 1.4.2", number(peer["median"]), number(peer.get("median_cpu")), "–"]
            )
        rows.append([f"{name}, pyrosc", number(clock["median"]), number(clock["median_cpu"]), "–"])
    if large is not None:
        name = f"{large['cells']:,} cells × {large['genes']:,} genes, 20 groups against the rest, pyrosc"
        peak = number(large["peak_memory_mib"], 0)
        rows.append([name, number(large["seconds"]), number(large["cpu_seconds"]), peak])
    header = ["", "seconds", "of processor", "peak memory beyond the data (MiB)"]
    return table(header, rows) if rows else PENDING


def _doublets(figures: dict[str, Any]) -> list[str]:
    keys = ("auroc", "average_precision", "rate", "true_rate")
    return [*(number(figures[key], 3) for key in keys), number(figures["seconds"])]


def proteins() -> str:
    """Proteins of CITE-seq cells that were hidden, imputed."""
    peer, ours, full = (
        read(f"{n}totalvi_imputation{m}") for n, m in (("peer_", ""), ("", ""), ("", "_full"))
    )
    if ours is None:
        return PENDING
    runs = {"pyrosc": list(ours["seeds"].values())}
    if peer is not None:
        runs = {"scvi-tools 1.4.2": [peer], **runs}
    if full is not None:
        runs["pyrosc, with all 10,849 cells"] = list(full["seeds"].values())
    rows = []
    for name, fits in runs.items():

        def mean(*keys: str, fits: list[dict[str, Any]] = fits) -> float:
            return statistics.fmean([_deep(f, keys) for f in fits])

        rows.append(
            [
                f"{name} ({len(fits)} seed{'s' if len(fits) > 1 else ''})",
                number(mean("spearman_mean"), 3),
                number(mean("rmse_log1p_mean"), 2),
                number(mean("sd_log1p_mean"), 3),
                number(mean("heldout", "elbo")),
                number(mean("seconds"), 0),
                number(mean("cpu_seconds"), 0),
            ]
        )
    header = ["", "Spearman", "RMSE of log1p", "its standard deviation", "held-out ELBO", "seconds"]
    return table([*header, "processor seconds"], rows)


def _deep(record: dict[str, Any], keys: tuple[str, ...]) -> float:
    found: Any = record
    for key in keys:
        found = found[key]
    return float(found)


def protein_surgery() -> str:
    """CITE-seq cells mapped to a reference with other proteins."""
    ours = read("totalvi_surgery")
    if ours is None:
        return PENDING
    names = {
        "query_10k": "pbmc5k (31 proteins) ← pbmc10k (14)",
        "query_5k": "pbmc10k (14 proteins) ← pbmc5k (31)",
    }
    rows = []
    for case, name in names.items():
        fits = [record["cases"][case] for record in ours["seeds"].values()]
        values = {
            k: statistics.fmean([f[k] for f in fits]) for k in fits[0] if k.startswith(("sec", "acc", "mac"))
        }
        rows.append(
            [
                name,
                number(values["accuracy"], 3),
                number(values["macro_f1"], 3),
                *(number(values[f"seconds_{k}"]) for k in ("reference", "query", "anew")),
            ]
        )
    header = [
        "reference ← query",
        "accuracy",
        "macro F1",
        "seconds, reference",
        "query",
        "training anew on all",
    ]
    return table(header, rows)


def render(name: str) -> str:
    """A table by its name."""
    if name in SETS:
        return data_set(name)
    makers = (
        summary,
        step,
        cellassign,
        peakvi,
        peakvi_likelihoods,
        peakvi_steps,
        solo,
        labels,
        stereoscope,
        linear_decoder,
        coverage,
    )
    makers += (covariates, surgery, criticism, proteins, protein_surgery)
    makers += (differential_expression, donors, interferon, differential_expression_cost)
    return {maker.__name__: maker for maker in makers}[name]()


def fill(path: Path) -> None:
    """Write the tables of a Markdown file between their marks."""

    def one(match: re.Match[str]) -> str:
        return f"<!-- bench:{match[1]} -->\n\n{render(match[1])}\n\n<!-- /bench -->"

    pattern = re.compile(r"<!-- bench:(\w+) -->.*?<!-- /bench -->", re.DOTALL)
    path.write_text(pattern.sub(one, path.read_text()))


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    class BenchTable(SphinxDirective):
        required_arguments = 1

        def run(self) -> list[nodes.Node]:
            for path in RESULTS.glob("*.json"):
                self.env.note_dependency(str(path))
            return self.parse_text_to_nodes(render(self.arguments[0]))

    app.add_directive("bench-table", BenchTable)
    return {"version": "1", "parallel_read_safe": True}


if __name__ == "__main__":
    fill(ROOT / "README.md")
