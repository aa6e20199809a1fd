"""The frame of a page: a template filled with escaped parts, its style, script and data, and what it may load."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from attackroute.report.fragments import inlined_json, text

_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
)
_SCRIPTS = (  # one after another, as one script
    "route_numbers.js", "route_columns.js", "route_drawing.js", "route_panel.js", "route_controls.js", "route_view.js",
    "page.js",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        key: Its address in the page.
        title: Its heading.
        html: What it holds.
    """

    key: str
    title: str
    html: str


@dataclass(frozen=True)
class Frame:
    """What stands around the parts, as plain text.

    Attributes:
        title: Of the page.
        subtitle: One line below it.
        lead: What a first reader must know.
        footer: The last line.
    """

    title: str
    subtitle: str
    lead: str
    footer: str


def framed(frame: Frame, parts: Sequence[Part], data: Mapping[str, Any]) -> str:
    """The whole page, which loads and sends nothing.

    Args:
        frame: What stands around the parts.
        parts: In their order.
        data: What the page holds as JSON.
    """
    script, style = "\n".join(map(_asset, _SCRIPTS)), _asset("report.css")
    links = [(part.key, part.title) for part in parts] + [("values", "Data")]
    return _fill(
        _asset("report.html"),
        {
            "policy": text(_POLICY.format(script=_digest(script), style=_digest(style))),
            "title": text(frame.title),
            "subtitle": text(frame.subtitle),
            "lead": text(frame.lead),
            "links": "\n".join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, title in links),
            "parts": "\n".join(
                f'<section id="{part.key}"><h2>{text(part.title)}</h2>\n{part.html}\n</section>' for part in parts
            ),
            "style": style,
            "script": script,
            "data": inlined_json(data),
            "footer": text(frame.footer),
        },
    )


def view_html(number: int) -> str:
    """A route view, which the page's script fills.

    Args:
        number: Its place among the page's views.
    """
    return _fill(_asset("route.html"), {"number": str(number)})


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """Put the parts in their places, in one pass: what looks like a place inside a part stays as it is."""
    return re.sub(r"\$\{(\w+)\}", lambda match: parts[match[1]], template)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """What the policy allows to run: this text and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
