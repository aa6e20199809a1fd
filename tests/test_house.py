"""The order of the rooms: which may import which, how large files are, and what loads when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "attackroute"
ROOT = "attackroute"

MAY_IMPORT: dict[str, set[str]] = {"core": set()}
MAY_IMPORT |= {room: {"core"} for room in ("routes", "robustness", "zoo")}
MAY_IMPORT["tracing"] = {"core", "routes", "robustness", "zoo"}
MAY_IMPORT |= {room: MAY_IMPORT["tracing"] | {"tracing"} for room in ("analysis", "hardening")}
MAY_IMPORT |= {room: MAY_IMPORT["analysis"] | {"analysis", "hardening"} for room in ("report", "paper")}
MAY_IMPORT["cli"] = MAY_IMPORT["report"] | {"report", "paper"}
MAY_IMPORT[""] = {"cli", *MAY_IMPORT["cli"]}  # the root: public names, and python -m attackroute

AT_ROOT = {"__init__.py", "__main__.py", "py.typed"}
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "shared", "stuff", "base"}
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FILE, MOST_PARAMETERS = 135, 23_000, 500, 15


@dataclass(frozen=True)
class Import:
    """One name that one file of the repository takes from a module of the package."""

    file: Path
    line: int
    module: str
    name: str | None

    def __str__(self) -> str:
        what = f"import {self.module}" if self.name is None else f"from {self.module} import {self.name}"
        return f"{self.file.relative_to(REPOSITORY)}:{self.line}: {what}"

    @property
    def target(self) -> str:
        """The module that is loaded: the name itself, where that is a module."""
        whole = f"{self.module}.{self.name}"
        return whole if whole in modules() else self.module

    @property
    def private(self) -> bool:
        parts = [*self.module.split("."), self.name or ""]
        return any(part.startswith("_") and not part.startswith("__") for part in parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def dotted(path: Path) -> str:
    parts = (ROOT, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module; empty for the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[Import]:
    """What a file imports from the package, within functions and for type checkers too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == ROOT:
                    yield Import(path, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(REPOSITORY)}:{node.lineno}: a relative import"
            if (node.module or "").split(".")[0] == ROOT:
                for alias in node.names:
                    yield Import(path, node.lineno, node.module or "", alias.name)


def beside() -> list[Path]:
    """Programs that are run from a clone and stand on the package."""
    return sorted(path for folder in ("studies", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))


def listed(problems: Iterator[str] | list[str], rule: str) -> None:
    """Fail with one line a problem."""
    lines = sorted(set(problems))
    assert not lines, f"{rule}:\n  " + "\n  ".join(lines)


def test_imports_between_rooms_run_one_way() -> None:
    def wrong() -> Iterator[str]:
        for module, path in modules().items():
            here = room_of(module)
            for taken in imports(path):
                there = room_of(taken.target)
                if there != here and there not in MAY_IMPORT[here] and taken.target != ROOT:
                    yield f"{taken} ({here or 'the root'} must not import {there or 'the root'})"
                elif taken.target == ROOT and here:
                    yield f"{taken} (name the module in which it is defined)"

    listed(
        wrong(), "imports go core <- routes, robustness, zoo <- tracing <- analysis, hardening <- report, paper <- cli"
    )


def test_no_circle_of_files() -> None:
    graph = {module: {taken.target for taken in imports(path)} - {module} for module, path in modules().items()}
    finished: set[str] = set()

    def search(module: str, trail: tuple[str, ...]) -> tuple[str, ...] | None:
        if module in trail:
            return (*trail[trail.index(module) :], module)
        if module in finished:
            return None
        for target in sorted(graph.get(module, ())):
            if circle := search(target, (*trail, module)):
                return circle
        finished.add(module)
        return None

    for module in graph:
        if circle := search(module, ()):
            lines = []
            for here, there in pairwise(circle):
                lines += [str(taken) for taken in imports(modules()[here]) if taken.target == there][:1]
            pytest.fail("a circle of imports:\n  " + "\n  ".join(lines))


def test_no_private_name_leaves_its_room() -> None:
    inside = [
        str(taken)
        for module, path in modules().items()
        for taken in imports(path)
        if taken.private and room_of(taken.target) != room_of(module)
    ]
    outside = [str(taken) for path in beside() for taken in imports(path) if taken.private]
    listed(inside + outside, "private names of another room")


def test_only_rooms_at_the_root() -> None:
    entries = {entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"}
    listed(
        [f"src/attackroute/{name}" for name in entries - AT_ROOT - set(MAY_IMPORT)], "neither a room nor of the root"
    )
    listed(
        [f"src/attackroute/{name}" for name in entries - AT_ROOT if (PACKAGE / name).is_file()], "a file at the root"
    )


def test_files_have_names_of_the_field_and_can_be_read_in_one_sitting() -> None:
    paths = list(modules().values())
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    every = [*paths, *beside()]
    listed([f"{path.relative_to(REPOSITORY)}:1" for path in every if path.stem in NO_NAMES], "names that say nothing")
    long = [f"{path.relative_to(REPOSITORY)}:{n}" for path, n in lengths.items() if n > MOST_LINES_OF_A_FILE]
    listed(long, f"files of more than {MOST_LINES_OF_A_FILE} lines")
    assert len(paths) <= MOST_FILES, f"src/attackroute has {len(paths)} files, and {MOST_FILES} must do"
    assert sum(lengths.values()) <= MOST_LINES, f"src/attackroute has {sum(lengths.values())} of {MOST_LINES} lines"


def test_no_function_takes_too_many_parameters() -> None:
    def wide() -> Iterator[str]:
        for path in modules().values():
            for node in ast.walk(tree(path)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    count = sum(argument.arg not in ("self", "cls") for argument in named)
                    if count > MOST_PARAMETERS:
                        yield f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.name} has {count}"

    listed(wide(), f"functions of more than {MOST_PARAMETERS} parameters")


ALL = """import attackroute as ar; ar.deactivate; ar.hardness; ar.evaluate; ar.trace_routes
from attackroute.analysis.experiment import all_experiments; all_experiments()"""


@pytest.mark.parametrize(
    ("code", "unloaded"), [("import attackroute", ("torch",)), (ALL, ("matplotlib", "torchvision", "scipy.stats"))]
)
def test_what_is_not_needed_is_not_loaded(code: str, unloaded: tuple[str, ...]) -> None:
    check = f"import sys\n{code}\nprint([name for name in {unloaded!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", f"{code} loads {result.stdout.strip()}"
