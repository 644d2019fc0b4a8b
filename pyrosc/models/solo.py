"""Solo: which droplets hold two cells (Bernstein et al., Cell Systems 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrosc.data import MAIN, Dataset, Field, Registry
from pyrosc.data.errors import listed, warn
from pyrosc.infer.calibration import fit_temperature
from pyrosc.infer.prevalence import Prevalence, class_probability, estimate_prevalence
from pyrosc.infer.structure import sites_of_cells
from pyrosc.models.base import Model
from pyrosc.models.scvi import SCVI
from pyrosc.nn import Committee
from pyrosc.tools.droplets import Material, checksum, make_droplets
from pyrosc.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData

SIMULATED = "simulated"
_PER_THOUSAND = 0.008  # doublets per thousand cells in a lane
_PRIOR_CELLS = 10.0  # how many cells the prior of the rate counts as

Features = Annotated[Tensor, Field("values", "features_key")]
Fold = Annotated[Tensor, Field("values", "fold_key")]
SimulatedFeatures = Annotated[Tensor, Field("values", "features_key", source=SIMULATED)]
SimulatedFold = Annotated[Tensor, Field("values", "fold_key", source=SIMULATED)]


class Solo(Model):
    """Doublet detection: a classifier that tells droplets from sums of two of them.

    Made from a trained model by `from_model`. Real droplets are a mixture of singlets and, at a rate π, of
    doublets; the simulated ones are doublets. Networks learn q(x), the probability that a droplet with
    features x is a simulated one, each from all folds of the data but one, which it is used on. Then
    P(doublet | x) = min(1, π (n_real/n_simulated) q/(1 − q)).

    Parameters
    ----------
    registry
        Made by `from_model`.
    n_hidden, n_layers, dropout_rate
        Of the networks.
    n_folds
        Number of networks.
    expected_doublet_rate
        The rate π where it is known, in (0, 1); None estimates it.
    made_from
        How the droplets were made, kept for `attach`.

    References
    ----------
    Bernstein, Fong, Lam, Roy, Hendrickson, Kelley. Solo: doublet identification in single-cell RNA-seq via
    semi-supervised deep learning. Cell Systems 11 (2020).
    """

    plan: Plan = Plan(steps=450, min_epochs=5, max_epochs=40, warmup=0.0, weight_decay=1e-4)
    slots: ClassVar = {"doublet": "obs/solo_prediction"}
    label = "doublet"
    positive = "doublet"
    latent = "log_ratio"
    loc: Tensor
    scale: Tensor
    temperature: Tensor
    rate: Tensor

    def __init__(
        self,
        registry: Mapping[str, Registry],
        n_hidden: int = 64,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        n_folds: int = 5,
        expected_doublet_rate: float | None = None,
        made_from: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(registry)
        if expected_doublet_rate is not None and not 0 < expected_doublet_rate < 1:
            raise ValueError(
                "expected_doublet_rate is a share of the droplets, between 0 and 1 (0.08 for 8 %); not "
                f"{expected_doublet_rate}"
            )
        n_features = registry[MAIN].n_vars("features")
        self.networks = Committee(n_features, n_hidden, n_layers, n_folds, dropout_rate)
        self.register_buffer("loc", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.register_buffer("temperature", torch.ones(()))
        start = self._prior_mean(made_from) if expected_doublet_rate is None else expected_doublet_rate
        self.register_buffer("rate", torch.full((3,), start))  # estimate, and ends of its interval
        self.expected_doublet_rate = expected_doublet_rate
        self.made_from = dict(made_from or {})
        self._parent: tuple[Model] | None = None  # in a tuple, so that it is no submodule
        self._material: Material | None = None

    # -- the math -------------------------------------------------------------------------------------

    def model(
        self,
        features: Features,
        fold: Fold,
        simulated: SimulatedFeatures,
        simulated_fold: SimulatedFold,
    ) -> None:
        """p(origin | features): features (n, p) of real and (m, p) of simulated droplets, folds (·, 1)."""
        with self.cells(features):
            logits = self._logits(features)
            log_ratio = pyro.deterministic("log_ratio", self._log_ratio(logits, fold), event_dim=0)
            doublet = class_probability(log_ratio, self.rate[0])
            pyro.deterministic("doublet", torch.stack([1 - doublet, doublet], -1), event_dim=1)
            self._origin("origin", logits, fold, 0.0)
        with self.cells(simulated, source=SIMULATED):
            logits = self._logits(simulated)
            log_ratio = self._log_ratio(logits, simulated_fold)
            pyro.deterministic("log_ratio_simulated", log_ratio, event_dim=0)
            self._origin("origin_simulated", logits, simulated_fold, 1.0)

    def guide(
        self,
        features: Features,
        fold: Fold,
        simulated: SimulatedFeatures,
        simulated_fold: SimulatedFold,
    ) -> None:
        """Nothing is latent."""

    def _logits(self, features: Tensor) -> Tensor:
        """Log-odds of being simulated by each network, (n, k)."""
        return self.networks(((features - self.loc) / self.scale).clamp(-8, 8)) / self.temperature

    def _log_ratio(self, logits: Tensor, fold: Tensor) -> Tensor:
        """log p(x | doublet) / p(x) by the network that was not taught the droplet's fold, (n,)."""
        own = logits.gather(-1, fold.long().clamp(min=0)).squeeze(-1)
        log_odds = torch.where(fold.squeeze(-1) < 0, logits.mean(-1), own)
        return log_odds - float(np.log(self.n_train[SIMULATED] / self.n_train[MAIN]))

    def _origin(self, name: str, logits: Tensor, fold: Tensor, value: float) -> None:
        taught = fold.long() != torch.arange(logits.shape[-1], device=logits.device)
        known = ~logits.isnan()  # cells of batches that were left out have no features
        law = dist.Bernoulli(logits=logits.nan_to_num()).mask(taught & known).to_event(1)
        pyro.sample(name, law, obs=torch.full_like(logits, value))

    # -- starting values and the rate -----------------------------------------------------------------

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Features are centred and scaled by those of all droplets."""
        assert isinstance(data, dict)
        values = np.concatenate([data[MAIN].codes("features"), data[SIMULATED].codes("simulated")])
        self.loc.copy_(torch.as_tensor(values.mean(0)))
        self.scale.copy_(torch.as_tensor(np.maximum(values.std(0), 1e-6)))

    def finish(self) -> None:
        """Temperature of the networks, and the rate π, from droplets by networks not taught them."""
        self.temperature.fill_(1.0)
        found = self.posterior("log_ratio"), self.posterior("log_ratio_simulated", source=SIMULATED)
        real, made = found[0]["log_ratio"], found[1]["log_ratio_simulated"]
        log_odds = torch.as_tensor(np.concatenate([real, made])) + float(np.log(len(made) / len(real)))
        codes = torch.as_tensor(np.repeat([0, 1], [len(real), len(made)]))
        pair = torch.stack([torch.zeros_like(log_odds), log_odds], 1)
        self.temperature.fill_(fit_temperature(pair, codes))
        if self.expected_doublet_rate is None:
            centre = self._prior_mean(self.made_from)
            prior = (_PRIOR_CELLS * centre, _PRIOR_CELLS * (1 - centre))
            self.rate.copy_(torch.tensor(estimate_prevalence(real, made, prior)))

    @staticmethod
    def _prior_mean(made_from: Mapping[str, Any] | None) -> float:
        """0.8 % per thousand cells in a batch; files are often parts of what was loaded."""
        return min(0.4, _PER_THOUSAND * (made_from or {}).get("cells_per_batch", 1000.0) / 1000)

    # -- making one -----------------------------------------------------------------------------------

    @classmethod
    def from_model(
        cls,
        model: Model,
        *,
        doublet_ratio: float = 2.0,
        expected_doublet_rate: float | None = None,
        restrict_to_batch: str | None = None,
        covariates: Literal["share", "inherit"] = "share",
        capture: float | tuple[float, float] = (0.5, 1.0),
        n_components: int = 30,
        n_folds: int = 5,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """A classifier for the droplets that a trained model was made with.

        Parameters
        ----------
        model
            Trained model of counts, with a latent site per cell and its data. Not changed.
        doublet_ratio
            Simulated doublets per real droplet.
        expected_doublet_rate
            Share of doublets among the droplets, where it is known; None estimates it.
        restrict_to_batch
            Look at one batch only; the other cells get no result. Worth it where batches differ much in their
            rates.
        covariates
            Pairs are always of one batch. ``"share"``: of one category of every further categorical covariate
            too; ``"inherit"``: of any, and the doublet has those of one of the two at random. Continuous
            covariates of a doublet are means weighted by the cells' total counts.
        capture
            Share of the two cells' molecules that a simulated doublet keeps, a number in (0, 1] or a range
            from which each draws its own. 1 adds the two; real doublets mostly have fewer counts than that.
        n_components
            Number of principal components of the log-normalised counts among the features.
        n_folds
            Number of folds, at least 2; fewer are used where a batch is too small.
        seed
            Of the pairs and the starting weights; no global generator is touched.
        **options
            Of `Solo`: ``n_hidden=``, ``n_layers=``, ``dropout_rate=``.

        Returns
        -------
        Solo
            Not trained yet.

        Raises
        ------
        KeyError
            If the model has no latent site per cell, or there is no such batch.
        ValueError
            If it has no data, does not model counts, or an argument is out of range.
        """
        settings: dict[str, Any] = {
            "doublet_ratio": doublet_ratio,
            "restrict_to_batch": None if restrict_to_batch is None else str(restrict_to_batch),
            "covariates": covariates,
            "capture": list(capture) if isinstance(capture, (tuple, list)) else [capture, capture],
            "n_components": n_components,
            "n_folds": n_folds,
            "seed": seed,
        }
        _check_parent(model)
        material = make_droplets(model, **settings)
        made_from = {
            "model": type(model).__name__,
            "checksum": checksum(model),
            "cells_per_batch": material.cells_per_batch,
            **settings,
        }
        key = {"features_key": "features", "fold_key": "fold"}
        self = cls.from_anndatas(
            material.adatas,
            keys={MAIN: key, SIMULATED: key},
            seed=seed,
            n_folds=material.n_folds,
            expected_doublet_rate=expected_doublet_rate,
            made_from=made_from,
            **options,
        )
        self._parent, self._material = (model,), material
        return self

    @classmethod
    def from_anndata(cls, adata: AnnData, **options: Any) -> Self:
        """Not for Solo, which is made from a model: `from_model`."""
        raise TypeError("Solo is made from a trained model: Solo.from_model(model)")

    @classmethod
    def example(
        cls, adatas: Mapping[str, AnnData], keys: Mapping[str, Mapping[str, Any]], seed: int, **options: Any
    ) -> Self:
        """From a small `SCVI` that was not trained."""
        parent = SCVI.from_anndata(adatas[MAIN], n_hidden=8, n_latent=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it was not trained
            return cls.from_model(parent, seed=seed, n_folds=3, **options)

    def attach(self, model: Model) -> Self:
        """Give a loaded Solo the model that it was made from, which it needs to read droplets.

        Parameters
        ----------
        model
            The same trained model, loaded with the same data.

        Returns
        -------
        Solo
            Itself, with the droplets it was made with.

        Raises
        ------
        ValueError
            If it is another model, or has no data.
        """
        was, now = self.made_from, {"model": type(model).__name__, "checksum": checksum(model)}
        if now["model"] != was.get("model") or now["checksum"] != was["checksum"]:
            raise ValueError(
                f"this Solo was made from a {was.get('model')} with other weights than those of the "
                f"{now['model']} given; attach the model that it was made from, or make a new one: "
                "Solo.from_model(model)"
            )
        _check_parent(model)
        derived = ("model", "checksum", "cells_per_batch")
        material = make_droplets(model, **{k: v for k, v in was.items() if k not in derived})
        sizes = {s: a.n_obs for s, a in material.adatas.items()}
        if sizes != {s: r.n_obs for s, r in self.registries.items()}:
            raise ValueError(
                f"this Solo was made with {self.registries[MAIN].n_obs:,} droplets, the {now['model']} has "
                f"{sizes[MAIN]:,}; load it with the same data"
            )
        self._parent, self._material = (model,), material
        self.datasets = {s: Dataset(a, self.registries[s], "Solo") for s, a in material.adatas.items()}
        return self

    # -- results --------------------------------------------------------------------------------------

    def dataset(self, adata: AnnData | None = None, source: str = MAIN) -> Dataset:
        """Features of the registered droplets, or of the cells of another AnnData of counts."""
        known = source in self.datasets and (adata is None or self.datasets[source].data is adata)
        readable = known or self._parent is not None or "features" in getattr(adata, "obsm", {})
        if source in self.registries and not readable:
            raise ValueError(
                "Solo was loaded without the model that it was made from, and reads droplets through it: "
                f"solo.attach(model), with the {self.made_from.get('model', 'model')} and its data"
            )
        if known or adata is None or self._parent is None or self._material is None:
            return super().dataset(adata, source)
        features = self._material.features_of(self._parent[0].dataset(adata))
        return Dataset(features, self.registries[MAIN], "Solo")

    def home(self) -> AnnData:
        """The AnnData of the model that this one was made from."""
        return super().home() if self._parent is None else self._parent[0].dataset().data

    def label_names(self) -> tuple[str, str]:
        """Singlet, doublet."""
        return ("singlet", "doublet")

    def get_doublet_rate(self) -> Prevalence:
        """Share of doublets among the droplets: estimate and 90 % interval.

        It counts doublets of two cells of one kind too, which no droplet shows: as many as there are among
        the simulated ones. Where ``expected_doublet_rate`` was given, it is that.
        """
        if self.history is None and self.expected_doublet_rate is None:
            raise ValueError("the rate is estimated when the model is trained; call fit()")
        return Prevalence(*self.rate.tolist())


def _check_parent(model: Model) -> None:
    name = type(model).__name__
    if list(model.registries) != [MAIN]:
        raise ValueError(f"Solo needs a model of one data source; {name} has {listed(model.registries)}")
    counts = [n for n, s in model.registry.fields.items() if s.kind == "counts"]
    if not counts:
        raise ValueError(f"Solo adds the counts of two cells; {name} has no counts")
    if model.support().get(counts[0], "counts") == "real":
        raise ValueError(
            f"Solo adds the counts of two cells; {name} was made with values that need not be counts "
            f"({model.registry.fields[counts[0]].where}). Make it from counts: layer='counts', and a "
            "likelihood of counts"
        )
    if model.knows_cells:
        raise ValueError(
            f"{name} has parameters of its own for each cell, and none for a doublet; use a model that "
            "encodes cells"
        )
    if not model.datasets:
        raise ValueError(f"{name} was loaded without data; pyrosc.load(path, adata) gives it some")
    local = sites_of_cells(model)
    if model.latent not in local:
        raise KeyError(
            f"{name} has no latent space '{model.latent}' per cell; its sites per cell are "
            f"{listed(local) or 'none'}: set latent = '<site>' in the class"
        )
    if not model.trained:
        warn(f"{name} was not trained, so that its latent space is random; call fit() first", UserWarning)


__all__ = ["SIMULATED", "Solo"]
