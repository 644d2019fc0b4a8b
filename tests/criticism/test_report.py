"""The report of any model: whole, safe, and readable in a browser."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from solvable import GammaPoisson
from toy import make_adata
from toy_models import Cells, Mixture, Rates, TwoSources

import pyrosc
from pyrosc.criticism import outputs, sections
from pyrosc.criticism.sections import PARTS

MARKERS = {"A": ["gene_1", "gene_2", "gene_3"], "B": ["gene_4", "gene_5", "gene_6"]}


@pytest.fixture(scope="module")
def adata():
    return make_adata(200, 30)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """UMAP compiles for half a minute, and sharp pictures take long; here neither is needed."""
    monkeypatch.setattr(outputs, "umap", lambda z, seed: z[:, :2])
    monkeypatch.setattr("pyrosc.criticism.page._DPI", 20)
    whole = sections.guide_diagnostics
    monkeypatch.setattr(sections, "guide_diagnostics", lambda *a, **k: whole(*a, **k, n_samples=30))


@pytest.fixture(scope="module")
def model(adata):
    made = pyrosc.SCVI.from_anndata(adata, batch_key="batch", n_hidden=16, n_latent=3)
    return made.fit(5, progress=False, callbacks=[])


class Page(html.parser.HTMLParser):
    """What a page holds: text, tags, titles of its parts, addresses it names; that it is well formed."""

    EMPTY = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.titles, self.addresses, self.words = [], [], [], [], []
        self.anchors, self.links = set(), set()
        self.feed(text)
        assert self.stack == []
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.stack.append(tag)
        if "id" in given:
            self.anchors.add(given["id"])
        for name in ("src", "href"):
            if name in given:
                if given[name].startswith("#"):
                    self.links.add(given[name][1:])
                else:
                    self.addresses.append(given[name])
        if tag == "img":
            assert given["alt"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.stack and self.stack[-1] == "h2":
            self.titles.append(data)


def parts_of(page: Page) -> list[str]:
    return [t for t in page.titles if t not in ("In short", "Left out")]


def left_out(page: Page) -> dict[str, str]:
    if "Left out" not in page.titles:
        return {}
    after = page.text[page.text.rindex("Left out") :]
    return {name: after for name, _ in PARTS if f" {name} : " in after}


# -- the whole -------------------------------------------------------------------------------------------


def test_a_report_is_whole_and_alone(model, adata, tmp_path):
    before = adata.copy()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    path = pyrosc.report(model, path=tmp_path / "new" / "r.html", labels_key="label")
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert path == tmp_path / "new" / "r.html"
    assert [f.name for f in path.parent.iterdir()] == ["r.html"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    wanted = [name for name, _ in PARTS if name not in ("Labels", "Integration")]
    assert parts_of(page) == wanted
    assert set(left_out(page)) == {"Labels", "Integration"}
    assert page.links == page.anchors & page.links  # every link has its place
    assert {a.split(",")[0] for a in page.addresses} == {"data:", "data:image/png;base64"}
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import", text)
    assert "held-out cells" in page.text
    for number in (f"{model.registry.n_obs:,}", f"{len(model.history):,}"):
        assert number in page.text
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.obsm) == set(before.obsm)
    assert (adata.X != before.X).nnz == 0
    assert set(adata.uns) == set(before.uns)


def test_one_seed_one_report(model, tmp_path):
    others = ["Training", "Fit", "Latent space", "Predictive checks", "Predictive intervals"]
    one, two = (
        pyrosc.report(model, path=tmp_path / f"{i}.html", leave_out=others).read_text() for i in range(2)
    )
    cut = re.compile(r"Made [^<]*")
    assert cut.sub("", one) == cut.sub("", two)


# -- strings of users ------------------------------------------------------------------------------------


def test_names_of_users_are_text_not_html(adata, tmp_path):
    evil = "<script>alert('x')</script>\"&$^_"
    data = adata.copy()
    data.obs[evil] = pd.Categorical(np.where(data.obs["batch"] == "batch_0", "<b>a</b>", "'>\" $x$ b"))
    data.var_names = [f"<i>{name}" for name in data.var_names]
    model = pyrosc.SCVI.from_anndata(data, batch_key=evil, n_hidden=8, n_latent=3)
    model.fit(2, progress=False, callbacks=[])
    path = pyrosc.report(model, path=tmp_path / "r.html", title=f"{evil} title")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "i"} & set(page.tags) - {"b"}
    assert "<b>a</b>" not in text
    assert f"{evil} title" in page.text
    assert "<i>gene_" in page.text  # genes that fit worst, as they are called
    assert {"Latent space", "DE genes kept"} <= set(parts_of(page))


# -- where it is written ---------------------------------------------------------------------------------


def test_only_reports_are_replaced(model, tmp_path):
    quick = {"leave_out": [n for n, _ in PARTS if n not in ("Model", "Training")]}
    path = pyrosc.report(model, path=tmp_path / "r.html", **quick)
    before = path.read_text()
    pyrosc.report(model, path=path, title="Again", **quick)
    assert "Again" in path.read_text() != before
    other = tmp_path / "other.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(FileExistsError, match=r"other.html exists and is not a report of pyrosc.*overwrite"):
        pyrosc.report(model, path=other)
    assert other.read_text() == "<html>mine</html>"
    pyrosc.report(model, path=other, overwrite=True, **quick)
    assert "pyrosc report" in other.read_text()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        pyrosc.report(model, path=tmp_path)


def test_a_failure_leaves_the_old_report(model, tmp_path, monkeypatch):
    path = pyrosc.report(model, path=tmp_path / "r.html", leave_out=[n for n, _ in PARTS if n != "Model"])
    before = path.read_text()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        pyrosc.report(model, path=path, leave_out=[n for n, _ in PARTS if n != "Model"])
    assert path.read_text() == before
    assert [f.name for f in tmp_path.iterdir()] == ["r.html"]


# -- any model -------------------------------------------------------------------------------------------


def made(name, adata):
    batch = {"batch_key": "batch"}
    makers = {
        "LinearSCVI": lambda: pyrosc.LinearSCVI.from_anndata(adata, bayesian=True, n_latent=3, n_hidden=8),
        "SCANVI": lambda: pyrosc.SCANVI.from_anndata(
            adata, labels_key="label", n_latent=3, n_hidden=8, **batch
        ),
        "CellAssign": lambda: pyrosc.CellAssign.from_anndata(adata, MARKERS),
        "RNAStereoscope": lambda: pyrosc.RNAStereoscope.from_anndata(adata, labels_key="label"),
        "normal": lambda: pyrosc.SCVI.from_anndata(adata, gene_likelihood="normal", n_latent=3, n_hidden=8),
        "Mixture": lambda: Mixture.from_anndata(adata, **batch),
        "Rates": lambda: Rates.from_anndata(adata, continuous_covariate_keys=["stress"], standardize=False),
        "Cells": lambda: Cells.from_anndata(adata),
        "GammaPoisson": lambda: GammaPoisson.from_anndata(adata),
    }
    return makers[name]()


#: Parts that each model has beside Model, Training, Fit, predictive checks and intervals.
HAS = {
    "LinearSCVI": {"Latent space", "Posterior of the cells", "Simulated cells"},
    "SCANVI": {"Latent space", "Labels", "DE genes kept", "Posterior of the cells", "Simulated cells"},
    "CellAssign": {"Labels", "Simulated cells"},
    "RNAStereoscope": {"DE genes kept"},
    "normal": {"Latent space", "Posterior of the cells", "Simulated cells"},
    "Mixture": {"DE genes kept", "Posterior of the cells", "Simulated cells"},
    "Rates": set(),
    "Cells": set(),
    "GammaPoisson": {"Posterior of the cells", "Simulated cells"},
}


@pytest.mark.parametrize("name", HAS)
def test_any_model(name, adata, tmp_path):
    model = made(name, adata)
    if name != "GammaPoisson":  # which is not trained
        model.fit(2, progress=False, callbacks=[])
    page = Page(pyrosc.report(model, path=tmp_path / "r.html", max_cells=60).read_text(encoding="utf-8"))
    always = {"Model", "Fit", "Predictive checks", "Predictive intervals"}
    trained = {"Training"} if name != "GammaPoisson" else set()
    assert set(parts_of(page)) == always | trained | HAS[name]
    assert set(left_out(page)) == {n for n, _ in PARTS} - set(parts_of(page))


def test_other_cells(model, adata, tmp_path):
    other = adata[:50].copy()
    text = pyrosc.report(model, other, tmp_path / "r.html", labels_key="label").read_text()
    page = Page(text)
    assert "50 cells that were passed to the report" in page.text
    assert "DE genes kept" in page.titles


def test_what_cannot_be_reported_is_refused(model, adata, tmp_path):
    path = tmp_path / "r.html"
    with pytest.raises(pyrosc.DataError, match="no column 'kind'"):
        pyrosc.report(model, path=path, labels_key="kind")
    with pytest.raises(ValueError, match="leave_out is one of 'Model', 'Training'"):
        pyrosc.report(model, path=path, leave_out=["Umap"])
    with pytest.raises(TypeError, match=r"write \['Integration'\]"):
        pyrosc.report(model, path=path, leave_out="Integration")
    with pytest.raises(ValueError, match="max_cells is at least 20"):
        pyrosc.report(model, path=path, max_cells=3)
    two = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(30, 8)})
    with pytest.raises(ValueError, match="reads several data sets"):
        pyrosc.report(two, path=path)
    assert not path.exists()


# -- in a browser ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_browser(model, tmp_path, width):
    """It loads without a request or an error, and nothing is wider than the screen."""
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("needs chromium")
    path = pyrosc.report(model, path=tmp_path / "r.html", leave_out=["Posterior of the cells"])
    # a page that measures the report from outside: the report itself has no script
    probe = tmp_path / "probe.html"
    probe.write_text(
        path.read_text(encoding="utf-8").replace(
            "</body>",
            "<script>addEventListener('load', () => { const d = document.documentElement;"
            "const broken = [...document.images].filter(i => !i.naturalWidth).length;"
            "const files = performance.getEntriesByType('resource')"
            ".filter(r => !r.name.startsWith('data:')).length;"
            "document.title = `probe ${d.scrollWidth <= d.clientWidth} ${broken} ${document.images.length}"
            " ${files}` })</script></body>",
        ),
        encoding="utf-8",
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += [f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    found = subprocess.run(
        [browser, *options, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120
    )
    fits, broken, images, files = re.search(r"<title>probe (\w+) (\d+) (\d+) (\d+)", found.stdout).groups()
    assert (fits, broken, files) == ("true", "0", "0")
    assert int(images) == Page(path.read_text(encoding="utf-8")).tags.count("img") > 8
    assert "CONSOLE" not in found.stderr
