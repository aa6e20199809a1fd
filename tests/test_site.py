"""The site: nothing public is left out, pictures are there, and it builds strictly and fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import attackroute

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: attackroute\.(\S+)$", text, re.MULTILINE)}
    assert {name for name in attackroute.__all__ if not name.startswith("__")} <= described


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    generated = {DOCS / "reference" / "command-line.md"}
    for target in targets:
        if target and not target.startswith("http"):
            linked = (page.parent / target).resolve()
            assert linked.exists() or linked in generated, target


@pytest.mark.slow
def test_it_builds_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocs_jupyter")
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("latex2mathml")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', html), page
        assert not re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//', html), page
        assert not re.findall(r":(?:class|func|meth|data|mod|attr):<", html), page
    help_page = (tmp_path / "site" / "reference" / "command-line.html").read_text()
    assert "--route-width SHARE" in help_page
    assert "<math" in (tmp_path / "site" / "concepts.html").read_text()
