"""The part of the page on hardening: accuracies before and after, settings, controls, what became of the route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attackroute.report.accuracies import accuracy_table, records
from attackroute.report.fragments import folded, missing, sentence, table, terms, text
from attackroute.report.run_folder import Document
from attackroute.report.sections import masking

_OPENED = (
    "evaluation",
    "settings",
    "route_changes",
    "folder",
    "penalty_shares",
)  # what is not one setting among others
_TARGETS = {"route": "the route's neurons", "random": "as many random neurons off the route", "all": "all neurons"}
_DEMO = "hardening"  # what the demo's comparison is called, which has no folder of its own
_BEFORE, _AFTER = "before", "after"


def hardening(found: Sequence[Document], rows: int) -> str:
    """Every hardening in the run's folders, those of controls among them."""
    if not found:
        return missing("No network was hardened here; attackroute harden does it.")
    parts = []
    together = _together(found)
    if together:
        parts.append(sentence("Networks before and after fine-tuning, controls beside them:"))
        parts.append(accuracy_table(together, rows))
    for document in found:
        parts.append(_hardening(document, rows, shown=not together))
    return "".join(parts)


def compared_rows(found: Sequence[Document]) -> list[object]:
    """The tables of accuracies that this part shows."""
    return [_mapping(document.content.get("evaluation")).get("rows") for document in found]


def _together(found: Sequence[Document]) -> list[Mapping[str, Any]]:
    """Several hardenings of one network side by side: before once, and each one's after under its name."""
    if len(found) < 2:
        return []
    joined: list[Mapping[str, Any]] = []
    start: dict[object, object] = {}
    for number, document in enumerate(found):
        for row in records(_mapping(document.content.get("evaluation")).get("rows")):
            model, key = row.get("model"), (row.get("attack"), row.get("samples"))
            if model == _BEFORE:
                if start.setdefault(key, row.get("correct")) != row.get("correct"):
                    return []  # of another network, or on other images
                if number:
                    continue
            joined.append({**row, "model": document.name if model == _AFTER else model})
    return joined


def _hardening(document: Document, rows: int, *, shown: bool) -> str:
    content = document.content
    compared = _mapping(content.get("evaluation"))
    settings = _mapping(content.get("settings"))
    heading = "" if document.name == _DEMO else f"<h3>{text(document.name)}</h3>"
    parts = [heading, sentence(_told(content, settings))]
    listed = records(compared.get("rows"))
    if not listed:
        parts.append(missing("Before and after were not compared: there were no test images."))
    elif shown:
        parts.append(accuracy_table(listed, rows))
    if listed and compared.get("checks"):
        parts.append(masking(compared.get("checks"), rows))
    elif listed:
        parts.append(
            missing(
                "No check for masked gradients was made here, so accuracies after hardening may be too high; "
                "attackroute evaluate makes them."
            )
        )
    changes = records(content.get("route_changes"))
    if changes:
        parts.append(folded("How the route changed while it was traced anew", table(changes, rows)))
    plain = {name: value for name, value in content.items() if name not in _OPENED and value not in (None, {}, [])}
    chosen = {
        name: value for name, value in settings.items() if name not in (*plain, "trainable") and value is not None
    }
    parts.append(folded("Settings", terms([*plain.items(), *chosen.items()])))
    return "".join(parts)


def _told(content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What was done, and how strong the penalty was, in words."""
    names = ", ".join(_mapping(content.get("penalties"))) or ", ".join(_mapping(settings.get("factors")))
    parts = [f"A {names} penalty" if names else "Fine-tuning"]
    target, attack = settings.get("target"), settings.get("attack")
    if names and isinstance(target, str):
        parts.append(f" on {_TARGETS.get(target, target)}")
    if isinstance(content.get("lambda"), (int, float)):
        parts.append(f", lambda {content['lambda']:g}")
    if isinstance(content.get("epochs"), int):
        parts.append(f", {content['epochs']} epochs")
    if attack:
        parts.append(f", against {attack.get('name', attack) if isinstance(attack, Mapping) else attack}")
    strengths = _mapping(content.get("strengths"))
    for name, strength in strengths.items():
        if isinstance(strength, (int, float)):
            parts.append(f"; the {name} penalty's gradient was {strength:.3g} times the task's at first")
    for name, shares in _mapping(content.get("penalty_shares")).items():
        for by, share in _mapping(shares).items():
            if isinstance(share, (int, float)):
                parts.append(f"; {name}: the {by} penalty's share in the first step's gradient was {share:.3g}")
    overlap = _mapping(content.get("overlap_with_full_route"))
    if isinstance(overlap.get("share"), (int, float)):
        parts.append(f"; the route of all training images shares {overlap['share']:.1%} of its neurons")
    return "".join(parts) + "."


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
