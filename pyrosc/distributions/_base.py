"""What the count laws have in common: parameters, shapes, quick validation, and ``to_event`` that sums."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions.torch
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

Shape = torch.Size | list[int] | tuple[int, ...]
SCALAR = torch.Size()

# Poisson draws in floating point are counts only up to here; larger rates are cut.
MAX_RATE = 1e8


class _Real(constraints._Real):
    """As ``constraints.real``, but one reduction when there is no NaN."""

    def check(self, value: Tensor) -> Tensor:
        if not bool(value.detach().sum().isnan()):
            return torch.ones((), dtype=torch.bool, device=value.device)
        return super().check(value)


class _GreaterThan(constraints.greater_than):
    """As ``constraints.greater_than``, but one reduction when all is well."""

    def check(self, value: Tensor) -> Tensor:
        if value.numel() and bool(value.detach().amin() > self.lower_bound):
            return torch.ones((), dtype=torch.bool, device=value.device)
        return super().check(value)


class _GreaterThanEq(constraints.greater_than_eq):
    """As ``constraints.greater_than_eq``, but one reduction when all is well."""

    def check(self, value: Tensor) -> Tensor:
        if value.numel() and bool(value.detach().amin() >= self.lower_bound):
            return torch.ones((), dtype=torch.bool, device=value.device)
        return super().check(value)


real = _Real()
positive = _GreaterThan(lower_bound=0.0)
nonnegative = _GreaterThanEq(lower_bound=0.0)


def as_tensors(**args: Any) -> dict[str, Tensor]:
    """Turn the arguments given (not None) into tensors of one floating dtype and device."""
    given = {name: arg for name, arg in args.items() if arg is not None}
    tensors = [arg for arg in given.values() if isinstance(arg, Tensor)]
    floats = [arg for arg in tensors if arg.is_floating_point()]
    dtype = floats[0].dtype if floats else torch.get_default_dtype()
    device = tensors[0].device if tensors else None
    return {
        name: (arg if arg.is_floating_point() else arg.to(dtype))
        if isinstance(arg, Tensor)
        else torch.as_tensor(arg, dtype=dtype, device=device)
        for name, arg in given.items()
    }


def exactly_one(args: dict[str, Any], *names: str) -> None:
    """Raise unless exactly one of the named arguments was given."""
    given = [name for name in names if args.get(name) is not None]
    if len(given) != 1:
        wanted = " and ".join(f"`{name}`" for name in names)
        raise ValueError(f"give exactly one of {wanted}, got {len(given)}")


class CountIndependent(pyro.distributions.torch.Independent):
    """Independent counts whose log-probability is summed inside the kernel."""

    base_dist: CountDistribution

    def log_prob(self, value: Tensor) -> Tensor:
        base = self.base_dist
        if base._validate_args:
            base._validate_sample(value)
        return base._log_prob(value, self.reinterpreted_batch_ndims)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> TorchDistribution:
        more = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return self.base_dist.to_event(self.reinterpreted_batch_ndims + more)


class CountDistribution(TorchDistribution):
    """Base class of laws of counts 0, 1, 2, ...

    A subclass keeps its tensors unexpanded in ``_args`` (so that gradients are reduced in the kernel, not by
    an expanded view), names those that are attributes, and writes ``_log_prob(value, event_ndims)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False
    support = constraints.nonnegative_integer
    _args: dict[str, Tensor]

    def _setup(self, args: dict[str, Tensor], batch_shape: torch.Size, validate_args: bool | None) -> None:
        self._args = args
        self.__dict__.update(args)  # validated as given, shown expanded
        super().__init__(batch_shape, torch.Size(), validate_args=validate_args)
        self._show(batch_shape)

    def _show(self, batch_shape: torch.Size) -> None:
        self.__dict__.update({name: arg.expand(batch_shape) for name, arg in self._args.items()})

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """The same law with its batch dimensions broadcast to ``batch_shape``; nothing is copied."""
        batch_shape = torch.Size(batch_shape)
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new._args = self._args
        TorchDistribution.__init__(new, batch_shape, torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        new._show(batch_shape)
        self._expand_parts(new, batch_shape)
        return new

    def _expand_parts(self, new: Any, batch_shape: torch.Size) -> None:
        """For subclasses that hold other distributions."""

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by name, each of the batch shape; logarithms are left out."""
        return {name: getattr(self, name) for name in self.arg_constraints if not name.startswith("log_")}

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> TorchDistribution:
        """As in Pyro; the log-probability of the result is summed inside the kernel."""
        ndims = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return super().to_event(ndims) if ndims <= 0 else CountIndependent(self, ndims)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass at ``value``, entry by entry.

        Parameters
        ----------
        value
            Counts, broadcastable to the batch shape. Fractional values are scored by the gamma-function
            formula when validation is off.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value, 0)

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        raise NotImplementedError

    def _validate_sample(self, value: Tensor) -> None:
        if self._plainly_valid(value):
            return
        super()._validate_sample(value)

    def _plainly_valid(self, value: Tensor) -> bool:
        """Quick test that all is well; when it fails, the library's own checks find and word the error."""
        if not isinstance(value, Tensor) or not value.numel() or value.is_complex():
            return False
        try:
            torch.broadcast_shapes(value.shape, self.batch_shape)
        except RuntimeError:
            return False
        low, high = torch.aminmax(value.detach())
        if not (float(low) >= 0 and float(high) < float("inf")):
            return False
        return not value.is_floating_point() or torch.equal(value.trunc(), value)
