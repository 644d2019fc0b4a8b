"""Models saved by scvi-tools: the same results, and nothing run that a file may hold.

The golden folders are written by benchmarks/parity/make_golden_saved.py, which runs scvi-tools.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import pyrosc
from pyrosc.convert import from_scvi_tools
from pyrosc.convert.archive import read
from pyrosc.convert.weights import copy_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "scvi_tools_1.4.2"
NAMES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
EXPECTED = np.load(GOLDEN / "expected.npz", allow_pickle=False)
FOLDERS = sorted(p.parent for p in GOLDEN.parent.glob("scvi_tools_*/*/*model.pt"))


def prefix(name: str) -> str:
    return "mine_" if name == "scanvi_linear" else ""


@pytest.fixture
def cells() -> ad.AnnData:
    content = json.loads((GOLDEN / "cells.json").read_text())
    x = sp.csr_matrix(np.array(content["x"], np.float32))
    adata = ad.AnnData(x, obs=pd.DataFrame(content["obs"], index=[f"c{i}" for i in range(x.shape[0])]))
    adata.var_names = [f"g{i}" for i in range(x.shape[1])]
    adata.layers["counts"] = x.copy()
    return adata


# -- the same results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_results_equal_those_of_the_peer(folder, cells, tmp_path):
    with np.load(folder.parent / "expected.npz", allow_pickle=False) as arrays:
        prefixed = {k: arrays[k] for k in arrays.files if k.startswith(f"{folder.name}|")}
    expected = {k.split("|")[1]: v for k, v in prefixed.items()}

    def close(ours: Any, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        np.testing.assert_allclose(ours, expected[what], rtol=rtol, atol=atol, err_msg=what)

    made = from_scvi_tools(folder, cells, prefix=prefix(folder.name))
    assert folder.parent.name == f"scvi_tools_{made.origin['version']}"
    made.save(tmp_path / "model")
    for model in (made, pyrosc.load(tmp_path / "model", cells)):
        assert model.origin == made.origin
        assert not model.training
        close(model.get_latent_representation(return_dist=True)[0], "latent", rtol=0)
        close(model.get_normalized_expression(library_size="latent", as_numpy=True), "rate", atol=1e-4)
        if "scale" in expected:
            close(model.get_normalized_expression(as_numpy=True), "scale", atol=1e-6)
        if "soft" in expected:
            soft = model.predict(soft=True)
            assert list(soft.columns) == list(expected["types"])
            close(soft, "soft")
        if "loadings" in expected:
            close(model.get_loadings(), "loadings")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_comes_from_the_file(name, monkeypatch):
    """None keeps the value that our constructor drew."""
    blank = pyrosc.SCVI.setup

    def setup(self):
        blank(self)
        with torch.no_grad():
            for value in (*self.parameters(), *self.buffers()):
                if value.is_floating_point():
                    value.fill_(torch.nan)
        if hasattr(self, "temperature"):
            self.temperature.fill_(1.0)  # the peer has none
        return self

    monkeypatch.setattr(pyrosc.Model, "setup", setup)
    model = from_scvi_tools(GOLDEN / name, prefix=prefix(name))
    assert not [k for k, v in model.state_dict().items() if v.is_floating_point() and v.isnan().any()]


def test_genes_are_matched_by_name_and_cells_may_be_others(cells):
    model = from_scvi_tools(GOLDEN / "scvi")
    assert not model.datasets
    other = cells[5:15, ::-1].copy()
    found = model.get_latent_representation(other)
    np.testing.assert_allclose(found, EXPECTED["scvi|latent"][5:15], atol=1e-5)
    with pytest.raises(pyrosc.DataError, match="lack 1 of the 24 genes"):
        model.get_latent_representation(cells[:, 1:].copy())
    unseen = cells.copy()
    unseen.obs["batch"] = "plate_c"
    with pytest.raises(pyrosc.DataError, match="plate_c"):
        model.get_latent_representation(unseen)


def test_registry_holds_what_was_set_up():
    fields = from_scvi_tools(GOLDEN / "scvi_covariates").registry.fields
    assert fields["x"].keys == ("counts",)
    assert (fields["batch"].keys, fields["batch"].categories) == (("lane",), (("1", "2", "3"),))
    assert fields["categorical_covariates"].keys == ("donor", "chemistry")
    assert fields["categorical_covariates"].categories == (("d1", "d2", "d3"), ("v2", "v3"))
    continuous = fields["continuous_covariates"]
    assert (continuous.keys, continuous.loc, continuous.scale) == (("age", "stress"), (0.0,) * 2, (1.0,) * 2)
    assert not fields["labels"].given
    labels = from_scvi_tools(GOLDEN / "scanvi").registry.fields["labels"]
    assert labels.unlabeled == "Unknown"
    assert labels.categories == (("B", "T", "Xeno"),)
    assert from_scvi_tools(GOLDEN / "scvi_size_factor").registry.keys("size_factor") == ("size_factor",)


def test_options_are_carried_over():
    config = from_scvi_tools(GOLDEN / "scvi_embedding").config
    wanted = {"batch_representation": "embedding", "batch_embedding_dim": 2, "encode_covariates": True}
    wanted |= {"dispersion": "gene-label", "norm": "batch", "n_hidden": 8, "n_latent": 3}
    assert {k: config[k] for k in wanted} == wanted
    assert from_scvi_tools(GOLDEN / "scvi").config["log_variational"] is True
    library = from_scvi_tools(GOLDEN / "scvi_library")
    assert (library.config["norm"], library.config["deeply_inject_covariates"]) == ("layer", False)
    assert not library.observed_library
    assert library.origin["folded_batch_norm"] is False
    for name in ("scvi_size_factor", "scvi_both_norms"):
        assert from_scvi_tools(GOLDEN / name).origin["folded_batch_norm"] is True
    assert from_scvi_tools(GOLDEN / "linear").config["decoder_norm"] == "batch"


def test_what_follows_works(cells):
    """Annotating, telling what it is, comparing, and training on."""
    model = from_scvi_tools(GOLDEN / "scanvi", cells)
    assert "from scvi-tools 1.4.2 (SCANVI)" in repr(model)
    assert "not trained" not in repr(model)
    out = model.annotate(cells.copy())
    np.testing.assert_allclose(out.obsm["X_scANVI"], EXPECTED["scanvi|latent"], atol=1e-5)
    assert json.loads(out.uns["pyrosc"]["SCANVI"]["origin"])["tool"] == "scvi-tools"
    train, held_out = model.split["main"]
    assert len(train) + len(held_out) == 48
    assert len(held_out) == 4
    before = model.get_elbo(n_samples=5)
    other = from_scvi_tools(GOLDEN / "scanvi", cells)
    other.fit(3, warmup=0.0, progress=False)
    np.testing.assert_array_equal(other.train_indices, train)
    assert np.isfinite(before)
    assert other.get_elbo(n_samples=5) > before  # it was trained for a moment only
    table = pyrosc.compare({"theirs": model, "ours": other})
    assert np.isnan(table.loc["theirs", "seconds"])


def test_data_that_do_not_match_are_refused(cells):
    with pytest.raises(pyrosc.DataError, match="made with 48 cells, the data have 40"):
        from_scvi_tools(GOLDEN / "scvi", cells[:40].copy())
    minified = cells.copy()
    minified.layers["counts"] = sp.csr_matrix(minified.shape, dtype=np.float32)
    minified.uns["_scvi_adata_minify_type"] = "latent_posterior_parameters"
    with pytest.raises(pyrosc.DataError, match="minified"):
        from_scvi_tools(GOLDEN / "scvi_minified", minified)


# -- files that are not read ------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def rewritten(folder: Path, change: Any, name: str = "scvi") -> Path:
    """A golden folder with something in its file changed."""
    content = torch.load(GOLDEN / name / "model.pt", weights_only=False)
    change(content)
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "model.pt")
    return folder


def refused(folder: Path, match: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=match) as error:
        from_scvi_tools(folder, **options)
    return str(error.value)


@pytest.mark.parametrize("place", ["attr_dict", "model_state_dict", "top"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_file_that_runs_code_is_refused_unread(place, forced, tmp_path, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "was_run"

    def plant(content: dict[str, Any]) -> None:
        (content if place == "top" else content[place])["more_"] = Payload(mark)

    folder = rewritten(tmp_path / "model", plant)
    line = refused(folder, "nothing in it was run")
    assert "touch" in line or "Path" in line
    assert not mark.exists()
    torch.load(folder / "model.pt", weights_only=False)  # it does work
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_bare_pickles_are_refused(protocol, tmp_path):
    mark = tmp_path / "was_run"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Payload(mark), protocol=protocol))
    refused(tmp_path, "not a file that scvi-tools 1.x writes")
    torch.save({"a": Payload(mark)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path, "not a file that scvi-tools 1.x writes")
    torch.save({"a": Payload(mark)}, tmp_path / "model.pt", pickle_protocol=protocol)
    refused(tmp_path, "nothing in it was run")
    assert not mark.exists()


def test_stand_ins_call_nothing(tmp_path):
    """Names of modules that are passed over are never looked up, whatever comes after them."""
    mark = tmp_path / "was_run"
    code = b"\x80\x02cpandas.io.pickle\nread_pickle\nX" + len(str(mark)).to_bytes(4, "little")
    code += str(mark).encode() + b"\x85R."
    path = tmp_path / "model.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, code if name.endswith("data.pkl") else data)
    refused(tmp_path, "is not a model of scvi-tools 1.x")
    for name in (b"posix\nsystem", b"builtins\neval", b"torch.hub\nload", b"numpy.testing\nrundocs"):
        with zipfile.ZipFile(path, "w") as archive:
            for part, data in parts.items():
                changed = code.replace(b"pandas.io.pickle\nread_pickle", name)
                archive.writestr(part, changed if part.endswith("data.pkl") else data)
        refused(tmp_path, "nothing in it was run")


def test_safe_globals_are_as_before():
    before = set(torch.serialization.get_safe_globals())
    read(GOLDEN / "scvi")
    assert set(torch.serialization.get_safe_globals()) == before


def test_what_is_not_there_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model of scvi-tools"):
        from_scvi_tools(tmp_path)
    with pytest.raises(FileNotFoundError, match="prefix='mine_'"):
        from_scvi_tools(GOLDEN / "scanvi_linear")
    (tmp_path / "attr.pkl").touch()
    refused(tmp_path, r"before 0\.15.*convert_legacy_save")
    whole = (GOLDEN / "scvi" / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "not a file that scvi-tools")
    torch.save({"weights": torch.ones(3)}, tmp_path / "model.pt")
    refused(tmp_path, "lacks 'model_state_dict', 'var_names', 'attr_dict'")


def registry(content: dict[str, Any]) -> dict[str, Any]:
    return content["attr_dict"]["registry_"]


def options(content: dict[str, Any]) -> dict[str, Any]:
    return content["attr_dict"]["init_params_"]["kwargs"].setdefault("kwargs", {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: registry(c).update(scvi_version="0.20.3"), r"scvi-tools 0\.20\.3, and 1\.x is read"),
        (lambda c: registry(c).update(model_name="TOTALVI"), "class TOTALVI; those read are 'SCVI'"),
        (lambda c: registry(c).update(setup_method_name="setup_mudata"), "setup_mudata"),
        (lambda c: c.update(var_names={"rna": c["var_names"]}), "several modalities"),
        (lambda c: c["attr_dict"].pop("registry_"), "no registry"),
        (lambda c: c["attr_dict"].update(is_trained_=False), "not trained"),
        (lambda c: options(c).update(use_layer_norm="encoder"), "use_layer_norm='encoder'"),
        (lambda c: options(c).update(extra_encoder_kwargs={"bias": False}), r"extra_encoder_kwargs=\{'bias'"),
        (lambda c: options(c).update(var_activation=torch.nn.functional.softplus), "var_activation"),
        (lambda c: options(c).update(brand_new=3), "brand_new=3"),
        (lambda c: options(c).update(batch_embedding_kwargs={"max_norm": 1.0}), "max_norm"),
        (lambda c: options(c).update(encode_covariates=True), "24 inputs|has the shape"),
        (lambda c: options(c).update(n_layers=2), "n_layers|Layer 1"),
        (lambda c: c["model_state_dict"].pop("px_r"), "no tensor 'px_r'"),
        (lambda c: c["model_state_dict"].update(extra=torch.ones(2)), "accounts for: 'extra'"),
        (lambda c: c["model_state_dict"].update(px_r=torch.ones(1)), r"'px_r'.*\(1,\).*\(24,\)"),
        (lambda c: c.update(var_names=np.array(["g0"] * 24, dtype=object)), "not unique"),
    ],
)
def test_other_models_are_refused_by_name(change, match, tmp_path):
    refused(rewritten(tmp_path / "model", change), match)


def test_a_prior_over_labels_is_refused(tmp_path):
    def change(content):
        content["model_state_dict"]["y_prior"] = torch.tensor([[0.5, 0.3, 0.2]])

    refused(rewritten(tmp_path / "model", change, "scanvi"), "y_prior")


def test_split_that_cannot_be_told_is_left_out(tmp_path, cells):
    def change(content):
        content["attr_dict"]["validation_indices_"] = content["attr_dict"]["train_indices_"][:3]

    model = from_scvi_tools(rewritten(tmp_path / "model", change), cells)
    assert model.split == {}
    model.fit(1, progress=False)
    assert len(model.train_indices) == 43


def test_older_numpy_and_other_parameters_in_the_file_are_read(tmp_path):
    """numpy 1 wrote other module names; constraints of other Pyro models lie in the same file."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(GOLDEN / "scvi" / "model.pt") as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert read(tmp_path).genes == read(GOLDEN / "scvi").genes

    def change(content):
        limits = torch.distributions.constraints
        content["model_state_dict"]["pyro_param_store"]["constraints"] = {"a": limits.positive}
        content["attr_dict"]["init_params_"]["non_kwargs"]["n_hidden"] = np.int64(8)

    assert from_scvi_tools(rewritten(tmp_path / "other", change)).config["n_hidden"] == 8


def test_gene_label_gives_unlabelled_cells_the_mean():
    model = from_scvi_tools(GOLDEN / "scvi_embedding")
    rows = model.log_theta.rows
    torch.testing.assert_close(rows[-1], rows[:-1].mean(0))


def test_copied_weights_must_fit():
    saved = read(GOLDEN / "scvi")
    model = from_scvi_tools(GOLDEN / "scvi")
    model.zi_head = None
    copy_weights(model, saved.tensors)  # heads that a law does not use may be left over


def test_one_folder_is_left_as_it_was(tmp_path):
    shutil.copytree(GOLDEN / "scvi", tmp_path / "model")
    from_scvi_tools(tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["model.pt"]
