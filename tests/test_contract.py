"""Every model of the package keeps the contract; broken models are caught."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrosc
import pyrosc.models
from pyrosc import ContractError, Model, check_model
from pyrosc.data import Batch, Counts

MODELS = [
    m for m in vars(pyrosc.models).values() if isinstance(m, type) and issubclass(m, Model) and m is not Model
]
#: Options that change what a model is made of.
VARIANTS = {
    "CellAssign": [
        {"markers": {"A": ["gene1", "gene2"], "B": ["gene2", "gene3", "gene4"]}},
        {"markers": {"A": ["gene1"], "B": ["gene3"]}, "other": "rest", "dispersion": "gene"},
    ],
    "SCVI": [
        {},
        {"gene_likelihood": "nb", "dispersion": "gene-batch", "use_observed_lib_size": False},
        {"gene_likelihood": "poisson", "latent_distribution": "ln", "encode_covariates": True},
        {"gene_likelihood": "normal", "batch_representation": "embedding", "norm": "layer", "n_layers": 2},
        {"dispersion": "gene-label", "deeply_inject_covariates": False, "n_layers": 2},
        {"dispersion": "gene-cell"},
        {"batch_prior": "hierarchical", "encode_covariates": True, "dispersion": "gene-batch"},
    ],
    "SCANVI": [{}, {"batch_prior": "hierarchical", "encode_covariates": True}],
    "LinearSCVI": [
        {},
        {"bayesian": True, "gene_likelihood": "zinb", "batch_prior": "hierarchical"},
        {"decoder_norm": "batch", "batch_representation": "embedding", "dispersion": "gene-cell"},
    ],
    "TOTALVI": [
        {},
        {"gene_likelihood": "zinb", "dispersion": "gene-batch", "protein_dispersion": "protein-batch"},
        {"latent_distribution": "ln", "protein_dispersion": "protein-label", "use_observed_lib_size": False},
        {"batch_prior": "hierarchical", "adversarial": True, "background_prior": "empirical"},
        {"reference_objective": True, "encode_covariates": False},
    ],
    "PEAKVI": [
        {},
        {"likelihood": "poisson", "latent_distribution": "ln", "encoder_input": "log"},
        {"likelihood": "beta_binomial", "copies": 50, "encode_covariates": True},
        {"model_depth": False, "norm": "batch", "deeply_inject_covariates": False, "n_hidden": 16},
    ],
    "SpatialStereoscope": [{}, {"proportions": "amortized"}, {"proportions": "posterior"}],
    "AUTOZI": [
        {},
        {"zero_inflation": "gene-batch", "alpha_prior": None, "beta_prior": None},
        {"zero_inflation": "gene-label", "dispersion": "gene-label", "latent_distribution": "ln"},
    ],
}
CASES = [(m, options) for m in MODELS for options in VARIANTS.get(m.__name__, [{}])]


@pytest.mark.parametrize(
    ("cls", "options"), CASES, ids=[f"{m.__name__}-{'-'.join(map(str, o.values()))}" for m, o in CASES]
)
def test_every_model_keeps_the_contract(cls, options):
    assert len(check_model(cls, **options)) == len(pyrosc.checks.CHECKS)


class Rates(Model):
    """One rate per gene and batch, with faults to be switched on."""

    fault = ""

    def __init__(self, registry):
        super().__init__(registry)
        shape = (registry.n_categories("batch"), registry.n_vars())
        if self.fault == "bare category parameter":
            self.rows = torch.nn.Parameter(torch.zeros(shape))
        else:
            self.table = pyrosc.nn.CategoryTable("batch", shape[0], shape[1:])

    def model(self, x: Counts, batch: Batch):
        log_rate = self.rows[batch] if self.fault == "bare category parameter" else self.table(batch)
        if self.fault == "touches the parameter store":
            pyro.param("stray", torch.zeros(()))
        if self.fault == "touches NumPy's generator":
            np.random.random()  # noqa: NPY002 (the fault)
        plate = self.cells(x)
        if self.fault == "plate without the size of the data":
            plate = pyro.plate("cells", len(x), dim=-1)
        with plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            shift = z.mean(0, keepdim=True) if self.fault == "mixes cells" else z
            rate = pyro.deterministic("rate", (log_rate + shift.sum(-1, keepdim=True)).exp(), event_dim=1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(self, x: Counts, batch: Batch):
        with (
            self.cells(x)
            if self.fault != "plate without the size of the data"
            else pyro.plate("cells", len(x), dim=-1)
        ):
            loc = x.log1p()[:, :2] - 1
            if self.fault != "site without a guide":
                pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def test_a_sound_toy_passes():
    assert check_model(Rates)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("bare category parameter", "categories_live_in_tables"),
        ("touches the parameter store", r"pyro.param or pyro.module \('stray'\)"),
        ("touches NumPy's generator", "global_state_is_untouched"),
        ("plate without the size of the data", "minibatch_loss_is_unbiased"),
        ("mixes cells", "order_and_batch_size_do_not_matter"),
        ("site without a guide", "every_site_is_guided"),
    ],
)
def test_faults_are_caught(fault, check):
    broken = type("Broken", (Rates,), {"fault": fault})
    with pytest.raises(ContractError, match=check):
        check_model(broken)


def test_signatures_that_differ_are_caught():
    class Different(Rates):
        def guide(self, x: Counts):
            pass

    with pytest.raises(ContractError, match="signatures_agree"):
        check_model(Different)
