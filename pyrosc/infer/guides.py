"""Guides made from a model: encoders for its cells, Pyro's AutoGuides for its global sites."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrosc.infer.handlers import Fix, cells_plate, is_latent, source_of
from pyrosc.infer.structure import prototype
from pyrosc.nn import MLP, CovariateSpec

if TYPE_CHECKING:
    from pyrosc.models.base import Model

_ENCODED = ("counts", "protein", "values")
_COVARIATES = ("categorical", "categoricals", "continuous", "continuouses")


def scoped() -> Any:
    """Context in which Pyro modules keep their parameters to themselves, not in the global store."""
    return pyro.settings.context(module_local_params=True)


class ScopedGuide(nn.Module):
    """A Pyro AutoGuide that keeps its parameters to itself.

    Parameters
    ----------
    make
        An AutoGuide class, or any function of a model function that returns an AutoGuide.
    function
        The model function.
    plates
        Makes the plates that the guide subsamples, from the model's arguments.
    """

    def __init__(
        self,
        make: Callable[..., AutoGuide],
        function: Callable[..., Any],
        plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        with scoped():
            self.inner = make(function, create_plates=plates) if plates else make(function)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the guide."""
        with scoped():
            return self.inner(*args, **kwargs)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Put a point estimate (`AutoDelta`, once it has been run) at these values, by site."""
        with scoped(), torch.no_grad():
            for name, value in values.items():
                setattr(self.inner, name, value)


class Amortized(nn.Module):
    """A guide from a model: q(local | x) by encoders, q(global) by an AutoGuide.

    Every continuous latent site inside the plate over cells gets a Normal in unconstrained space whose
    mean and standard deviation a network computes from the cell's log1p counts and covariates; the sites
    share the network's hidden layers and are independent given the data (mean field). Global sites get
    one factor each. Discrete sites are left to enumeration.

    Parameters
    ----------
    model
        The model; its ``model`` is run once on made-up cells to find the sites.
    n_hidden, n_layers, dropout
        Of the network.
    encode_covariates
        Whether the network takes covariates.
    global_guide
        ``"normal"`` (`AutoNormal`) or ``"delta"`` (`AutoDelta`, a MAP estimate).

    Raises
    ------
    ValueError
        If a local site has a support with no map from the reals.
    """

    def __init__(
        self,
        model: Model,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        encode_covariates: bool = False,
        global_guide: Literal["normal", "delta"] = "normal",
    ) -> None:
        super().__init__()
        self._owner = (model,)  # a tuple, so that the model is not a submodule of its own guide
        trace = prototype(model)
        self.transforms: dict[str, Any] = {}
        self.event_dims: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.plates: dict[str, str] = {}
        sources: dict[str, str] = {}
        global_sites = []
        for name, site in trace.nodes.items():
            if not is_latent(site):
                continue
            source = source_of(site)
            if source is None:
                global_sites.append(name)
            elif not _is_discrete(site["fn"]):
                self._add(name, site, cells_plate(source))
                sources[name] = source
        self.networks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        self.sources = sources
        self.inputs: dict[str, list[str]] = {}
        self.specs: dict[str, CovariateSpec] = {}
        for source in dict.fromkeys(sources.values()):
            fields = model.registries[source].fields
            registry = model.registries[source]
            self.inputs[source] = [n for n, s in fields.items() if s.kind in _ENCODED]
            width = sum(registry.n_vars(n) for n in self.inputs[source])
            covariates = [n for n, s in fields.items() if s.kind in _COVARIATES] if encode_covariates else []
            self.specs[source] = CovariateSpec.from_registry(registry, *covariates)
            self.networks[source] = MLP(width, n_hidden, n_layers, self.specs[source], dropout=dropout)
        for name, shape in self.shapes.items():
            self.heads[name] = nn.Linear(n_hidden, 2 * max(1, shape.numel()))  # type: ignore[attr-defined]
        self.globals: ScopedGuide | None = None
        if global_sites:
            make = {"normal": AutoNormal, "delta": AutoDelta}[global_guide]
            self.globals = ScopedGuide(make, poutine.block(starting(model), expose=global_sites))

    def _add(self, name: str, site: Any, plate: str) -> None:
        fn = site["fn"]
        try:
            transform = biject_to(fn.support)
        except NotImplementedError:
            raise ValueError(
                f"site '{name}' has a support ({fn.support}) that no encoder can reach"
            ) from None
        shape = transform.inverse_shape(torch.Size(fn.event_shape))
        self.transforms[name] = transform
        self.shapes[name] = shape
        self.event_dims[name] = len(fn.event_shape)
        self.plates[name] = plate

    def forward(self, **inputs: Tensor) -> None:
        """Sample the guide, with the model's arguments."""
        (model,) = self._owner
        if self.globals is not None:
            self.globals(**inputs)
        for source, network in self.networks.items():
            registry = model.registries[source]
            names = [n for n, s in self.sources.items() if s == source]
            features = torch.cat([self._features(registry, n, inputs[n]) for n in self.inputs[source]], -1)
            spec = self.specs[source]
            taken = {f: inputs[f] for f in registry.fields if registry.fields[f].kind in _COVARIATES}
            covariates = spec.pack(taken) if (spec.categorical or spec.n_continuous) else None
            h = network(features, covariates)
            with model.cells(features, source=source):
                for name in names:
                    pyro.sample(name, self._distribution(name, self.heads[name](h)))

    @staticmethod
    def _features(registry: Any, name: str, x: Tensor) -> Tensor:
        return x if registry.fields[name].kind == "values" else x.clamp(min=0).log1p()

    def _distribution(self, name: str, parameters: Tensor) -> Any:
        loc, log_variance = parameters.chunk(2, -1)
        shape = parameters.shape[:-1] + self.shapes[name]
        normal = dist.Normal(loc.reshape(shape), (log_variance.exp() + 1e-4).sqrt().reshape(shape))
        normal = normal.to_event(len(self.shapes[name]))
        if _is_real(self.transforms[name]):
            return normal
        return dist.TransformedDistribution(normal, [self.transforms[name]])


