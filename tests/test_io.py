"""Saving and loading: the same model, whatever happens in between, and never a pickle."""

import json
import os
import shutil
import stat
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from toy import make_adata
from toy_models import Adversary, Cells, Factors, Rates, TwoSources

import pyrosc
from pyrosc import SCVI, io
from pyrosc.data import DataError

pytestmark = pytest.mark.filterwarnings("ignore:the held-out ELBO was still rising")


@pytest.fixture
def model(toy_adata):
    made = Factors.from_anndata(toy_adata, layer="counts", batch_key="batch", widths=[8])
    return made.fit(2, progress=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "model"


def same(one, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


# -- there and back ---------------------------------------------------------------------------------------


def test_results_are_identical(model, toy_adata, path):
    model.save(path)
    loaded = Factors.load(path, toy_adata)
    assert same(model, loaded)
    assert not loaded.training
    for name, value in model.posterior(["z", "rho"], n_samples=3).items():
        np.testing.assert_array_equal(loaded.posterior(["z", "rho"], n_samples=3)[name], value)
    assert loaded.get_elbo() == model.get_elbo()
    assert loaded.registries == model.registries
    assert loaded.n_train == model.n_train
    pd.testing.assert_frame_equal(loaded.history, model.history)
    np.testing.assert_array_equal(loaded.split["main"][1], model.split["main"][1])
    assert repr(loaded) == repr(model)


def test_training_goes_on_as_if_nothing_had_been(model, toy_adata, path):
    model.save(path)
    loaded = Factors.load(path, toy_adata).fit(2, progress=False)
    assert same(model.fit(2, progress=False), loaded)
    assert list(loaded.history.index) == [0, 1, 2, 3]


def test_without_data_other_cells_can_be_asked_about(model, toy_adata, path):
    model.save(path)
    loaded = Factors.load(path)
    with pytest.raises(ValueError, match="pass adata="):
        loaded.get_latent_representation()
    found = loaded.get_latent_representation(toy_adata[:7])
    np.testing.assert_array_equal(found, model.get_latent_representation(toy_adata[:7]))


def test_saved_again_it_is_the_same(model, path):
    model.save(path)
    Factors.load(path).save(path.with_name("second"))
    one, two = (json.loads((p / "model.json").read_text()) for p in (path, path.with_name("second")))
    assert one == two


@pytest.mark.parametrize("cls", [SCVI, Rates, Cells, Adversary])
def test_every_sort_of_model(toy_adata, path, cls):
    keys = {"batch_key": "batch"} if cls in (SCVI, Adversary) else {}
    model = cls.from_anndata(toy_adata, **keys).fit(2, progress=False)
    model.save(path)
    loaded = cls.load(path, toy_adata)
    assert same(model, loaded)
    assert set(model.state_dict()) == set(loaded.state_dict())


def test_several_sources(path):
    two = {"seq": make_adata(80, 20), "spatial": make_adata(40, 12, seed=1)}
    model = TwoSources.from_anndatas(two).fit(2, progress=False)
    model.save(path)
    loaded = TwoSources.load(path, two)
    for source in two:
        site = f"z_{source}"
        np.testing.assert_array_equal(
            loaded.posterior(site, source=source)[site], model.posterior(site, source=source)[site]
        )
    for wrong in ({"seq": two["seq"]}, two["seq"]):
        with pytest.raises(
            TypeError, match=r"data sources 'seq', 'spatial'.*\{'seq': adata, 'spatial': adata\}"
        ):
            TwoSources.load(path, wrong)


def test_global_generators_are_left_alone(model, path):
    model.save(path)
    state = torch.get_rng_state()
    Factors.load(path)
    assert torch.equal(torch.get_rng_state(), state)


# -- whose class ------------------------------------------------------------------------------------------


def test_the_package_s_own_classes_are_found(toy_adata, path):
    SCVI.from_anndata(toy_adata, batch_key="batch").save(path)
    assert type(pyrosc.load(path)) is SCVI
    assert type(pyrosc.load(path, toy_adata)) is SCVI


def test_a_user_s_class_is_named(model, path):
    pyrosc.save(model, path)
    with pytest.raises(
        ValueError, match=r"holds a 'Factors', not a model of pyrosc; pyrosc.load\(path, cls=Factors\)"
    ):
        pyrosc.load(path)
    assert type(pyrosc.load(path, cls=Factors)) is Factors
    with pytest.raises(ValueError, match="holds a 'Factors', not a 'SCVI'"):
        SCVI.load(path)


@pytest.mark.parametrize("name", ["Model", "os", "__builtins__", "PathwiseELBO"])
def test_no_other_name_is_looked_up(model, path, name):
    model.save(path)
    change(path, lambda meta: meta | {"class": name})
    with pytest.raises(ValueError, match=f"holds a '{name}', not a model of pyrosc"):
        pyrosc.load(path)


# -- the format -------------------------------------------------------------------------------------------


def change(path, how):
    file = path / "model.json"
    file.write_text(json.dumps(how(json.loads(file.read_text()))))


def test_there_is_no_pickle(model, path):
    model.save(path)
    assert sorted(p.name for p in path.iterdir()) == ["model.json", "params.safetensors"]
    for file in path.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
    assert json.loads((path / "model.json").read_text())["format"] == io.FORMAT


def test_a_newer_format_is_refused(model, path):
    model.save(path)
    change(path, lambda meta: meta | {"format": io.FORMAT + 1})
    with pytest.raises(
        ValueError, match=rf"newer pyrosc .*format {io.FORMAT + 1}, .*up to {io.FORMAT}\); upgrade"
    ):
        Factors.load(path)


def test_older_formats_are_brought_up_to_date(model, path, monkeypatch):
    model.save(path)
    monkeypatch.setattr(io, "FORMAT", io.FORMAT + 2)

    def first(meta):
        return meta | {"format": meta["format"] + 1, "settings": meta.pop("config")}

    def second(meta):
        return meta | {"format": meta["format"] + 1, "config": meta.pop("settings")}

    monkeypatch.setattr(io, "MIGRATIONS", {io.FORMAT - 2: first, io.FORMAT - 1: second})
    assert same(model, Factors.load(path))


def test_a_folder_without_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pyrosc model"):
        pyrosc.load(tmp_path)


@pytest.mark.parametrize("version", range(1, io.FORMAT + 1))
def test_checkpoints_of_every_version_are_read(version, load_golden):
    folder, data = load_golden(version)
    model = pyrosc.load(folder / "model", data)
    expected = np.load(folder / "expected.npz", allow_pickle=False)
    found = model.posterior(list(expected))
    for site in expected:
        np.testing.assert_allclose(found[site], expected[site], atol=1e-5, rtol=1e-5)
    assert model.config["dispersion"] == "gene-batch"
    assert len(model.history) > 0


@pytest.fixture
def load_golden():
    """Folder and cells of the checkpoint of a format version."""

    def found(version):
        from golden.make_checkpoint import data

        folder = Path(__file__).parent / "golden" / f"scvi_v{version}"
        return folder, data(folder)

    return found


# -- atomic -----------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_by_accident(model, path):
    model.save(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        model.save(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    model.fit(1, progress=False).save(path, overwrite=True)
    assert same(Factors.load(path), model)
    assert [p.name for p in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_not_a_model_is_left_alone(model, tmp_path, overwrite):
    folder, file = tmp_path / "thesis", tmp_path / "file"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("…")
    file.write_text("…")
    for taken in (folder, file):
        with pytest.raises(FileExistsError, match="is not a pyrosc model; it was left alone"):
            model.save(taken, overwrite=overwrite)
    assert (folder / "chapter1.tex").exists()


def test_an_empty_folder_is_taken(model, tmp_path):
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert same(Factors.load(tmp_path / "empty"), model)


def test_others_may_read_it(model, path):
    """As the user's umask says, like any folder and file they make."""
    before = os.umask(0o022)
    try:
        model.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o644}


class Crash(BaseException):
    """A process that ends: nothing after it runs, not even clean-up."""


def crash(*_, **__):
    raise Crash


@pytest.mark.parametrize("stage", ["parameters", "description", "flush", "first rename", "second rename"])
def test_a_failure_at_any_stage_leaves_the_old_model(model, path, monkeypatch, stage):
    model.save(path)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    model.fit(1, progress=False)
    if stage == "parameters":
        monkeypatch.setattr(io, "save_file", crash)
    elif stage == "description":
        monkeypatch.setattr(io, "_describe", crash)
    elif stage == "flush":
        monkeypatch.setattr(os, "fsync", crash)
    else:
        fail_at(monkeypatch, 1 if stage == "first rename" else 2)
    with pytest.raises(Crash):
        model.save(path, overwrite=True)
    monkeypatch.undo()
    loaded = Factors.load(path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in old.items())
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    model.save(path, overwrite=True)
    assert same(Factors.load(path), model)


def fail_at(monkeypatch, count):
    rename, calls = os.rename, []

    def counted(*given):
        calls.append(given)
        return crash() if len(calls) == count else rename(*given)

    monkeypatch.setattr(os, "rename", counted)


def test_a_kill_between_the_renames_leaves_a_model_that_is_named(model, path, monkeypatch):
    """Without any clean-up: the error of `load` says where the old model is."""
    model.save(path)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    model.fit(1, progress=False)
    rename, calls = os.rename, []

    def killed(*given):
        calls.append(given)
        if len(calls) > 1:
            raise Crash
        return rename(*given)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(Crash):
        model.save(path, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(
        FileNotFoundError, match="a save was cut short, and the model before it is in"
    ) as error:
        Factors.load(path)
    named = str(error.value).rsplit(" is in ", 1)[1]
    loaded = Factors.load(named)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in old.items())


def test_a_first_save_that_fails_leaves_nothing(model, path, monkeypatch):
    fail_at(monkeypatch, 1)
    with pytest.raises(Crash):
        model.save(path)
    assert list(path.parent.iterdir()) == []


# -- other data -------------------------------------------------------------------------------------------


def _fewer_genes(adata):
    return adata[:, 2:].copy()


def _other_batches(adata):
    adata.obs["batch"] = np.where(np.arange(200) < 3, "new", "batch_0")
    return adata


def _fewer_cells(adata):
    return adata[:150].copy()


def _another_order(adata):
    return adata[::-1].copy()


def _other_counts(adata):
    adata.layers["counts"] = adata.layers["counts"] * 2
    return adata


def _no_layer(adata):
    del adata.layers["counts"]
    return adata


def _no_column(adata):
    del adata.obs["batch"]
    return adata


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (_fewer_genes, "lack 2 of the 40 genes of the model: 'gene_0', 'gene_1'"),
        (_other_batches, r"obs\['batch'\] has categories that Factors was not made with: 'new', in 3 cells"),
        (_fewer_cells, "made with 200 cells, the data have 150; .*as adata="),
        (_another_order, r"layers\['counts'\] is not the matrix .*cells in another order"),
        (_other_counts, r"layers\['counts'\] is not the matrix that the model was made with"),
        (_no_layer, "there is no layer 'counts'"),
        (_no_column, "obs has no column 'batch'"),
    ],
)
def test_data_that_do_not_match(model, toy_adata, path, how, message):
    model.save(path)
    with pytest.raises(DataError, match=message):
        Factors.load(path, how(toy_adata))


def test_genes_in_another_order_match(model, toy_adata, path):
    model.save(path)
    loaded = Factors.load(path, toy_adata[:, ::-1].copy())
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_the_same_data_from_a_file_match(model, toy_adata, path, tmp_path):
    model.save(path)
    toy_adata.write_h5ad(tmp_path / "data.h5ad")
    for backed in (None, "r"):
        adata = ad.read_h5ad(tmp_path / "data.h5ad", backed=backed)
        found = Factors.load(path, adata).get_latent_representation()
        np.testing.assert_array_equal(found, model.get_latent_representation())


def test_data_need_not_be_in_the_storage_of_then(model, toy_adata, path):
    model.save(path)
    toy_adata.layers["counts"] = toy_adata.layers["counts"].toarray().astype(np.int64)
    Factors.load(path, toy_adata)
