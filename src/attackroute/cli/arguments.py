"""Options of commands: fields of frozen dataclasses, each declared once, and the parsers made of them.

What a command takes is a dataclass of its own options and of groups of options that commands share, which are
dataclasses too::

    @dataclass(frozen=True, kw_only=True)
    class TraceOptions:
        network: NetworkOptions
        train: TrainingOptions = shared(epochs=10, hide=("holdout",))
        width: float = option("--width", "Share of each layer's channels.", parse_share, "SHARE", default=0.2)
"""

from __future__ import annotations

import argparse
import inspect
import math
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from attackroute.core.errors import UserError, did_you_mean

T = TypeVar("T")
WIDEST = 110  # columns of help, on a terminal that has as many
_OPTIONS = "Options"  # heading of what has none
_DECLARED, _CHANGED, _HIDDEN = "declared", "changed", "hidden"


# Declarations


@dataclass(frozen=True)
class _Option:
    """How a field is given; its name, default and heading in a command are filled in when its parser is made."""

    flags: tuple[str, ...]
    help: str
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    repeat: bool = False
    group: str | None = None
    unset: str | None = None
    off: str | None = None
    name: str = ""
    default: Any = None
    required: bool = False

    def described(self) -> str:
        """What help says of it."""
        default, text = self.default, self.help.replace("%", "%%")
        if self.required and self.unset is None:
            return f"{text} [required]"
        if isinstance(default, bool):
            default = self.flags[0] if default else None
        told = f"{default:g}" if isinstance(default, float) else default if self.unset is None else self.unset
        return text if told is None or told in ("", ()) else f"{text} [default: {told}]"


def option(
    flags: str,
    help: str,
    parse: Callable[[str], Any] = str,
    metavar: str | None = None,
    *,
    default: Any = MISSING,
    repeat: bool = False,
    group: str | None = None,
    unset: str | None = None,
) -> Any:
    """A field that is given as ``--option VALUE``.

    The flags are separated by spaces; without any it is given by its place. What is repeated becomes a tuple, empty
    without any. The heading in the help is the ``title`` of the dataclass unless a group is named; ``unset`` is the
    default in words, where it does not speak for itself.
    """
    metavar = metavar or getattr(parse, "metavar", None)
    declared = _Option(tuple(flags.split()), help, parse, metavar, repeat=repeat, group=group, unset=unset)
    return field(default=() if repeat and default is None else default, metadata={_DECLARED: declared})


def switch(flags: str, help: str, *, off: str | None = None, default: bool = False, group: str | None = None) -> Any:
    """A field that is true where ``--option`` is given; the flag ``off`` makes it false."""
    declared = _Option((*flags.split(), *([] if off is None else [off])), help, group=group, off=off)
    return field(default=default, metadata={_DECLARED: declared})


def shared(*, hide: Sequence[str] = (), **defaults: Any) -> Any:
    """A field of options that commands share, with other defaults; those to hide keep theirs and cannot be given."""
    return field(metadata={_CHANGED: defaults, _HIDDEN: tuple(hide)})


# Values


def parse_number(text: str) -> float:
    """Read a finite number, also as a fraction: ``0.03``, ``8/255``, ``1e-3``."""
    numerator, slash, denominator = str(text).partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write it as 0.03 or 8/255")
    return value


def parse_share(text: str) -> float:
    """Read a share, above 0 and at most 1."""
    value = parse_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]; 0.2 is a fifth")
    return value


def parse_factor(text: str) -> float:
    """Read a factor above 0, such as a network's width."""
    value = parse_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def parse_path(text: str) -> Path:
    """Read the path of a file or folder, there or not; pipes and devices could be waited for without end."""
    from attackroute.core.files import user_path

    try:
        path = user_path(text)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError("neither a file nor a folder")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text[:100]!r} cannot be used: {reason}") from error
    return path


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of integers within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not least <= value <= most:
            bound = f"below {least}" if value < least else f"above {most}"
            raise argparse.ArgumentTypeError(f"{value} is {bound}")
        return value

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    """A parser of one of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}{did_you_mean(text, names)}")
        return text

    parse.metavar = "|".join(names)  # type: ignore[attr-defined]
    return parse


def parse_channels(text: str) -> int:
    """Read how many channels images have."""
    return int(one_of("1", "3")(text))


def parse_names(text: str) -> tuple[str, ...]:
    """Read names separated by commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("names nothing; separate names by commas, or leave it out for all")
    return names


def parse_sketches(text: str) -> int:
    """Read a number of sketches."""
    from attackroute.tracing.config import check_sketches

    value = int(text) if text.isdecimal() else -1
    try:
        check_sketches(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of sketches; write 32, 64, ...") from error
    return value


# Parsers


class _Switch(argparse.Action):
    """Sets true, but by the flag ``off`` false."""

    def __init__(self, option_strings: Sequence[str], dest: str, off: str | None, **given: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **given)
        self._off = off

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string != self._off)


