"""The errors and warnings that data can cause, and how names are listed in them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable


class DataError(ValueError):
    """The data do not fit the model; the message names the column, cells or genes and says what to do."""


class DataWarning(UserWarning):
    """The data are usable, but something about them is likely not what was meant."""


def warn(message: str, category: type[Warning] = DataWarning) -> None:
    """Warn at the user's line: that of the first caller outside of the package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "pyrosc":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def listed(names: Iterable[object], most: int = 5) -> str:
    """First `most` names, quoted, and how many more there are.

    Examples
    --------
    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    names = [str(n) for n in names]
    text = ", ".join(repr(n) for n in names[:most])
    return text + (f" and {len(names) - most:,} more" if len(names) > most else "")


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value of the option `name` that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}; not {value!r}")
