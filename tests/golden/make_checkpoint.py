"""Write the checkpoint that every later version must read: ``python tests/golden/make_checkpoint.py``.

Run once per format version, in a folder of its own; what is there already is never written over.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from pyrosc import SCVI, io

FOLDER = Path(__file__).parent / f"scvi_v{io.FORMAT}"


def data(folder: Path) -> ad.AnnData:
    """The cells of the checkpoint."""
    stored = np.load(folder / "data.npz", allow_pickle=False)
    obs = pd.DataFrame(
        {k: stored[k] for k in ("batch", "donor", "age")},
        index=[f"cell_{i}" for i in range(len(stored["x"]))],
    )
    var = pd.DataFrame(index=[f"gene_{j}" for j in range(stored["x"].shape[1])])
    return ad.AnnData(stored["x"].astype(np.float32), obs=obs, var=var)


def _make() -> None:
    FOLDER.mkdir()
    rng = np.random.default_rng(0)
    n, g = 80, 30
    batch = np.arange(n) % 2
    mean = rng.gamma(1.0, 3.0, (2, g))[batch] * rng.lognormal(0.0, 0.5, (n, g))
    np.savez_compressed(
        FOLDER / "data.npz",
        x=rng.poisson(mean).astype(np.uint16),
        batch=np.array(["a", "b"])[batch],
        donor=np.array(["d0", "d1", "d2"])[rng.integers(0, 3, n)],
        age=rng.normal(40.0, 10.0, n).round(3),
    )
    model = SCVI.from_anndata(
        data(FOLDER),
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        n_hidden=16,
        n_latent=4,
        n_layers=2,
        dispersion="gene-batch",
        encode_covariates=True,
        use_observed_lib_size=False,
    )
    model.fit(20, batch_size=32, progress=False)
    model.save(FOLDER / "model")
    found = model.posterior(["z", "library", "rho"])
    np.savez_compressed(FOLDER / "expected.npz", **found)


if __name__ == "__main__":
    _make()
