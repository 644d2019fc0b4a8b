"""A self-contained HTML page: no script, no request, readable on paper and in the dark."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What marks a page as one of ours, so that it may be replaced.
GENERATOR = "pyrosc report"
_DPI = 144
_MINUS = "\N{MINUS SIGN}"
_ODD = {math.inf: "\N{INFINITY}", -math.inf: "-\N{INFINITY}"}

Level = Literal["good", "note", "bad"]
_SIGNS: dict[Level, tuple[str, str]] = {
    "good": ("\N{CHECK MARK}", "fine"),
    "note": ("\N{BULLET}", "to know"),
    "bad": ("!", "to look at"),
}


@dataclass(frozen=True)
class Verdict:
    """A finding in plain words.

    Attributes
    ----------
    level
        ``"good"``, ``"note"`` or ``"bad"``.
    text
        What was found.
    advice
        What to try; empty for nothing.
    """

    level: Level
    text: str
    advice: str = ""


@dataclass
class Section:
    """A part of the page: a title and pieces of HTML."""

    title: str
    body: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    def say(self, *paragraphs: str) -> None:
        """Paragraphs of plain text."""
        self.body += [f"<p>{html.escape(p)}</p>" for p in paragraphs]

    def judge(self, level: Level, text: str, advice: str = "") -> None:
        """A finding, here and in the summary."""
        self.verdicts.append(Verdict(level, text, advice))
        self.body.append(_verdict(self.verdicts[-1]))

    def facts(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Names and values."""
        cells = "".join(
            f"<tr><th scope='row'>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in rows
        )
        self.body.append(f"<div class='scroll'><table class='facts'>{cells}</table></div>")

    def table(
        self, frame: pd.DataFrame, caption: str, *, digits: int = 3, folded: bool = False, index: bool = True
    ) -> None:
        """A table; the largest number of a column has `digits` significant digits."""
        text = _table(frame, caption, digits, index)
        if folded:
            inner = _table(frame, "", digits, index)
            text = f"<details><summary>{html.escape(caption)}</summary>{inner}</details>"
        self.body.append(text)

    def figures(
        self, *drawn: tuple[Callable[[Axes], Any], tuple[float, float], str], small: bool = False
    ) -> None:
        """Pictures side by side where there is room: what draws into axes, inches, caption.

        Small ones are many in a row, and their captions are for those who do not see them.
        """
        kind = "figures small" if small else "figures"
        self.body.append(f"<div class='{kind}'>{''.join(figure(*d) for d in drawn)}</div>")


def figure(draw: Callable[[Axes], Any], size: tuple[float, float], caption: str) -> str:
    """A picture of one panel as a data URI."""
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    made.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    draw(made.subplots())
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=_DPI)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = (round(v * 96) for v in made.get_size_inches())
    text = html.escape(caption)
    return (
        f"<figure><img src='data:image/png;base64,{data}' alt='{text}' "
        f"width='{width}' height='{height}'><figcaption>{text}</figcaption></figure>"
    )


def page(title: str, subtitle: str, sections: Sequence[Section], left_out: Sequence[tuple[str, str]]) -> str:
    """The whole page."""
    found = [v for s in sections for v in s.verdicts]
    order: tuple[Level, ...] = ("bad", "note", "good")
    summary = "".join(
        f"<a href='#{html.escape(s.anchor)}'>{_verdict(v)}</a>"
        for level in order
        for s in sections
        for v in s.verdicts
        if v.level == level
    )
    counts = ", ".join(
        f"{n} {_SIGNS[level][1]}" for level in order if (n := sum(v.level == level for v in found))
    )
    links = "".join(f"<a href='#{html.escape(s.anchor)}'>{html.escape(s.title)}</a>" for s in sections)
    body = "".join(
        f"<section id='{html.escape(s.anchor)}'><h2>{html.escape(s.title)}</h2>{''.join(s.body)}</section>"
        for s in sections
    )
    omitted = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(reason)}</li>" for name, reason in left_out
    )
    if omitted:
        body += f"<section id='left-out'><h2>Left out</h2><ul class='omitted'>{omitted}</ul></section>"
    safe = html.escape(title)
    style = (resources.files(__package__) / "page.css").read_text(encoding="utf-8")
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='generator' content='{GENERATOR}'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        "<link rel='icon' href='data:,'>"
        f"<title>{safe}</title><style>{style}</style></head><body>"
        f"<header><h1>{safe}</h1><p class='subtitle'>{html.escape(subtitle)}</p><nav>{links}</nav></header>"
        f"<main><section id='summary'><h2>In short</h2><p>{html.escape(counts) or 'no finding'}</p>"
        f"<div class='summary'>{summary}</div></section>{body}</main></body></html>\n"
    )


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file that is not a report, unless told to; before any work.

    Raises
    ------
    FileExistsError
        If there is such a file.
    IsADirectoryError
        If it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.exists() or overwrite:
        return
    with open(path, "rb") as file:
        start = file.read(400)
    if f"content='{GENERATOR}'".encode() not in start:
        raise FileExistsError(
            f"{path} exists and is not a report of pyrosc; pass overwrite=True to replace it"
        )


def write(path: Path, text: str) -> None:
    """Write in one step: an earlier file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _verdict(found: Verdict) -> str:
    sign, meaning = _SIGNS[found.level]
    advice = f"<span class='advice'>{html.escape(found.advice)}</span>" if found.advice else ""
    return (
        f"<div class='verdict {found.level}'>"
        f"<span class='sign' role='img' aria-label='{meaning}'>{sign}</span>"
        f"<span>{html.escape(found.text)}{advice}</span></div>"
    )


def _table(frame: pd.DataFrame, caption: str, digits: int, index: bool) -> str:
    shown = frame.reset_index() if index else frame
    head = "".join(f"<th scope='col'>{html.escape(str(c))}</th>" for c in shown.columns)
    columns = [_cells(shown.iloc[:, i], digits) for i in range(shown.shape[1])]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f"<div class='scroll'><table>{title}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cells(column: pd.Series, digits: int) -> list[str]:
    """Cells of a column of a table; numbers with as many decimals as its largest needs."""
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return [f"<td>{html.escape(str(v))}</td>" for v in column]
    values = column.to_numpy(float)
    decimals = 0
    if not pd.api.types.is_integer_dtype(column):
        finite = np.abs(values[np.isfinite(values)])
        top = float(finite.max()) if len(finite) else 1.0
        decimals = max(0, digits - 1 - math.floor(math.log10(max(top, 1e-3))))
    texts = [f"{v:,.{decimals}f}" if math.isfinite(v) else _ODD.get(v, "\N{EN DASH}") for v in values]
    return [f"<td class='number'>{t.replace('-', _MINUS)}</td>" for t in texts]
