"""The command line: what a user sees and gets."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from PIL import Image
from toy import make_adata

import pyrosc
from pyrosc.cli import main

PICTURES = {
    "training_curve.png": (900, 600),
    "umap.png": (1200, 630),
    "markers.png": (1000, 480),
    "predictive_check.png": (1410, 645),
}


def environment() -> dict[str, str]:
    path = [str(Path(pyrosc.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in path if p), "OMP_NUM_THREADS": "1"}


def command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a user starts it."""
    line = [sys.executable, "-m", "pyrosc", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_pictures(folder: Path) -> None:
    for name, (width, height) in PICTURES.items():
        with Image.open(folder / name) as picture:
            assert picture.width >= width
            assert picture.height >= height
            drawn = np.asarray(picture.convert("L")) < 250
        assert 0.005 < drawn.mean() < 0.6, name  # neither blank nor black


@pytest.fixture
def h5ad(tmp_path) -> Path:
    """A user's file: counts in a layer, X log-normalised, numeric clusters."""
    adata = make_adata(120, 30)
    adata.obs["cluster"] = adata.obs["label"].cat.codes.to_numpy()
    adata.X = adata.X.log1p()
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    return path


# -- help and version ------------------------------------------------------------------------------------


def test_help_in_a_process(tmp_path):
    found = command("demo", "--help", folder=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    for option in (
        "--data",
        "--batch-key",
        "--layer",
        "--labels-key",
        "--markers",
        "--out",
        "--max-epochs",
        "--seed",
    ):
        assert option in found.stdout
    assert "annotated.h5ad" in found.stdout
    assert files(tmp_path) == set()


def test_help_without_a_command(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"pyrosc {pyrosc.__version__}"


# -- errors ----------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Status 2 and one line on stderr, before any training; the line."""
    try:
        status = main(["demo", *map(str, arguments)])
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(r"pyrosc: error: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("arguments", [["--data", "absent.h5ad"], ["--data", "cells.h5ad"]])
def test_errors_in_a_process(tmp_path, h5ad, arguments):
    found = command("demo", *arguments, "--out", "out", folder=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(r"pyrosc: error: [^\n]+\n", found.stderr), found.stderr
    assert files(tmp_path) == {"cells.h5ad"}


def test_error_of_a_wrong_file(tmp_path, capsys):
    out = tmp_path / "out"
    assert "there is no file" in fails(capsys, "--data", tmp_path / "absent.h5ad", "--out", out)
    assert "is a folder" in fails(capsys, "--data", tmp_path, "--out", out)
    text = tmp_path / "table.h5ad"
    text.write_text("gene,cell\n")
    assert "is not an .h5ad file" in fails(capsys, "--data", text, "--out", out)
    other = tmp_path / "other.h5ad"
    with h5py.File(other, "w") as file:
        file["numbers"] = [1, 2]
    assert "it has no obs and var" in fails(capsys, "--data", other, "--out", out)
    with h5py.File(other, "w") as file:
        file["obs"] = file["var"] = [1, 2]
    assert "could not be read as .h5ad" in fails(capsys, "--data", other, "--out", out)
    few = tmp_path / "few.h5ad"
    make_adata(12, 5).write_h5ad(few)
    assert "12 cells and 5 genes" in fails(capsys, "--data", few, "--out", out)
    assert not out.exists()


def test_error_of_wrong_names(tmp_path, h5ad, capsys):
    known = ("--data", h5ad, "--layer", "counts", "--out", tmp_path / "out")
    assert "no column 'bach'; it has 'batch'" in fails(capsys, *known, "--batch-key", "bach")
    assert "no column 'type'; it has 'batch'" in fails(capsys, *known, "--labels-key", "type")
    assert "no layer 'raw'; layers are 'counts'" in fails(capsys, *known[:2], "--layer", "raw", *known[4:])
    assert "did you mean 'gene_1'" in fails(capsys, *known, "--markers", "gene_0, GENE_1")
    assert "no genes 'CD3D'; genes are named like 'gene_0'" in fails(capsys, *known, "--markers", "CD3D")
    assert not (tmp_path / "out").exists()


def test_error_of_counts_that_are_none(tmp_path, h5ad, capsys):
    line = fails(capsys, "--data", h5ad, "--out", tmp_path / "out")
    assert "does not hold counts" in line
    assert "layer='counts'" in line  # where they are
    assert not (tmp_path / "out").exists()


def test_error_of_wrong_numbers(capsys):
    assert "--max-epochs" in fails(capsys, "--max-epochs", "0")
    assert "--seed" in fails(capsys, "--seed", "-1")
    assert "unrecognized arguments" in fails(capsys, "--epochs", "3")


def test_error_of_a_folder_that_cannot_be_written(tmp_path, h5ad, capsys, monkeypatch):
    known = ("--data", h5ad, "--layer", "counts")
    assert "is not a folder" in fails(capsys, *known, "--out", h5ad)
    assert "is not a folder" in fails(capsys, *known, "--out", h5ad / "deeper")
    mine = tmp_path / "mine" / "model"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("x")
    assert "is not a pyrosc model" in fails(capsys, *known, "--out", mine.parent)
    assert files(mine) == {"notes.txt"}
    same = tmp_path / "annotated.h5ad"
    h5ad.rename(same)
    before = digest(same)
    assert "would replace" in fails(capsys, "--data", same, "--layer", "counts", "--out", tmp_path)
    assert digest(same) == before

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = fails(capsys, "--data", same, "--layer", "counts", "--out", tmp_path / "new")
    assert line.endswith("Read-only file system\n")


# -- runs ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo(tmp_path):
    """The demo itself, but for the length of training."""
    found = command("demo", "--max-epochs", 2, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    out = tmp_path / "demo-results"
    assert files(out) == {"annotated.h5ad", "model/model.json", "model/params.safetensors", *PICTURES}
    assert_pictures(out)

    adata = ad.read_h5ad(out / "annotated.h5ad")
    assert adata.shape == (700, 765)
    assert adata.obsm["X_scVI"].shape == (700, 10)
    assert adata.obsm["X_umap_scVI"].shape == (700, 2)
    assert np.isfinite(adata.obsm["X_umap_scVI"]).all()
    assert adata.uns["pyrosc"]["SCVI"]["model"] == "SCVI"
    assert "neighbors" not in adata.uns

    table = dict(re.findall(r"^(\S[\w -]*?)  +(.+)$", found.stdout, flags=re.MULTILINE))
    assert (table["cells"], table["genes"]) == ("700", "765")
    assert table["epochs"].startswith("2, weights of epoch ")
    model = pyrosc.load(out / "model", adata)
    elbo = model.get_elbo(indices=model.split["main"][1], n_samples=10)
    assert table["held-out ELBO"].startswith(f"{elbo:,.1f} nats per cell, over 70 cells")
    assert "demo-results" in table["files"]

    # a bar on stderr, and nothing that other packages have to say
    lines = [s for s in re.split(r"[\r\n]+", found.stderr) if s.strip()]
    assert any("2/2" in s and "held-out" in s for s in lines)
    assert [s for s in lines if not s.startswith(("SCVI:", "note:"))] == []

    # what is to be tried next works as it stands
    next_lines = found.stdout.split("in Python:\n\n")[1].split("\n\n")[0]
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        names: dict[str, object] = {}
        for line in next_lines.splitlines():
            exec(line.strip(), names)
    finally:
        os.chdir(here)
    assert names["model"].history.shape[0] == 2  # type: ignore[attr-defined]


@pytest.mark.slow
def test_demo_of_a_users_file(tmp_path, h5ad):
    before = digest(h5ad)
    out = tmp_path / "results"
    out.mkdir()
    (out / "notes.txt").write_text("the user's")
    (out / "annotated.h5ad").write_text("of an earlier run")
    pyrosc.SCVI.from_anndata(make_adata(40, 6), n_hidden=4).save(out / "model")  # of an earlier run, too
    arguments = [
        "--layer",
        "counts",
        "--batch-key",
        "batch",
        "--labels-key",
        "cluster",
        "--markers",
        "gene_4,gene_2",
    ]
    found = command("demo", "--data", h5ad, *arguments, "--max-epochs", 2, "--out", out, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert digest(h5ad) == before
    written = {"annotated.h5ad", "model/model.json", "model/params.safetensors", *PICTURES}
    assert files(out) == {"notes.txt", *written}
    assert_pictures(out)
    adata = ad.read_h5ad(out / "annotated.h5ad")
    original = ad.read_h5ad(h5ad)
    assert set(adata.obs) == {*original.obs, "scvi_log_library"}
    assert (adata.X != original.X).nnz == 0
    model = pyrosc.load(out / "model", adata)
    assert model.registry.keys("batch") == ("batch",)
    assert 'gene_list=["gene_4", "gene_2"]' in found.stdout


def test_run_without_pictures_shows_notes_and_picks_variable_genes(tmp_path, capsys, monkeypatch):
    import pyrosc.demo as demo

    adata = make_adata(80, 12)
    adata.obs["batch"] = "one"
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    # UMAP is in the other tests
    monkeypatch.setattr(demo, "_embed", lambda adata, seed, *, cluster: None)
    out = tmp_path / "out"
    arguments = [
        "demo",
        "--data",
        path,
        "--batch-key",
        "batch",
        "--max-epochs",
        1,
        "--no-plots",
        "--out",
        out,
    ]
    assert main([str(a) for a in arguments]) == 0
    assert files(out) == {"annotated.h5ad", "model/model.json", "model/params.safetensors"}
    seen = capsys.readouterr()
    notes = [s for s in re.split(r"[\r\n]+", seen.err) if s.startswith("note:")]
    assert len(notes) == 1
    assert "obs['batch'] is 'one' for every cell" in notes[0]
    shown = re.search(r"gene_list=\[(.*?)\]", seen.out)
    assert shown is not None
    assert len(set(shown[1].split(", "))) == 2


def test_variable_genes_are_those_that_vary(monkeypatch):
    from pyrosc.demo import variable_genes

    adata = make_adata(150, 12, seed=1)
    x = np.full((150, 12), 5.0, np.float32)
    x[:, 7] = np.where(np.arange(150) % 2 == 0, 100, 1)
    x[:, 3] = np.where(np.arange(150) % 3 == 0, 60, 1)
    x[:, 9] = x[:, 7]  # says the same as gene 7
    model = pyrosc.SCVI.from_anndata(adata, n_hidden=16, n_latent=4)
    # expression as a perfect fit would give it, so that the choice of genes alone is tested
    known = x / x.sum(1, keepdims=True) * 1e4
    monkeypatch.setattr(model, "get_normalized_expression", lambda indices, **_: known[indices])
    found = variable_genes(model, 2)
    assert set(found) in ({"gene_7", "gene_3"}, {"gene_9", "gene_3"})


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_training(tmp_path, h5ad):
    line = [sys.executable, "-m", "pyrosc", "demo", "--data", str(h5ad), "--layer", "counts"]
    line += ["--max-epochs", "100000", "--out", "out"]
    process = subprocess.Popen(
        line,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    seen = b""
    while b"held-out" not in seen:  # an epoch is over
        byte = process.stderr.read(1)
        assert byte, seen
        seen += byte
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    last = re.split(r"[\r\n]+", (seen + rest).decode().strip())[-1]
    assert last == "pyrosc: interrupted"
    assert b"Traceback" not in rest
    assert files(tmp_path / "out") == set()


# -- models of other programs ----------------------------------------------------------------------------

SAVED = Path(__file__).parent / "golden" / "scvi_tools_1.4.2"


def test_convert(tmp_path, capsys):
    out = tmp_path / "model"
    arguments = ["convert", str(SAVED / "scanvi_linear"), str(out), "--prefix", "mine_"]
    assert main(arguments) == 0
    assert "from scvi-tools 1.4.2 (SCANVI)" in capsys.readouterr().out
    assert files(out) == {"model.json", "params.safetensors"}
    assert isinstance(pyrosc.load(out), pyrosc.SCANVI)
    assert main(arguments) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_convert_says_on_one_line_what_is_wrong(tmp_path, capsys):
    for source in (tmp_path, SAVED / "scanvi_linear"):
        assert main(["convert", str(source), str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert re.fullmatch(r"pyrosc: error: [^\n]+\n", err), err
        assert out == ""
    assert not (tmp_path / "out").exists()
