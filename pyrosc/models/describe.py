"""What a model says of itself: to users in ``repr``, to authors in ``describe``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine

from pyrosc.data.inputs import dummy_batch
from pyrosc.infer.handlers import is_deterministic, is_observed, plates_of
from pyrosc.infer.structure import prototype
from pyrosc.train.history import kept_elbo

if TYPE_CHECKING:
    from pyro.poutine import Trace

    from pyrosc.models.base import Model


def summary(model: Model) -> str:
    """Registered fields, sizes and state, in a few lines."""
    lines = [type(model).__name__]
    for source, registry in model.registries.items():
        prefix = "" if len(model.registries) == 1 else f"[{source}] "
        lines.append(f"  {prefix}{registry.n_obs:,} cells")
        for name, state in registry.fields.items():
            if not state.given:
                continue
            size = ""
            if state.names:
                size = f", {len(state.names):,} features"
            elif state.categories:
                size = ", " + " × ".join(f"{len(c)}" for c in state.categories) + " categories"
            lines.append(
                f"    {name}: {state.where if state.keys or state.kind == 'counts' else state.kind}{size}"
            )
    changed = {k: v for k, v in model.config.items() if v != _defaults(model).get(k)}
    if changed:
        lines.append("  options: " + ", ".join(f"{k}={v!r}" for k, v in changed.items()))
    n = sum(p.numel() for p in model.parameters())
    lines.append(f"  {n:,} parameters on {model.device}")
    if model.origin is not None:
        lines.append("  from {tool} {version} ({class})".format(**model.origin))
    if not model.trained:
        lines.append("  not trained: call .fit()")
    elif model.history is not None:
        elbo = kept_elbo(model.history)
        held_out = "" if elbo is None else f", held-out ELBO {elbo:.1f}"
        seconds = model.history["seconds"].iloc[-1]
        lines.append(f"  trained for {len(model.history)} epochs ({seconds:.0f} s){held_out}")
    return "\n".join(lines)


def _defaults(model: Model) -> dict[str, object]:
    return {n: p.default for n, p in inspect.signature(type(model).__init__).parameters.items()}


def describe(model: Model) -> str:
    """Table of the sites of model and guide: role, law, plates, shapes."""
    batch = dummy_batch(model.registries, model.device)
    with poutine.block(), torch.random.fork_rng(), torch.no_grad(), model.minibatch(batch):
        guide = poutine.trace(model.guided).get_trace(**model.inputs(batch))
    rows = [
        ("site", "role", "law", "plates", "event shape"),
        *_rows(prototype(model), "model"),
        *_rows(guide, "guide"),
    ]
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def _rows(trace: Trace, where: str) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        fn: Any = site["fn"]
        role = "deterministic" if is_deterministic(site) else "observed" if is_observed(site) else "latent"
        law = type(getattr(fn, "base_dist", fn)).__name__
        rows.append(
            (name, f"{where}: {role}", law, ", ".join(plates_of(site)) or "-", str(tuple(fn.event_shape)))
        )
    return rows
