"""scANVI: scVI whose latent space knows cell types, for labels on some of the cells (Xu et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

from pyrosc.data import MAIN, Registry
from pyrosc.data.errors import listed
from pyrosc.data.inputs import load_batch
from pyrosc.infer.calibration import fit_temperature
from pyrosc.models.scvi import SCVI
from pyrosc.nn import MLP, Covariates, CovariateSpec, NormalEncoder, RandomEffects
from pyrosc.nn.layers import Norm
from pyrosc.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData

#: Labelled cells that each step sees at least, drawn anew where a minibatch has fewer.
_LABELLED = 64


class SCANVI(SCVI):
    """Single-cell annotation by variational inference: scVI with cell types, known for some cells.

    y ~ Categorical(1/K); z2 ~ Normal(0, I); z ~ Normal(μ(z2, y), σ²(z2, y)); counts from z as in `SCVI`. The
    guide is q(z | x) q(y | z) q(z2 | z, y). Labelled cells observe y; for the others it is summed out. To
    the bound comes the cross-entropy of the classifier q(y | z) on the labelled cells.

    Parameters
    ----------
    registry
        Made by `from_anndata`; labels are required (``labels_key=``). Cells whose label is missing, or the
        ``unlabeled_category``, are unlabelled.
    classification_weight
        Nats per unit of cross-entropy, whose mean over labelled cells is added to the loss per cell.
    linear_classifier
        Classify by a linear map of z, in place of a network.
    reference_objective
        The objective of the authors' implementation, for comparisons: y is summed out of the bound for
        labelled cells too, the classifier sees the mean of q(z | x), and the KL of z is not annealed.
    **options
        Of `SCVI`.

    References
    ----------
    Xu, Lopez, Mehlman, Regier, Jordan, Yosef. Probabilistic harmonization and annotation of single-cell
    transcriptomics data with deep generative models. Molecular Systems Biology 17 (2021).
    """

    slots: ClassVar = {
        "z": "obsm/X_scANVI",
        "library": "obs/scanvi_log_library",
        "rho": "layers/scanvi_normalized",
        "y_unobserved": "obs/scanvi_label",
    }
    label = "y_unobserved"
    # Fewer steps than scVI: what the classifier learns of the labelled cells after that is theirs alone.
    plan = Plan(steps=1500, max_epochs=60)
    temperature: Tensor

    def __init__(
        self,
        registry: Registry,
        classification_weight: float = 50.0,
        linear_classifier: bool = False,
        reference_objective: bool = False,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        norm: Norm = "layer",
        **options: Any,
    ) -> None:
        if not registry.given("labels"):
            raise ValueError("SCANVI learns from labels of some cells; name their column: labels_key=")
        shape: dict[str, Any] = {"n_hidden": n_hidden, "n_latent": n_latent, "n_layers": n_layers}
        super().__init__(registry, **shape, dropout_rate=dropout_rate, norm=norm, **options)
        if self.logistic_normal:
            raise ValueError("SCANVI's latent space is Normal; leave out latent_distribution")
        self.n_types = registry.n_categories("labels")
        if self.n_types < 2:
            raise ValueError(
                f"SCANVI needs two cell types or more; obs['{registry.keys('labels')[0]}'] has "
                f"{self.n_types} beside unlabelled cells"
            )
        if classification_weight < 0:
            raise ValueError(f"classification_weight is not negative; got {classification_weight}")
        self.classification_weight = classification_weight
        self.reference = reference_objective
        if reference_objective:
            self.annealed = ("z2", "y_unobserved")
        types = CovariateSpec((("labels", None, self.n_types),), 0)
        size: dict[str, Any] = {"n_hidden": n_hidden, "n_layers": n_layers, "covariates": types, "norm": norm}
        self.z2_encoder = NormalEncoder(n_latent, n_latent, dropout=dropout_rate, **size)
        floor = 0.0 if reference_objective else 1e-4
        self.z_prior = NormalEncoder(n_latent, n_latent, dropout=0.0, floor=floor, **size)
        if linear_classifier:
            self.classifier: nn.Module = nn.Linear(n_latent, self.n_types)
        else:
            self.classifier = nn.Sequential(
                MLP(n_latent, n_hidden, n_layers, norm=norm, dropout=dropout_rate),
                nn.Linear(n_hidden, self.n_types),
            )
        self.register_buffer("temperature", torch.ones(()))
        self._labelled_of: tuple[np.ndarray, np.ndarray] | None = None

    # -- the math -------------------------------------------------------------------------------------

    def _latent_prior(self, x: Tensor, labels: Tensor) -> Tensor:
        labels = self._observed(labels)
        uniform = dist.Categorical(logits=x.new_zeros(self.n_types))
        y = pyro.sample("y", uniform, obs=labels.clamp(min=0), obs_mask=_mask(labels >= 0))
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
        return pyro.sample("z", dist.Normal(*self.z_prior(z2, _type_row(y, z2))).to_event(1))

    def _latent_guide(self, features: Tensor, covariates: Covariates | None, labels: Tensor) -> Tensor:
        labels = self._observed(labels)
        z = pyro.sample("z", dist.Normal(*self.encoder(features, covariates)).to_event(1))
        with poutine.mask(mask=_mask(labels < 0)):
            q = dist.Categorical(logits=self.classifier(z))
            y = pyro.sample("y_unobserved", q, infer={"enumerate": "parallel"})
        y = torch.where(labels < 0, y, labels)
        pyro.sample("z2", dist.Normal(*self.z2_encoder(z, _type_row(y, z))).to_event(1))
        return z

    def _observed(self, labels: Tensor) -> Tensor:
        """Codes of the labels that the bound observes; -1 for the others."""
        return torch.full_like(labels, -1) if self.reference else labels

    def auxiliary(
        self, batch: dict[str, Tensor], sites: dict[str, Tensor], step: int, kl_weight: float
    ) -> dict[str, Tensor]:
        """Cross-entropy of the classifier on labelled cells."""
        labels = batch["labels"]
        known = labels >= 0
        z = self._posterior_of_z(batch)[0] if self.reference else sites["z"]
        z, labels = z[known], labels[known]
        lacking = min(_LABELLED, len(self._labelled())) - len(labels)
        if lacking > 0:  # few labels: the minibatch brings too few of them, or none
            chosen = torch.randint(len(self._labelled()), (lacking,)).numpy()
            more = load_batch(self.datasets, {MAIN: self._labelled()[chosen]}, z.device)
            with self.minibatch(more):
                loc, scale = self._posterior_of_z(more)
            drawn = loc if self.reference else loc + scale * torch.randn_like(loc)
            z, labels = torch.cat([z, drawn]), torch.cat([labels, more["labels"]])
        if not len(labels):
            return {}
        return {"classification": self.classification_weight * F.cross_entropy(self.classifier(z), labels)}

    def _posterior_of_z(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x) in the minibatch at hand."""
        covariates = None
        if self.encode_covariates:
            rows = self._batch_rows(RandomEffects.means)
            categorical, continuous = batch["categorical_covariates"], batch["continuous_covariates"]
            covariates = self._covariates(batch["batch"], categorical, continuous, rows)
        x = self.filled("x", batch["x"])
        return self.encoder(x.log1p() if self.log_input else x, covariates)

    def _labelled(self) -> np.ndarray:
        """Rows of the labelled cells that train."""
        rows = self.split[MAIN][0]
        if self._labelled_of is None or self._labelled_of[0] is not rows:
            codes = self.datasets[MAIN].codes("labels")[rows]
            self._labelled_of = rows, rows[codes >= 0]
        return self._labelled_of[1]

    # -- calibration ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Temperature of the classifier (Guo et al., 2017), from the labelled cells that are held out."""
        rows = self.split[MAIN][1]
        dataset = self.datasets[MAIN]
        codes = dataset.codes("labels")[rows]
        rows, codes = rows[codes >= 0], codes[codes >= 0]
        if len(rows):
            parts = []
            for _, batch in self.batches(dataset, rows):
                with torch.no_grad(), self.minibatch(batch):
                    parts.append(self.classifier(self._posterior_of_z(batch)[0]))
            self.temperature.fill_(fit_temperature(torch.cat(parts), torch.as_tensor(codes)))

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities at the temperature found."""
        warm = probabilities ** (1 / float(self.temperature))
        return warm / warm.sum(1, keepdims=True)

    # -- from scVI ------------------------------------------------------------------------------------

    @classmethod
    def from_scvi_model(
        cls,
        scvi: SCVI,
        labels_key: str | None = None,
        *,
        unlabeled_category: str | None = None,
        adata: AnnData | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """A model that starts from a trained `SCVI`: its networks, its data and its held-out cells.

        Parameters
        ----------
        scvi
            Trained model.
        labels_key
            Column of ``obs`` with the labels; default the one that `scvi` was made with.
        unlabeled_category
            Value of the labels that means unlabelled.
        adata
            Cells, where `scvi` was loaded without; the same ones in the same order.
        seed
            Of the new weights.
        **options
            Of SCANVI that SCVI does not have, such as ``classification_weight``.

        Returns
        -------
        SCANVI
            Not trained yet; `fit` takes half of the steps that a fit from scratch takes, without warm-up.
        """
        if chosen := sorted(set(options) & set(scvi.config)):
            raise TypeError(f"{', '.join(chosen)} was chosen when the {type(scvi).__name__} was made")
        keys = scvi.registry.keywords(scvi.fields()) | ({"labels_key": labels_key} if labels_key else {})
        model = cls.from_anndata(
            scvi.dataset(adata).data,
            unlabeled_category=unlabeled_category,
            seed=seed,
            **keys,
            **scvi.config,
            **options,
        )
        before, state = scvi.state_dict(), model.state_dict()
        if odd := [k for k in before if k not in state or before[k].shape != state[k].shape]:
            raise ValueError(
                f"the weights {listed(odd)} of the {type(scvi).__name__} do not fit these data: it was made "
                "with other genes, categories or labels"
            )
        model.load_state_dict(state | before)
        model.split, model.n_train = dict(scvi.split), dict(scvi.n_train)
        model.plan = replace(
            cls.plan, steps=cls.plan.steps // 2, max_epochs=cls.plan.max_epochs // 2, warmup=0.0
        )
        return model


def _mask(mask: Tensor) -> Any:
    """For Pyro's annotations, which name a class that tensors are not of."""
    return mask


def _type_row(y: Tensor, like: Tensor) -> Covariates:
    return Covariates((y,), like.new_zeros(0))