def starting(model: Model) -> Callable[..., Any]:
    """The model function with its latent sites at the model's starting values, as AutoGuides take them."""
    return Fix(model.starting_values())(model.model)


def _is_real(transform: Any) -> bool:
    base = getattr(transform, "base_transform", transform)
    parts = getattr(base, "parts", None)
    return parts == [] if parts is not None else False


def _is_discrete(fn: Any) -> bool:
    return bool(getattr(fn.support, "is_discrete", False))


def auto(
    model: Callable[..., Any] | type[Model],
    guide: Callable[..., AutoGuide] | type[Amortized] = AutoNormal,
    *,
    name: str | None = None,
    **attributes: Any,
) -> type[Model]:
    """A model class from a function (or another model) and an AutoGuide, for prototyping.

    Parameters
    ----------
    model
        Function with annotated arguments, as the ``model`` method of a model: ``def f(x: Counts)``, or
        ``def f(self, x: Counts)`` to use ``self.registry``. It opens the plate over the minibatch's cells by
        ``with pyrosc.cells(x):``. Or a model class, whose guide is replaced.
    guide
        A class of ``pyro.infer.autoguide``, a function of a model function that returns such a guide
        (``lambda m: AutoLowRankMultivariateNormal(m, rank=5)``), or `Amortized`. A guide that gives each
        cell parameters of its own (any but `Amortized`, for local sites) trains on all cells.
    name
        Name of the class; default the function's.
    **attributes
        Class attributes: ``slots=``, ``latent=``, ``expression=``, ``elbo=``, ``plan=``.

    Returns
    -------
    type
        A subclass of `Model`: ``auto(f).from_anndata(adata).fit()``.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> import pyrosc
    >>> from pyrosc.data import Counts
    >>> def rates(x: Counts):
    ...     with pyro.plate("genes", x.shape[-1]):
    ...         rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    ...     with pyrosc.cells(x):
    ...         pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)
    >>> Rates = pyrosc.auto(rates)
    >>> Rates.__name__
    'rates'
    """
    from pyrosc.models.base import Model

    if isinstance(model, type) and issubclass(model, Model):
        base: type[Model] = model
        members: dict[str, Any] = {}
        title = name or f"{model.__name__}{getattr(guide, '__name__', 'Guide')}"
    else:
        base = Model
        title = name or str(getattr(model, "__name__", "AutoModel"))
        members = {"model": model if "self" in inspect.signature(model).parameters else _without_self(model)}
        members["__doc__"] = inspect.getdoc(model)

    make: Any = guide
    made_by = getattr(guide, "func", guide)  # of a functools.partial
    if isinstance(made_by, type) and issubclass(made_by, Amortized):

        def setup(self: Model) -> Model:
            if not hasattr(self, "auto_guide"):
                self.auto_guide = make(self)
            return super(made, self).setup()  # type: ignore[misc]
    else:

        def setup(self: Model) -> Model:
            if not hasattr(self, "auto_guide"):
                summed_out = self.summed_out
                local = set(self.latent_sites(local=True)) - summed_out
                plates = (lambda **inputs: _plates(self, inputs)) if local else None
                function = starting(self)
                if summed_out:
                    function = poutine.block(function, hide=sorted(summed_out))
                self.auto_guide = ScopedGuide(make, function, plates)
                self.per_cell_guide = bool(local)
            return super(made, self).setup()  # type: ignore[misc]

    members |= {"setup": setup, "guide": Model.guide, "__module__": __name__, **attributes}
    made: type[Model] = type(base)(title, (base,), members)  # type: ignore[misc]
    return made


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    def model(self: Model, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    model.__wrapped__ = function  # type: ignore[attr-defined]
    return model


def _plates(model: Model, inputs: Mapping[str, Tensor]) -> list[Any]:
    out = []
    for source, registry in model.registries.items():
        first = next(iter(registry.fields))
        out.append(model.cells(inputs[first], source=source))
    return out


__all__ = ["Amortized", "ScopedGuide", "auto", "scoped"]
