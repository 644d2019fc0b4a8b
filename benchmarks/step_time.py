"""Median milliseconds of one training step, loading included, in interleaved rounds of both tools.

Random counts, 90 % zeros, 4000 genes, two batches; both tools with their defaults.  SCVI: minibatches of 128,
ZINB with one dispersion per gene.  TOTALVI (``--model totalvi``): 14 proteins in all cells, minibatches of
256, NB.  A round fits afresh for 32 and for 160 steps of one epoch: the difference of the two times is 128
steps without set-up and without what is done once per epoch.  From
pyrosc's environment::

    python benchmarks/step_time.py --peer-python PATH_OF_THE_PEERS_PYTHON

With ``OMP_NUM_THREADS=1`` processor time is taken.  Without ``--peer-python`` only pyrosc is timed; ``--tools
peer`` times the peer alone.
"""

from __future__ import annotations

import os

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from typing import Any, TextIO  # noqa: E402

import _common as common  # noqa: E402
import anndata  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.sparse as sp  # noqa: E402
import torch  # noqa: E402

#: By one thread processor time is taken, which other work on the machine disturbs least.
CLOCK = time.process_time if THREADS == 1 else time.perf_counter
FEW, MANY, N_PROTEINS = 32, 160, 14
BATCH_SIZE = {"scvi": 128, "totalvi": 256}
WHAT = {
    "scvi": "one training step, 128 x 4000, 90 % zeros, ZINB, dispersion per gene, loading included",
    "totalvi": "one training step, 256 x (4000 genes + 14 proteins), 90 % zeros, NB, loading included",
}


def random_counts(model: str, n_genes: int = 4000, zeros: float = 0.9) -> anndata.AnnData:
    """Counts with a given share of zeros, the same in every cell, so that all steps cost the same."""
    n_cells = MANY * BATCH_SIZE[model]
    rng = np.random.default_rng(0)
    filled = round((1 - zeros) * n_genes)
    columns = np.concatenate([np.sort(rng.choice(n_genes, filled, replace=False)) for _ in range(n_cells)])
    values = (1 + rng.poisson(rng.gamma(1.0, 1.0, columns.size))).astype(np.float32)
    x = sp.csr_matrix((values, columns, np.arange(n_cells + 1) * filled), shape=(n_cells, n_genes))
    adata = anndata.AnnData(x)
    adata.obs["batch"] = np.where(np.arange(n_cells) % 2, "a", "b")
    if model == "totalvi":
        mean = rng.choice([5.0, 200.0], (n_cells, N_PROTEINS))
        proteins = [f"protein {i}" for i in range(N_PROTEINS)]
        table = rng.poisson(rng.gamma(5.0, mean / 5.0)).astype(np.float32)
        adata.obsm["protein"] = pd.DataFrame(table, index=adata.obs_names, columns=proteins)
    return adata


# --- one fit of a given number of steps ---------------------------------------------------------------------


def fit_peer(name: str, adata: anndata.AnnData, steps: int) -> tuple[float, str]:
    """Seconds of ``train()`` of a model of scvi-tools, and its version."""
    import scvi

    scvi.settings.seed = 0
    options = {"max_steps": steps, "train_size": 1.0, "batch_size": BATCH_SIZE[name]}
    if name == "totalvi":
        scvi.model.TOTALVI.setup_anndata(adata, batch_key="batch", protein_expression_obsm_key="protein")
        model = scvi.model.TOTALVI(adata)
        # both look at validation cells, of which there are none here
        options |= {"early_stopping": False, "reduce_lr_on_plateau": False}
    else:
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata)
    start = CLOCK()
    model.train(**options)
    seconds = CLOCK() - start
    assert model.trainer.global_step == steps
    return seconds, scvi.__version__


def fit_ours(name: str, adata: anndata.AnnData, steps: int) -> tuple[float, str]:
    """Seconds of ``fit()`` of a model of pyrosc, and its version."""
    import pyrosc

    if name == "totalvi":
        model = pyrosc.TOTALVI.from_anndata(adata, batch_key="batch", protein_key="protein")
    else:
        model = pyrosc.SCVI.from_anndata(adata, batch_key="batch")
    start = CLOCK()
    model.fit(max_steps=steps, train_size=1.0, batch_size=BATCH_SIZE[name])
    return CLOCK() - start, pyrosc.__version__


FIT = {"peer": fit_peer, "ours": fit_ours}


# --- a process per tool, working when told to ---------------------------------------------------------------


def worker(tool: str, model: str, answers: TextIO) -> None:
    """Answer each line on standard input by one round: milliseconds per step, as a line of JSON."""
    torch.set_num_threads(THREADS)
    adata = random_counts(model)
    FIT[tool](model, adata, 4)  # imports and first-use costs
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        few, _ = FIT[tool](model, adata, FEW)
        many, version = FIT[tool](model, adata, MANY)
        ms = 1000 * (many - few) / (MANY - FEW)
        print(json.dumps({"ms": ms, "version": version}), file=answers, flush=True)


class Worker:
    """The other end of `worker`: a process in the tool's own environment."""

    def __init__(self, tool: str, model: str, python: str) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [python, __file__, "--model", model, "--worker", tool]
        self.process = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes)
        self.tool, self.ms, self.version = tool, [], ""
        self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"{self.tool} stopped; to see why: {' '.join(map(str, self.process.args))}")
        return json.loads(line)

    def round(self) -> float:
        """One round; returns and keeps its milliseconds per step."""
        self.process.stdin.write("go\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        answer = self._answer()
        self.ms.append(answer["ms"])
        self.version = answer["version"]
        return answer["ms"]

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def main() -> None:
    """Run the rounds, print and keep the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(BATCH_SIZE), default="scvi")
    parser.add_argument("--peer-python", help="interpreter of the environment that holds scvi-tools")
    parser.add_argument(
        "--tools", nargs="+", choices=list(FIT), help="default: ours, and peer where there is one"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=list(FIT), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        answers, sys.stdout = sys.stdout, sys.stderr  # the tools may print; answers must stay clean
        return worker(args.worker, args.model, answers)

    tools = args.tools or (["peer", "ours"] if args.peer_python else ["ours"])
    if "peer" in tools and not args.peer_python:
        parser.error("the peer needs --peer-python")
    load_before = os.getloadavg()
    pythons = {"peer": args.peer_python, "ours": sys.executable}
    workers = [Worker(tool, args.model, pythons[tool]) for tool in tools]
    for i in range(args.rounds):
        print(f"round {i + 1}:", *(f"{w.tool} {w.round():.1f} ms" for w in workers), flush=True)
    for w in workers:
        w.close()

    torch.set_num_threads(THREADS)
    result: dict[str, Any] = {
        "what": WHAT[args.model],
        "machine": common.machine(),
        "clock": "processor" if THREADS == 1 else "wall",
        "load": {"before": load_before, "after": os.getloadavg()},
        "versions": common.versions("torch"),
    }
    for w in workers:
        result[w.tool] = {"version": w.version, "median_ms": statistics.median(w.ms), "rounds_ms": w.ms}
        print(f"{w.tool} {w.version}: {result[w.tool]['median_ms']:.1f} ms per step")
    if len(workers) == 2:
        result["ratio"] = result["peer"]["median_ms"] / result["ours"]["median_ms"]
        print(f"ratio: {result['ratio']:.2f}")
    parts = ["step_time"] + [args.model] * (args.model != "scvi") + tools * (len(workers) == 1)
    name = "_".join(parts) + ".json"
    common.save_json(common.RESULTS / name, result)


if __name__ == "__main__":
    main()
