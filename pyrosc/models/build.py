"""What happens when a model is made: its options are checked and kept, before its constructor runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from pyrosc.data import MAIN, Registry

if TYPE_CHECKING:
    from pyrosc.models.base import Model


class Built(type):
    """Keeps what a model was built with, so that constructors hold nothing but building."""

    def __init__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> None:
        super().__init__(name, bases, members)
        first, *others = options_of(cls).values()
        # what help() and tab completion show
        cls.__signature__ = inspect.Signature([first, *(p.replace(kind=p.KEYWORD_ONLY) for p in others)])

    def __call__(cls, registry: Registry | Mapping[str, Registry], *args: Any, **kwargs: Any) -> Any:
        self = cls.__new__(cls)  # type: ignore[call-overload]
        nn.Module.__init__(self)
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        bound = signature.bind(self, registry, *args, **kwargs)
        bound.apply_defaults()
        config = dict(list(bound.arguments.items())[2:])
        for kind in signature.parameters.values():
            if kind.kind is inspect.Parameter.VAR_KEYWORD:
                config |= config.pop(kind.name, {})
        try:
            config = json.loads(json.dumps(config))  # as it will be after loading
        except TypeError as error:
            raise TypeError(
                f"{cls.__name__}: options must be JSON values (numbers, text, lists, dicts), so that the "
                f"model can be saved: {error}"
            ) from None
        self.registries = dict(registry) if isinstance(registry, Mapping) else {MAIN: registry}
        self.config = config
        self.n_train = {source: r.n_obs for source, r in self.registries.items()}
        self.__init__(registry, *args, **kwargs)
        return self


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """Options of a model, with those that its ``**options`` pass on to the class it derives from."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found |= {p.name: p for p in named if p.name not in found}
        if not passes_on:
            break
    return found


def reject_unknown(cls: type[Model], options: dict[str, Any], keywords: set[str]) -> None:
    known = [name for name in options_of(cls) if name != "registry"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{cls.__name__} has no option {', '.join(map(repr, unknown))}; it takes the fields "
            f"{', '.join(sorted(keywords))}" + (f" and the options {', '.join(known)}" if known else "")
        )
