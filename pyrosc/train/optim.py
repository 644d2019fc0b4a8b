"""Optimisers of a model: fused Adam, a sparse one for per-cell rows, one per auxiliary objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyrosc.nn import CellTable

if TYPE_CHECKING:
    from pyrosc.models.base import Model
    from pyrosc.train.plan import Plan


class Optimizers:
    """Everything that moves parameters.

    Attributes
    ----------
    dense, cells, owned
        Lists of parameters: of the main objective, per-cell rows, and by auxiliary objective.
    """

    def __init__(self, model: Model, plan: Plan) -> None:
        self.owned = {
            name: [p for p in model.get_submodule(module).parameters() if p.requires_grad]
            for name, module in model.owners.items()
        }
        taken = {id(p) for group in self.owned.values() for p in group}
        self.cells = [p for p in _cell_parameters(model) if p.requires_grad]
        taken |= {id(p) for p in self.cells}
        self.dense = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        self.clip = plan.clip
        self.main: list[torch.optim.Optimizer] = []
        if self.dense:
            self.main.append(_adam(_groups(model, self.dense), plan))
        if self.cells:
            self.main.append(torch.optim.SparseAdam(self.cells, plan.lr, plan.betas, plan.eps))
        self.aside = {name: _adam([{"params": group}], plan) for name, group in self.owned.items() if group}
        if not self.main and not self.aside:
            raise ValueError(f"{type(model).__name__} has no parameter to train")

    def all(self) -> list[torch.optim.Optimizer]:
        """Every optimiser, in a fixed order."""
        return [*self.main, *self.aside.values()]

    def set_lr(self, lr: float) -> None:
        """Learning rate of all, times each group's factor."""
        for optimizer in self.all():
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0)

    def step(self, loss: Tensor, owned: Mapping[str, Tensor]) -> None:
        """One step on the main loss, and one of each auxiliary objective on its own parameters.

        The gradient of an auxiliary objective is taken at the same site values, before the main step, and
        does not reach parameters of others.
        """
        aside = {
            name: torch.autograd.grad(value, self.owned[name], retain_graph=True, allow_unused=True)
            for name, value in owned.items()
        }
        for optimizer in self.all():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.cells:
            if parameter.grad is not None and not parameter.grad.is_sparse:  # of an AutoGuide
                index = parameter.grad.reshape(len(parameter), -1).any(1).nonzero()[:, 0]
                parameter.grad = torch.sparse_coo_tensor(
                    index[None], parameter.grad[index], parameter.shape, check_invariants=False
                )
        if self.clip is not None and self.dense:
            nn.utils.clip_grad_norm_(self.dense, self.clip)
        for name, gradients in aside.items():
            for parameter, gradient in zip(self.owned[name], gradients, strict=True):
                parameter.grad = gradient
        for optimizer in self.main:
            optimizer.step()
        for name in aside:
            self.aside[name].step()


def _groups(model: Model, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters by the factor of their learning rate (`Model.rates`), and whether they decay."""
    factors = {
        id(p): factor for name, factor in model.rates.items() for p in model.get_submodule(name).parameters()
    }
    free = {id(p) for name in model.undecayed for p in model.get_submodule(name).parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = factors.get(id(parameter), 1.0), id(parameter) in free
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "factor": factor, **({"weight_decay": 0.0} if still else {})}
        for (factor, still), members in groups.items()
    ]


def _adam(groups: list[dict[str, Any]], plan: Plan) -> torch.optim.Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.Adam(
        groups, plan.lr, plan.betas, plan.eps, weight_decay=plan.weight_decay, fused=fused
    )


def _cell_parameters(model: Model) -> list[nn.Parameter]:
    """Parameters with a row per cell: of `CellTable` blocks, and of AutoGuides over local sites."""
    found = [m.rows for m in model.modules() if isinstance(m, CellTable)]
    if model.per_cell_guide:
        local = set(model.latent_sites(local=True))
        n = set(model.n_train.values())
        for name, parameter in model.auto_guide.named_parameters():
            site = name.rsplit(".", 1)[-1].removesuffix("_unconstrained")
            if site in local and parameter.ndim and parameter.shape[0] in n:
                found.append(parameter)
    return found
