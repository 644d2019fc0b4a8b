"""The everyday questions to a trained model, under the names that the field uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyrosc.data.errors import listed
from pyrosc.data.inputs import as_if, as_rows, encode_do
from pyrosc.infer.evaluate import marginal_log_likelihood, parts_per_cell
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import stream, traces
from pyrosc.infer.predictive import counts_site, replicates
from pyrosc.infer.structure import need_site
from pyrosc.tools.annotate import annotate
from pyrosc.tools.de import differential_expression
from pyrosc.tools.predict import predict

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model

Indices = Sequence[int] | np.ndarray | None


class Results:
    """Methods that any model with the sites they need has; rows come out in the order asked for.

    Arguments common to all: `adata`, other cells (default the registered ones; genes are matched by
    name); `indices`, positions or a boolean mask; `batch_size`, cells at a time; `seed` of the draws, for
    which no global generator is touched.
    """

    def get_latent_representation(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        give_mean: bool = True,
        return_dist: bool = False,
        batch_size: int = 512,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent space of the cells.

        Parameters
        ----------
        adata, indices, batch_size, seed
            See `Results`.
        give_mean
            The mean of q(z | x); False gives one draw.
        return_dist
            Mean and standard deviation of q, of the Normal site behind the latent space (for the "ln"
            latent: before the softmax).

        Returns
        -------
        numpy.ndarray or tuple
            (n, n_latent) float32, or two of them.
        """
        need_site(self, self.latent, "the latent space", "latent")
        if return_dist:
            return self._latent_distribution(adata, indices, batch_size)
        n_samples = 0 if give_mean else 1
        found = self.posterior(
            self.latent, adata=adata, indices=indices, n_samples=n_samples, batch_size=batch_size, seed=seed
        )
        return found[self.latent]

    def _latent_distribution(
        self: Any, adata: AnnData | None, indices: Indices, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        site = self.latent if self.latent in self.latent_sites() else f"{self.latent}_raw"
        locs, scales = [], []
        for _, batch in _passes(self, adata, indices, batch_size):
            fn: Any = traces(self, batch)[0].nodes[site]["fn"]
            base = getattr(fn, "base_dist", fn)
            if not hasattr(base, "loc"):
                raise ValueError(
                    f"q({site}) is {type(base).__name__}, which has no mean and standard deviation"
                )
            locs.append(base.loc.cpu().numpy())
            scales.append(base.scale.expand_as(base.loc).cpu().numpy())
        return np.concatenate(locs), np.concatenate(scales)

    def get_normalized_expression(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 0,
        return_mean: bool = True,
        as_numpy: bool = False,
        do: Mapping[str, Any] | None = None,
        batch_size: int = 512,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray:
        """Expression without noise: the share of each gene in a cell's transcripts, times a library size.

        Parameters
        ----------
        adata, indices, batch_size, seed
            See `Results`.
        transform_batch
            Decode the cells as if of this batch; several are averaged.
        gene_list
            Genes wanted, in this order; default all.
        library_size
            Factor, or ``"latent"`` for each cell's own library size.
        n_samples
            Draws from the posterior; 0 decodes its mean.
        return_mean
            Average the draws; False gives an array (n_samples, n, g).
        as_numpy
            An array in place of a DataFrame.
        do
            Further what-if values, as in `posterior`.

        Returns
        -------
        pandas.DataFrame or numpy.ndarray
            (n, g) cells by genes, float32.
        """
        need_site(self, self.expression, "normalised expression", "expression")
        genes, positions = _genes(self, gene_list)
        worlds = as_if(transform_batch, do)
        if not return_mean and n_samples == 0:
            raise ValueError("return_mean=False keeps the draws; ask for some: n_samples=25")
        dataset = self.dataset(adata)
        rows = as_rows(indices, dataset)
        lead = () if return_mean else (n_samples,)
        out = np.zeros((*lead, len(rows), len(genes)), np.float32)
        sites = [self.expression, *(["library"] if library_size == "latent" else [])]
        for what_if in worlds:
            values = stream(
                self,
                sites,
                self.batches(dataset, rows, batch_size),
                n_samples=n_samples,
                reduce="mean" if return_mean else None,
                do=encode_do(self.registry, what_if, len(rows)),
                seed=seed,
            )
            for at, found in values:
                part = found[self.expression][0][..., positions]
                if library_size == "latent":
                    part = part * found["library"][0].exp().reshape(*part.shape[:-1], 1)
                else:
                    part = part * library_size
                out[..., at, :] += part.cpu().numpy() / len(worlds)
        if as_numpy or not return_mean:
            return out
        return pd.DataFrame(out, index=dataset.obs_names[rows], columns=genes)

    def get_latent_library_size(
        self: Any, adata: AnnData | None = None, indices: Indices = None, *, batch_size: int = 512
    ) -> np.ndarray:
        """Library size of each cell, (n,): observed, or exp of the mean of q(log library | x)."""
        need_site(self, "library", "library sizes", None)
        found = self.posterior("library", adata=adata, indices=indices, batch_size=batch_size)
        return np.exp(found["library"]).reshape(-1)

    def get_likelihood_parameters(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        n_samples: int = 0,
        batch_size: int = 512,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Parameters of the law of the counts, such as mean, inverse dispersion and zero-inflation logits.

        Parameters that do not differ between cells come without the cells' axis.

        Parameters
        ----------
        adata, indices, batch_size, seed
            See `Results`.
        n_samples
            Draws to average over; 0 uses the posterior mean.
        """
        parts: dict[str, list[np.ndarray]] = {}
        site = counts_site(self)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for at, batch in _passes(self, adata, indices, batch_size):
                draws = [
                    _parameters(traces(self, batch, min(n_samples, 1))[1].nodes[site]["fn"])
                    for _ in range(max(n_samples, 1))
                ]
                for name in draws[0]:
                    value = torch.stack([d[name] for d in draws]).mean(0) if n_samples > 1 else draws[0][name]
                    shared = draws[0][name].ndim < 2 or (draws[0][name].stride(0) == 0 and len(at) > 1)
                    array = value.detach().cpu().numpy()
                    if not shared:
                        parts.setdefault(name, []).append(array)
                    elif name not in parts:
                        parts[name] = [array[0] if array.ndim > 1 else array]
        return {k: np.concatenate(v) if v[0].ndim > 1 else v[0] for k, v in parts.items()}

    def get_elbo(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        n_samples: int = 1,
        per_cell: bool = False,
        batch_size: int = 512,
        seed: int = 0,
    ) -> float | np.ndarray:
        """ELBO in nats per cell, higher is better; the KL of global sites is shared by the training cells.

        Parameters
        ----------
        adata, indices, batch_size, seed
            See `Results`.
        n_samples
            Draws per cell.
        per_cell
            One value per cell, (n,).
        """
        terms = _terms(self, adata, indices, n_samples, batch_size, seed)
        values = terms["reconstruction"] - terms["kl"] - terms["kl_global"] / sum(self.n_train.values())
        return values if per_cell else float(values.mean())

    def get_reconstruction_error(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        n_samples: int = 1,
        batch_size: int = 512,
        seed: int = 0,
    ) -> float:
        """Negative expected log-likelihood of the counts given the latent sites, nats per cell."""
        return -float(_terms(self, adata, indices, n_samples, batch_size, seed)["reconstruction"].mean())

    def get_marginal_ll(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        n_samples: int = 500,
        per_cell: bool = False,
        batch_size: int = 64,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Importance-weighted log-likelihood log p(x), nats per cell, higher is better.

        A lower bound in expectation that tightens with `n_samples` (Burda, Grosse and Salakhutdinov 2016).

        Parameters
        ----------
        adata, indices, batch_size, seed
            See `Results`.
        n_samples
            Draws per cell.
        per_cell
            One value per cell, (n,).
        """
        values = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _, batch in _passes(self, adata, indices, batch_size):
                values.append(marginal_log_likelihood(self, batch, n_samples, chunk=16).cpu().numpy())
        found = np.concatenate(values)
        return found if per_cell else float(found.mean(dtype=np.float64))

    def posterior_predictive_sample(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        field: str | None = None,
        do: Mapping[str, Any] | None = None,
        batch_size: int = 512,
        seed: int = 0,
    ) -> sp.csr_matrix | list[sp.csr_matrix]:
        """Counts replicated from the posterior: z from q(z | x), then x from its law given z.

        Parameters
        ----------
        adata, indices, batch_size, seed
            See `Results`.
        n_samples
            Replicates of the data.
        gene_list
            Genes (or other features of the field) wanted; default all.
        field
            Which counts, of a model of several modalities, by argument name; default those of the genes.
        do
            What-if values, as in `posterior`.

        Returns
        -------
        scipy.sparse.csr_matrix or list
            (n, g) float32; a list of them where `n_samples` > 1.
        """
        site = counts_site(self) if field is None else field
        if field is not None:
            need_site(self, field, "replicated counts", None)
        _, positions = _genes(self, gene_list, field)
        dataset = self.dataset(adata)
        rows = as_rows(indices, dataset)
        changes = encode_do(self.registry, do, len(rows))
        parts: list[list[sp.csr_matrix]] = [[] for _ in range(n_samples)]
        passes = self.batches(dataset, rows, batch_size)
        for at, _, laws in replicates(self, passes, site, n_samples, do=changes, seed=seed):
            for part, law in zip(parts, laws, strict=True):
                draw = law.sample().reshape(len(at), -1)[:, positions]
                part.append(sp.csr_matrix(draw.cpu().numpy().astype(np.float32)))
        found = [sp.vstack(part, format="csr") for part in parts]
        return found[0] if n_samples == 1 else found

    def predict(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        soft: bool = False,
        batch_size: int = 512,
    ) -> pd.Series | pd.DataFrame:
        """Class of each cell, or with ``soft=True`` its probabilities; see `pyrosc.predict`."""
        return predict(self, adata, indices, soft=soft, batch_size=batch_size)

    def differential_expression(
        self: Any, adata: AnnData | None = None, indices: Indices = None, **options: Any
    ) -> pd.DataFrame:
        """Genes that differ between groups of cells; options as of `pyrosc.differential_expression`."""
        return differential_expression(self, adata, indices, **options)

    def annotate(self: Any, adata: AnnData | None = None, **options: Any) -> AnnData:
        """Write the standard results into an AnnData; all options are those of `pyrosc.annotate`."""
        return annotate(self, adata, **options)


def _passes(
    model: Model, adata: AnnData | None, indices: Indices, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Minibatches with the model in evaluation mode."""
    dataset = model.dataset(adata)
    with evaluating(model):
        yield from model.batches(dataset, as_rows(indices, dataset), batch_size)


def _terms(
    model: Model, adata: AnnData | None, indices: Indices, n_samples: int, batch_size: int, seed: int
) -> dict[str, np.ndarray]:
    if n_samples < 1:
        raise ValueError("the ELBO is an expectation over draws: n_samples is at least 1")
    parts: dict[str, list[np.ndarray]] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _, batch in _passes(model, adata, indices, batch_size):
            for name, value in parts_per_cell(model, batch, n_samples).items():
                parts.setdefault(name, []).append(value.cpu().numpy().astype(np.float64))
    found = {k: np.concatenate(v) for k, v in parts.items() if k != "kl_global"}
    return found | {"kl_global": np.mean(parts["kl_global"])}


def _genes(
    model: Model, wanted: Sequence[str] | None, field: str | None = None
) -> tuple[list[str], slice | np.ndarray]:
    names = model.registry.var_names(field)
    if wanted is None:
        return list(names), slice(None)
    if isinstance(wanted, str):
        raise TypeError(f"gene_list takes a list of genes; write ['{wanted}']")
    position = {n: i for i, n in enumerate(names)}
    absent = [g for g in wanted if g not in position]
    if absent:
        raise KeyError(f"the model has no genes {listed(absent)}")
    return list(wanted), np.array([position[g] for g in wanted], dtype=np.int64)


def _parameters(site: Any) -> dict[str, Tensor]:
    """Parameters of a site's law by name."""
    law = site
    while isinstance(law, (Independent, MaskedDistribution)):
        law = law.base_dist
    if hasattr(law, "parameters"):
        return law.parameters()
    return {name: getattr(law, name) for name in law.arg_constraints}
