"""Fixtures and settings for all tests."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# scanpy's numba functions (normalize_total, say) set the number of OpenMP threads, torch's too, to theirs.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import anndata as ad
import hypothesis
import pytest
import torch
from toy import make_adata

ROOT = Path(__file__).resolve().parents[1]

# The same examples at every run, and no deadline: the first example of a test may import or compile
# something.
hypothesis.settings.register_profile("pyrosc", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("pyrosc")


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / default).resolve()
    if not path.is_dir():
        pytest.skip(f"needs real data: no folder {path} (set {variable})")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets; skips the test where it is missing."""
    return _folder("PYROSC_TEST_DATA", "data")


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Folder of files as `pyrosc.datasets` downloads them; skips the test where it is missing."""
    return _folder("PYROSC_TEST_CACHE", "cache")


@pytest.fixture
def toy_adata() -> ad.AnnData:
    """200 cells × 40 genes with labels, batches, donors and two covariates, its own copy for each test."""
    return make_adata()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums in one order, and no threads fighting over the cores of the test workers."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