class _OptionParser(argparse.ArgumentParser):
    """A parser of the options of a dataclass, whose docstring is the help; by groups, with errors of one line."""

    def __init__(self, prog: str, options: type, epilog: str = "") -> None:
        width = min(shutil.get_terminal_size().columns - 2, WIDEST)
        super().__init__(
            prog, description=filled(inspect.getdoc(options) or "", width), epilog=epilog, add_help=False,
            allow_abbrev=False, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 26, width),
        )  # fmt: skip
        listed = list(_flat(options))
        assert len({each.name for each in listed}) == len(listed), f"{options} has two options of one name"
        titles = dict.fromkeys(str(each.group) for each in reversed(listed))  # a heading stands where it comes last
        self._headings = {title: self.add_argument_group(title) for title in reversed(titles or {_OPTIONS: None})}
        self._flags = ["-h", "--help"]
        for each in listed:
            self._add(each)
        *_, last = self._headings.values()
        last.add_argument("-h", "--help", action="help", help="Show this, and exit.")
        required = (" ".join([*each.flags[:1], str(each.metavar)]) for each in listed if each.required)
        self.usage = " ".join([prog, *required, "[options]"])

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values in a command line; a mistyped option is named even where another one is missing."""
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if name[:1] == "-" and name[1:2] not in ("", ".") and not name[1:2].isdecimal() and name not in self._flags:
                self.error(f"no option {name}{did_you_mean(name, self._flags)}")
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            self.error(f"{unknown[0]!r} belongs to no option")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and where help is."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def _add(self, each: _Option) -> None:
        argument: dict[str, Any] = {"type": each.parse, "metavar": each.metavar}
        if each.parse is None:
            argument = {"action": _Switch, "off": each.off}
        if each.flags:
            default = None if each.repeat else each.default
            argument |= {"dest": each.name, "required": each.required, "default": default}
            argument |= {"action": "append"} if each.repeat else {}
        elif each.repeat:
            argument |= {"nargs": "+"}
        self._headings[str(each.group)].add_argument(*(each.flags or [each.name]), help=each.described(), **argument)
        self._flags += each.flags


def _flat(options: type, changed: Mapping[str, Any] | None = None, hidden: Sequence[str] = ()) -> Iterator[_Option]:
    """The options of a dataclass and of those in it, but for those that are hidden."""
    changed, hints, title = changed or {}, get_type_hints(options), getattr(options, "title", _OPTIONS)
    assert {*changed, *hidden} <= {each.name for each in fields(options)}, (options, changed, hidden)
    for each in fields(options):
        if is_dataclass(hints[each.name]):
            yield from _flat(hints[each.name], each.metadata.get(_CHANGED), each.metadata.get(_HIDDEN, ()))  # type: ignore[arg-type]
        elif each.name not in hidden:
            declared: _Option = each.metadata[_DECLARED]
            default = changed.get(each.name, each.default)
            needed = {"required": True, "default": None} if default is MISSING else {"default": default}
            yield replace(declared, name=each.name, group=declared.group or title, **needed)


def parse(options: type[T], prog: str, words: Sequence[str], epilog: str = "") -> T:
    """The options that a command line gives; a `UserError` says if one is unknown, missing or wrong."""
    return _built(options, vars(_OptionParser(prog, options, epilog).read(words)), {})


def given(options: Any, *names: str) -> dict[str, Any]:
    """What options are, by name, as JSON values: those of some fields or of all, but for what the command hides."""
    values: dict[str, Any] = {}
    for each in fields(options):
        value, hidden = getattr(options, each.name), each.metadata.get(_HIDDEN, ())
        if names and each.name not in names:
            continue
        if is_dataclass(value):
            values |= {name: cell for name, cell in given(value).items() if name not in hidden}
        else:
            values[each.name] = str(value) if isinstance(value, Path) else value
    return values


def settings_of(kind: type, *options: Any) -> dict[str, Any]:
    """Those values of options that a dataclass of settings has a field for, by the same name."""
    names = {each.name for each in fields(kind)}
    return {name: value for group in options for name, value in given(group).items() if name in names}


def filled(text: str, width: int, start: str = "") -> str:
    """Paragraphs broken into lines of a width, those after the first line as far in as its start."""
    return "\n\n".join(
        textwrap.fill(" ".join(paragraph.split()), width, initial_indent=start, subsequent_indent=" " * len(start))
        for paragraph in text.split("\n\n")
    )


def _built(options: type[T], values: Mapping[str, Any], metadata: Mapping[str, Any]) -> T:
    hints, changed, hidden = get_type_hints(options), metadata.get(_CHANGED, {}), metadata.get(_HIDDEN, ())
    built: dict[str, Any] = {}
    for each in fields(options):  # type: ignore[arg-type]
        if is_dataclass(hints[each.name]):
            built[each.name] = _built(hints[each.name], values, each.metadata)  # type: ignore[arg-type]
        elif each.name in hidden:
            built[each.name] = changed.get(each.name, each.default)
        else:
            value = values[each.name]
            built[each.name] = tuple(value or ()) if each.metadata[_DECLARED].repeat else value
    return options(**built)
