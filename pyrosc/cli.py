"""The command line: ``python -m pyrosc``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

_DEMO = """\
Train scVI on single-cell counts and look at what it found.

Without --data, on 700 peripheral blood cells that come with the installation (under a minute). The folder
that --out names then holds:

  annotated.h5ad        the cells, with the latent space in obsm["X_scVI"] and its UMAP in obsm["X_umap_scVI"]
  model/                the trained model, for pyrosc.load
  training_curve.png    train and held-out ELBO at each epoch
  umap.png              UMAP of the latent space, by label, batch and library size
  markers.png           normalised expression of marker genes
  predictive_check.png  mean, variance and zeros of each gene: observed against replicated by the model

The file that --data names is read, never changed.
"""

_CONVERT = """\
Read a model that scvi-tools 1.x saved (SCVI, SCANVI or LinearSCVI) and save it as a model of pyrosc.

DIR is the folder that scvi-tools wrote, with model.pt; it is read without running anything it may hold, and
never changed. OUT is the folder to write, for pyrosc.load. Weights, options, genes, categories and the split
into training and held-out cells are carried over; the training history is not.
"""

_EXAMPLES = """\
examples:
  python -m pyrosc demo
  python -m pyrosc demo --data cells.h5ad --batch-key donor --labels-key cell_type --out results
"""


class _Parser(argparse.ArgumentParser):
    """Errors on one line."""

    def error(self, message: str) -> NoReturn:
        print(f"pyrosc: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pyrosc import __version__

        print(f"pyrosc {__version__}")
        parser.exit()


def _whole(least: int, most: int = 2**63 - 1) -> type:
    class Whole(int):
        def __new__(cls, text: str) -> Whole:
            value = super().__new__(cls, text)
            if not least <= value <= most:
                raise ValueError
            return value

    Whole.__name__ = f"whole number from {least}"  # argparse: "invalid whole number from 1 value: '0'"
    return Whole


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = _Parser(prog="python -m pyrosc", description="Probabilistic models of single-cell omics.")
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train scVI on real PBMC counts, or on your .h5ad, and write results and pictures",
        description=_DEMO,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--data", metavar="FILE.h5ad", help="cells with raw counts (default: 700 PBMCs)")
    demo.add_argument("--layer", metavar="NAME", help="layer that holds the counts (default: X)")
    demo.add_argument("--batch-key", metavar="COLUMN", help="column of obs: batch, donor, … to correct for")
    demo.add_argument("--labels-key", metavar="COLUMN", help="column of obs to colour the UMAP by")
    demo.add_argument(
        "--markers", metavar="G1,G2", help="genes to show (default: PBMC markers, or variable genes)"
    )
    demo.add_argument(
        "--out", metavar="DIR", default="demo-results", help="folder to write to (default: %(default)s)"
    )
    demo.add_argument(
        "--max-epochs", metavar="N", type=_whole(1), help="length of training (default: the model's)"
    )
    demo.add_argument(
        "--seed", metavar="N", type=_whole(0, 2**32 - 1), default=0, help="of everything random (0)"
    )
    demo.add_argument("--no-plots", action="store_true", help="write no pictures")
    convert = commands.add_parser(
        "convert",
        help="turn a model saved by scvi-tools 1.x into one of pyrosc",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", metavar="DIR", help="folder that scvi-tools wrote")
    convert.add_argument("target", metavar="OUT", help="folder to write")
    convert.add_argument(
        "--prefix", metavar="TEXT", default="", help="what the names of the files begin with"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a model that is in OUT already")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments; default those of the process.

    Returns
    -------
    int
        Exit status: 0, 1 if training failed, 2 for wrong arguments or data, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without × or − is no reason to fail
    top = parser()
    options = top.parse_args(argv)
    if options.command is None:
        top.print_help()
        return 0
    try:
        return {"demo": _demo, "convert": _convert}[options.command](options)
    except KeyboardInterrupt:
        print("pyrosc: interrupted", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    from pyrosc.data import DataError
    from pyrosc.demo import DemoError, run
    from pyrosc.train import TrainingError

    markers = [g.strip() for g in options.markers.split(",") if g.strip()] if options.markers else []
    try:
        run(
            options.data,
            out=options.out,
            layer=options.layer,
            batch_key=options.batch_key,
            labels_key=options.labels_key,
            markers=markers,
            max_epochs=options.max_epochs,
            seed=options.seed,
            plots=not options.no_plots,
        )
    except (DataError, DemoError, OSError) as error:
        return _failed(error, 2)
    except TrainingError as error:
        return _failed(error, 1)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from pyrosc.convert import from_scvi_tools

    try:
        model = from_scvi_tools(options.source, prefix=options.prefix)
        model.save(options.target, overwrite=options.overwrite)
    except (ValueError, OSError, RuntimeError) as error:
        return _failed(error, 2)
    print(model)
    print(f"saved: pyrosc.load({options.target!r}, adata)")
    return 0


def _failed(error: Exception, status: int) -> int:
    print("pyrosc: error:", " ".join(str(error).split()), file=sys.stderr)
    return status
