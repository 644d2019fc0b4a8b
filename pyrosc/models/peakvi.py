"""PeakVI: a variational autoencoder of chromatin accessibility (Ashuach et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrosc.data import Batch, CategoricalCovariates, ContinuousCovariates, Dataset, Fragments, Registry
from pyrosc.data.errors import one_of, warn
from pyrosc.distributions import BetaBinomial, Poisson, ScaledBernoulli
from pyrosc.infer.elbo import PathwiseELBO
from pyrosc.models.accessibility import Accessibility
from pyrosc.models.base import Model
from pyrosc.models.scvi import GeneParameter
from pyrosc.nn import MLP, Covariates, CovariateSpec, NormalEncoder
from pyrosc.nn.layers import Norm
from pyrosc.nn.sparse import SparseRows
from pyrosc.train.plan import Plan

#: Least product of cell and region factors at the start: what is open in all cells of a kind is seen in this
#: share of them. It is higher where regions are seen as often: so much more than the most frequent ones are.
_REACH, _ROOM, _MOST = 0.25, 1.5, 0.9
#: Precision of the Normal prior of the networks' weights, for all cells together.
_PRECISION = 15.0
#: Share of the values above the number of copies from which the user is told that they are cut.
_MANY_CLIPPED = 0.001


class PEAKVI(Accessibility, Model):
    """Chromatin accessibility of single cells.

    z ~ Normal(0, I); accessibility p = σ f(z, batch, covariates); cell factor d = σ g(x), region factor
    r = σ(·). A region is seen open with probability p d r. The guide is q(z | x), a Normal with diagonal
    covariance computed by a network.

    Parameters
    ----------
    registry
        Made by `from_anndata`, which reads fragments. Reads (insertions) are recognised by their even values
        and taken two for one; ``counts="reads"`` or ``counts="fragments"`` says what the data are.
    likelihood
        ``"bernoulli"``: whether there is a fragment, 1[x > 0] ~ Bernoulli(p d r). ``"beta_binomial"``:
        min(x, T) of T = 2 `copies` ends, with mean p d r and a concentration per region. ``"poisson"``:
        x ~ Poisson(l ρ), l the fragments of the cell and ρ = softmax(f(z, ·) + log r) their shares.
    n_hidden, n_latent
        Width of the hidden layers and of the latent space; default √regions and √n_hidden.
    n_layers_encoder, n_layers_decoder
        Depth.
    dropout_rate
        Of the encoder's hidden units, while training.
    input_dropout_rate
        Of what the encoder sees, while training: a cell shows a small part of its open regions, and no one of
        them should decide where the cell is.
    model_depth
        Cell factors; False fixes them at 1. Not for ``"poisson"``, whose cell factor is l.
    region_factors
        Region factors; False fixes them at 1.
    copies
        Copies of a locus in a cell (2: diploid), of the beta-binomial law.
    latent_distribution
        ``"normal"``, or ``"ln"`` for a logistic-normal latent: softmax of the Normal, on the simplex.
    encode_covariates
        Let the encoder see batch and covariates.
    deeply_inject_covariates
        Add them to each hidden layer; False to the first only.
    norm
        Normalisation of hidden layers: ``"layer"``, ``"batch"`` or ``"none"``.
    encoder_input
        What encoder and cell factor see: ``"binary"``, 1[x > 0], or ``"log"``, log(1 + x).

    Attributes
    ----------
    clipped_share
        Of the beta-binomial law: share of the values above T, which are taken as T.

    References
    ----------
    Ashuach, Reidenbach, Gayoso, Yosef. PeakVI: a deep generative model for single-cell chromatin
    accessibility analysis. Cell Reports Methods 2 (2022). Martens, Fischer, Yépez, Theis, Gagneur. Modeling
    fragment counts improves single-cell ATAC-seq analysis. Nature Methods 21 (2024).
    """

    clipped: Tensor
    elbo = PathwiseELBO(analytic_kl=True)
    vectorized = True
    expression = "p"
    takes_means = False  # the encoder sees whether a region is open, and how many are
    # What a cell shows is little, and where the KL weighs one from early on few dimensions come to be used.
    plan = Plan(steps=2000, warmup=0.9)
    slots: ClassVar = {
        "z": "obsm/X_PeakVI",
        "cell_factor": "obs/peakvi_cell_factor",
        "p": "layers/peakvi_accessibility",
    }

    def __init__(
        self,
        registry: Registry,
        likelihood: Literal["bernoulli", "poisson", "beta_binomial"] = "bernoulli",
        n_hidden: int | None = None,
        n_latent: int | None = None,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 2,
        dropout_rate: float = 0.1,
        input_dropout_rate: float = 0.3,
        model_depth: bool = True,
        region_factors: bool = True,
        copies: int = 2,
        latent_distribution: Literal["normal", "ln"] = "normal",
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        norm: Norm = "layer",
        encoder_input: Literal["binary", "log"] = "binary",
    ) -> None:
        super().__init__(registry)
        one_of("likelihood", likelihood, ("bernoulli", "poisson", "beta_binomial"))
        one_of("latent_distribution", latent_distribution, ("normal", "ln"))
        one_of("encoder_input", encoder_input, ("binary", "log"))
        if copies < 1:
            raise ValueError(f"copies of a locus are 1 or more, not {copies}")
        if likelihood == "poisson" and not model_depth:
            raise ValueError(
                "the Poisson law takes a cell's fragments for its factor: leave model_depth=True"
            )
        n_regions = registry.n_vars()
        n_hidden = max(int(n_regions**0.5), 1) if n_hidden is None else n_hidden
        n_latent = max(int(n_hidden**0.5), 1) if n_latent is None else n_latent
        self.likelihood, self.n_latent, self.total = likelihood, n_latent, 2 * copies
        self.effect_scale = "lfc" if likelihood == "poisson" else "difference"
        self.logistic_normal = latent_distribution == "ln"
        self.encode_covariates, self.binary_input = encode_covariates, encoder_input == "binary"
        self.spec = CovariateSpec.from_registry(
            registry, "batch", "categorical_covariates", "continuous_covariates"
        )
        seen, inject = self.spec if encode_covariates else CovariateSpec((), 0), deeply_inject_covariates
        leaky = nn.LeakyReLU()
        self.encoder = NormalEncoder(
            n_regions,
            n_latent,
            n_hidden,
            n_layers_encoder,
            seen,
            inject,
            norm,
            dropout_rate,
            activation=leaky,
            sparse=True,
        )
        self.thin = Thin(input_dropout_rate)
        self.decoder = MLP(n_latent, n_hidden, n_layers_decoder, self.spec, inject, norm, activation=leaky)
        self.head = nn.Linear(n_hidden, n_regions)
        self.factor: CellFactor | None = None
        if model_depth and likelihood != "poisson":
            self.factor = CellFactor(n_regions, n_hidden, n_layers_encoder, norm)
        self.region: GeneParameter | None = GeneParameter(n_regions) if region_factors else None
        self.log_concentration: GeneParameter | None = None
        if likelihood == "beta_binomial":
            self.log_concentration = GeneParameter(n_regions)
        self.register_buffer("clipped", torch.zeros(()))
        own = {"region": self.region, "log_concentration": self.log_concentration}
        self.undecayed = tuple(name for name, module in own.items() if module is not None)
        self.rates = {"log_concentration": 10.0} if self.log_concentration is not None else {}
        self.plan = replace(self.plan, weight_decay=_PRECISION / max(registry.n_obs, 1))

    # -- the math -------------------------------------------------------------------------------------

    def model(
        self,
        x: Fragments,
        batch: Batch,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
    ) -> None:
        """p(x, z): x (n, g) fragments; codes (n,), covariates (n, k) and (n, p)."""
        covariates = self._covariates(batch, categorical_covariates, continuous_covariates)
        with self.cells(x):
            prior = dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1)
            if self.logistic_normal:
                z = pyro.deterministic("z", pyro.sample("z_raw", prior).softmax(-1), event_dim=1)
            else:
                z = pyro.sample("z", prior)
            logits = self.head(self.decoder(z, covariates))
            log_d = self._log_cell_factor(x, self._features(x))
            log_r = self.log_region_factors()
            pyro.deterministic("cell_factor", log_d.exp(), event_dim=0)
            if not self.training:  # no part of the objective, and as large as the data
                pyro.deterministic("p", self.accessibility(logits, log_r), event_dim=1)
            value, law = self.law(x, logits, log_d.unsqueeze(-1), log_r)
            pyro.sample("x", law.to_event(1), obs=value)

    def guide(
        self,
        x: Fragments,
        batch: Batch,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
    ) -> None:
        """q(z | x)."""
        covariates = None
        if self.encode_covariates:
            covariates = self._covariates(batch, categorical_covariates, continuous_covariates)
        with self.cells(x):
            name = "z_raw" if self.logistic_normal else "z"
            loc, scale = self.encoder(self.thin(self._features(x)), covariates)
            pyro.sample(name, dist.Normal(loc, scale).to_event(1))

    def _features(self, x: Tensor) -> Tensor | SparseRows:
        """What the networks see of the data, (n, g)."""
        sparse = SparseRows.of(x)
        if sparse is not None:
            return sparse.map((lambda v: np.minimum(v, 1)) if self.binary_input else np.log1p)
        return x.clamp(max=1) if self.binary_input else x.log1p()  # of whole numbers

    def _log_cell_factor(self, x: Tensor, features: Tensor | SparseRows) -> Tensor:
        """Log of d, (n,); of the fragments of the cell for the Poisson law."""
        if self.likelihood == "poisson":
            return x.sum(-1).log()
        if self.factor is None:
            return x.new_zeros(len(x))
        return logsigmoid(self.factor(features))

    def log_region_factors(self) -> Tensor:
        """Log of r, (g,); shares that add up to one for the Poisson law."""
        if self.region is None:
            return self.head.bias.new_zeros(self.registry.n_vars())
        values: Tensor = self.region()
        return values.log_softmax(-1) if self.likelihood == "poisson" else logsigmoid(values)

    def accessibility(self, logits: Tensor, log_r: Tensor) -> Tensor:
        """p (n, g) from the decoder's logits: a probability, or for the Poisson law a rate relative to r."""
        if self.likelihood == "poisson":
            return (logits - self._log_total(logits + log_r)).exp()
        return logits.sigmoid()

    def _log_total(self, log_rate: Tensor) -> Tensor:
        """Log of the rates' sum over the regions that the cells were measured for."""
        measured = self.measured("x")
        if measured is not None:
            log_rate = log_rate.masked_fill(~measured, -torch.inf)
        return log_rate.logsumexp(-1, keepdim=True)

    def law(self, x: Tensor, logits: Tensor, log_d: Tensor, log_r: Tensor) -> tuple[Tensor, Any]:
        """What is observed of the fragments, and its law region by region."""
        if self.likelihood == "bernoulli":
            return x.clamp(max=1), ScaledBernoulli(logits, log_r, log_d)
        if self.likelihood == "poisson":
            log_rate = logits + log_r
            return x, Poisson(log_mean=log_rate - self._log_total(log_rate) + log_d)
        mean = (logsigmoid(logits) + log_d + log_r).exp()
        assert self.log_concentration is not None
        law = BetaBinomial(mean, self.log_concentration().exp(), self.total)
        return x.clamp(max=self.total), law

    def _covariates(self, batch: Tensor, categorical: Tensor, continuous: Tensor) -> Covariates:
        return self.spec.pack(
            {"batch": batch, "categorical_covariates": categorical, "continuous_covariates": continuous}
        )

    # -- starting values ------------------------------------------------------------------------------

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Decoder and region factors at the regions' mean rates; cell factors in proportion to totals."""
        assert isinstance(data, Dataset)
        sums, cells, clipped = self._means(data)
        with torch.no_grad():
            self.clipped.fill_(clipped)
            if self.likelihood == "poisson":
                if self.region is not None:
                    self.region.values.copy_(torch.as_tensor(np.log(np.maximum(sums, 0.5))))
                else:
                    self.head.bias.copy_(torch.as_tensor(np.log(np.maximum(sums, 0.5) / sums.sum())))
                return
            factors = (self.factor is not None) + (self.region is not None)
            if self.log_concentration is not None:
                self.log_concentration.values.fill_(2.0)
            rate = np.maximum(sums, 0.5) / data.n_obs
            reach = float(np.clip(_ROOM * np.quantile(rate, 0.99), _REACH, _MOST)) ** 0.5 if factors else 1.0
            self.head.bias.copy_(torch.as_tensor(_logit(rate / reach**factors)))
            if self.region is not None:
                self.region.values.fill_(_logit(reach))
            if self.factor is not None:
                self.factor.head.bias.fill_(_logit(reach))
                logs = np.log(np.maximum(cells, 1))
                self.factor.centre.copy_(torch.tensor([logs.mean(), max(logs.std(), 1e-3)]))
        if clipped > _MANY_CLIPPED:
            warn(
                f"{clipped:.2%} of the values are above {self.total}, the ends of {self.total // 2} copies, "
                f"and are taken as {self.total}: are they fragments (see counts=), and is copies= right?"
            )

    def _means(self, data: Dataset) -> tuple[np.ndarray, np.ndarray, float]:
        """Sums per region, totals per cell of what is modelled, and the share of values above the total."""
        summary = data.summary("x")
        if self.likelihood == "poisson":
            return summary.gene_sums, summary.cell_sums, 0.0
        top = 1.0 if self.likelihood == "bernoulli" else float(self.total)
        sums, cells, above, n = np.zeros(self.registry.n_vars()), np.zeros(data.n_obs), 0, 0
        matrix = data.matrices["x"]
        for start in range(0, data.n_obs, 4096):
            rows = matrix.sparse_rows(np.arange(start, min(start + 4096, data.n_obs)))
            above, n = above + int((rows.data > self.total).sum()), n + rows.nnz
            rows.data = np.minimum(rows.data, top)
            cells[start : start + rows.shape[0]] = np.asarray((rows > 0).sum(1)).ravel()
            sums += np.asarray(rows.sum(0, dtype=np.float64)).ravel() / (top if top > 1 else 1)
        return sums, cells, 0.0 if self.likelihood == "bernoulli" else above / max(n, 1)

    @property
    def clipped_share(self) -> float:
        """Share of the values above the number of ends, of the data that the model was made with."""
        return float(torch.as_tensor(self.clipped))


