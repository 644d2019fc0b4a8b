"""Tables of ``benchmarks/results/*.json``, for these pages and for the README.

In a page, ``{bench-table} NAME`` is replaced by the table of that name, made when the pages are built. In the
README a table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``;

    python docs/_ext/bench_tables.py

writes it anew. NAME is that of a function below, or a data set: ``pbmc_cite``, ``kang_ifnb``, ``pbmc_3tech``.
"""

from __future__ import annotations

import json
import re
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
    rows = [
        [f"scvi-tools {found['peer']['version']}", number(found["peer"]["median_ms"])],
        [f"pyrosc {found['ours']['version']}", number(found["ours"]["median_ms"])],
        ["ratio", f"{found['ratio']:.2f}×"],
    ]
    return table(["one training step, 128 × 4,000, ZINB", "milliseconds"], rows)


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


def _doublets(figures: dict[str, Any]) -> list[str]:
    keys = ("auroc", "average_precision", "rate", "true_rate")
    return [*(number(figures[key], 3) for key in keys), number(figures["seconds"])]


def render(name: str) -> str:
    """A table by its name."""
    if name in SETS:
        return data_set(name)
    return {"summary": summary, "step": step, "cellassign": cellassign, "solo": solo}[name]()


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
