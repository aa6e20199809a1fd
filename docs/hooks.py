"""What the site makes while it is built: the command line's page, equations as MathML."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = "reference/command-line.md"
_EQUATION = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.DOTALL | re.MULTILINE)
_DETAILS = re.compile(r"(<details>.*?</details>)", re.DOTALL)
_LONG_TABLE = re.compile(r"(?:^\|.*\|\n){17,}", re.MULTILINE)  # header, rule and 15 rows or more
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<)")
_COLUMNS = "86"

sys.path.insert(0, str(ROOT / "src"))


def on_files(files: Files, config: Any) -> Files:
    """Add the page of the command line."""
    files.append(File.generated(config, COMMAND_LINE, content=command_line()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn ``$$`` blocks into MathML, which browsers draw by themselves, and fold long tables."""
    open_parts = _DETAILS.split(markdown)  # every second one is folded already
    open_parts[::2] = [_LONG_TABLE.sub(_folded, part) for part in open_parts[::2]]
    markdown = "".join(open_parts).replace("<details>", "<details markdown>")
    return _EQUATION.sub(lambda found: f'<div class="equation">{convert(found[1], display="block")}</div>', markdown)


def _folded(table: re.Match[str]) -> str:
    rows = table[0].count("\n") - 2
    return f"<details><summary>Table of {rows} rows</summary>\n\n{table[0]}\n</details>\n"


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of reStructuredText in front of names in docstrings."""
    return _ROLE.sub("", html)


def on_post_page(output: str, **_: Any) -> str:
    """Leave out scripts that would be fetched from elsewhere, and let the search run in pages opened as files."""
    output = re.sub(r'<script[^>]*src="https?://[^"]*"[^>]*>\s*</script>', "", output)
    earlier = r'\1\2theme/offline-worker.js"></script>\1\2\3'
    return re.sub(r'(<script src=")([^"]*)(assets/javascripts/bundle)', earlier, output)


on_post_template = on_post_page  # of the page for what is not found


def command_line() -> str:
    """All commands' help, as the commands print it."""
    from attackroute.cli.app import COMMANDS, run

    os.environ["COLUMNS"] = _COLUMNS

    def helped(words: list[str]) -> str:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            run(words)
        return f'<pre class="help"><code>{escape(text.getvalue().strip())}</code></pre>'

    about = "What the commands say about themselves (`attackroute COMMAND --help`)."
    parts = ["# Command line", about, helped(["--help"])]
    for name in COMMANDS:
        parts += [f"## attackroute {name}", helped([name, "--help"])]
    return "\n\n".join(parts)