def _logit(p: np.ndarray | float) -> Any:
    """Log odds of probabilities that are kept off 0 and 1."""
    p = np.clip(p, 1e-7, _MOST)
    return np.log(p) - np.log1p(-p)


class Thin(nn.Module):
    """Dropout; of sparse inputs it costs what there is of them.

    Parameters
    ----------
    rate
        Share of the values left out while training, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"input_dropout_rate is a share in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor | SparseRows) -> Tensor | SparseRows:
        """(..., g) to (..., g), the values left in divided by 1 - `rate`."""
        if not self.training or self.rate == 0:
            return x
        if isinstance(x, SparseRows):
            return x.map(self._thinned)
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        out, at = x.clone(), x != 0  # the same draws as of sparse rows
        out[at] = torch.from_numpy(self._thinned(x[at].numpy()))
        return out

    def _thinned(self, values: np.ndarray) -> np.ndarray:
        keep: np.ndarray = (torch.rand(len(values)) >= self.rate).numpy()
        return values * keep / values.dtype.type(1 - self.rate)


class CellFactor(nn.Module):
    """Logits of the cell factors, from all that is seen of a cell.

    A network whose layers are normalised hardly sees how much there is of a cell; the log of what is seen in
    total enters by a slope of its own.

    Parameters
    ----------
    n_regions, n_hidden, n_layers, norm
        Of the network, as in `MLP`.
    """

    centre: Tensor

    def __init__(self, n_regions: int, n_hidden: int, n_layers: int, norm: Norm) -> None:
        super().__init__()
        self.network = MLP(n_regions, n_hidden, n_layers, norm=norm, activation=nn.LeakyReLU(), sparse=True)
        self.head = nn.Linear(n_hidden, 1)
        self.slope = nn.Parameter(torch.ones(()))
        # mean and standard deviation over cells of the log of the total
        self.register_buffer("centre", torch.tensor([0.0, 1.0]))

    def forward(self, features: Tensor | SparseRows) -> Tensor:
        """(n, g) to (n,)."""
        total = (features.sum(-1).clamp(min=1).log() - self.centre[0]) / self.centre[1]
        return self.head(self.network(features)).squeeze(-1) + self.slope * total
