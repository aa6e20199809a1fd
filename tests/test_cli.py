"""The command line's frame: help, versions, exit codes, option values, lazy imports."""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import attackroute
from attackroute.cli import app, arguments, options
from attackroute.cli.app import COMMANDS, Command
from attackroute.cli.arguments import option, parse, shared, switch
from attackroute.cli.console import Output
from attackroute.core.errors import UserError
from command_line import refused, run


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"attackroute {attackroute.__version__}\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path):
    (tmp_path / "attackroute").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m attackroute "$@"\n')
    (tmp_path / "attackroute").chmod(0o755)
    script = """
        eval "$(attackroute --completion)"
        completed() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _attackroute; echo "${COMPREPLY[@]}"; }
        completed attackroute ha; completed attackroute trace --s; completed attackroute trace ./
    """
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    commands, options, files = shown.stdout.split("\n")[:3]
    assert commands.split() == ["hardness", "harden"]
    assert options.split() == ["--samples", "--seed", "--sketches", "--split"]
    assert not files  # left to bash


def test_help_lists_every_command_and_every_exit_code():
    result = run("--help")
    assert result.exit_code == 0
    for word in (*COMMANDS, "Examples", "done", "bad input", "130  interrupted"):
        assert word in result.stdout
    assert run().stdout == result.stdout


@pytest.mark.parametrize("command", ("", *COMMANDS))
def test_help_ends_with_examples_that_can_be_copied(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    text = result.stdout.split("Examples:")[1].replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ").partition(" | ")[0] for line in text.splitlines()]
    examples = [line for line in lines if line.startswith(f"attackroute {command}")]
    assert len(examples) >= 3
    for example in examples:
        name, *words = shlex.split(example)[1:]
        if "--help" not in words:
            parse(COMMANDS[name].options, name, words)  # and runs nothing


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--bogus",), ["--bogus", "attackroute --help"]),
        (("--versoin",), ["--versoin", "did you mean --version?", "attackroute --help"]),
        (("trase",), ["trase", "did you mean trace", "attackroute --help"]),
        (("bogus",), ["bogus", "attackroute --help"]),
        (("trace",), ["--model", "--data", "attackroute trace --help"]),
        (("trace", "--modle", "x"), ["--modle", "did you mean --model", "attackroute trace --help"]),
        (("trace", "--mod", "x", "--data", "y"), ["no option --mod", "attackroute trace --help"]),
        (("trace", "--model", "x", "--data", "y", "-x"), ["no option -x", "attackroute trace --help"]),
        (("trace", "--model", "x", "--data", "y", "more"), ["more", "attackroute trace --help"]),
        (("trace", "--model", "x", "--data"), ["--data", "expected one argument"]),
        (("trace", "--model", "x", "--data", "y", "--width", "0"), ["--width", "outside (0, 1]"]),
        (("trace", "--model", "x", "--data", "y", "--width", "1.01"), ["--width", "outside (0, 1]"]),
        (("trace", "--model", "x", "--data", "y", "--route-width", "nan"), ["--route-width", "not a number"]),
        (("trace", "--model", "x", "--data", "y", "--check", "0"), ["--check"]),
        (("trace", "--model", "x", "--data", "y", "--batch-size", "0"), ["--batch-size"]),
        (("trace", "--model", "x", "--data", "y", "--split", "half"), ["--split", "train, test"]),
        (("trace", "--model", "x", "--data", "y", "--split", "tests"), ["--split", "did you mean test?"]),
        (
            ("train", "--model", "x", "--data", "y", "--out", "z", "--model-width", "-1"),
            ["--model-width", "not above 0"],
        ),
        (("train", "--model", "x", "--data", "y"), ["--out", "attackroute train --help"]),
        (("train", "--model", "x", "--data", "y", "--out", "z", "--weight-decay", "-1"), ["weight_decay"]),
    ],
)
def test_bad_options(arguments, parts):
    refused(run(*arguments), *parts)


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-3", 1e-3), ("-2", -2.0), (" 1 / 4 ", 0.25), ("3", 3.0)]
)
def test_numbers(text, value):
    assert arguments.parse_number(text) == value


@pytest.mark.parametrize("text", ["", "/", "8/", "/255", "8/0", "eight", "inf", "nan", "1/2/3", "1e999"])
def test_texts_that_are_no_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError, match="8/255"):
        arguments.parse_number(text)


def test_shares_end_at_one():
    assert arguments.parse_share("1") == 1
    assert arguments.parse_share("1/5") == 0.2
    for text in ("0", "-0.1", str(math.nextafter(1, 2))):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.parse_share(text)


@pytest.mark.parametrize("name", ["cuda:99", "no-such-device"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError, match=name) as caught:
        options.resolve_device(name)
    assert "\n" not in str(caught.value)


def test_auto_device_can_be_used():
    import torch

    assert torch.ones(2, device=options.resolve_device("auto")).sum() == 2
    assert options.resolve_device("cpu") == torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Take nothing."""


def run_work(monkeypatch: pytest.MonkeyPatch, work):
    """Run a command line with one command that does this."""
    monkeypatch.setattr(app, "COMMANDS", {"work": Command(NoOptions, work, "")})
    return run("work")


def raising(error: BaseException):
    def work(_: NoOptions) -> None:
        raise error

    return work


def test_user_errors_are_one_line_even_if_their_message_is_not(monkeypatch):
    result = run_work(monkeypatch, raising(UserError("first\n  second")))
    refused(result)
    assert result.stderr == "error: first second\n"


def test_interruptions_exit_with_130(monkeypatch):
    assert run_work(monkeypatch, raising(KeyboardInterrupt())).exit_code == 130


def test_failed_checks_have_their_exit_code(monkeypatch):
    assert run_work(monkeypatch, lambda _: 1).exit_code == 1
    assert run_work(monkeypatch, lambda _: None).exit_code == 0


def test_other_failures_are_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError, match="bug"):
        run_work(monkeypatch, raising(ZeroDivisionError("bug")))


def test_sigterm_is_an_interruption(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    assert run_work(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGTERM)).exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


@dataclass(frozen=True, kw_only=True)
class Common:
    title: ClassVar[str] = "Common things"
    first: int = option("--first", "A 100 % number.", arguments.integer(1), "N", default=3)
    second: str = option("-s --second", "A word.", str, "WORD")
    third: bool = switch("--third", "A switch.")


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Do it.

    As it is done.
    """

    place: str = option("", "Where.", str, "PLACE", group="Places")
    third: str = option("--other", "Named as what is hidden.", str, "X", default="3")
    common: Common = shared(first=5, hide=("third",))
    many: tuple[float, ...] = option("--many", "Several.", arguments.parse_number, "X", default=None, repeat=True)
    on: bool = switch("-n --on", "On.")
    kept: bool = switch("--off", "Off.", default=True)


def test_options_are_read_into_their_dataclasses():
    assert parse(Everything, "x", ["there", "-s", "w"]) == Everything(
        place="there", third="3", common=Common(first=5, second="w", third=False), many=(), on=False, kept=True
    )
    assert [parse(Everything, "x", ["there", "-s", "w", *words]).on for words in ([], ["-n"], ["--on"])] == [
        *(False, True, True)
    ]
    words = ["--second=w", "there", "--many", "1/2", "--first", "7", "--off", "--many", "-1"]
    assert parse(Everything, "x", words) == Everything(
        place="there",
        third="3",
        common=Common(first=7, second="w", third=False),
        many=(0.5, -1.0),
        on=False,
        kept=False,
    )
    for wrong, message in (
        (["-s", "w"], "PLACE"),
        (["there"], "-s/--second"),
        (["there", "-s", "w", "--third"], "no option --third"),
        (["there", "-s", "w", "--first", "0"], "--first: 0 is below 1"),
        (["there", "-s", "w", "--first", "x"], "'x' is not an integer"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            parse(Everything, "x work", wrong)
        assert str(caught.value).endswith("(see x work --help)")


def test_help_has_every_option_under_its_heading(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Everything, "x work", ["--help"], "\nExamples:\n\n  $ x   work\n")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith("usage: x work PLACE -s WORD [options]\n\nDo it.\n\nAs it is done.\n")
    assert [line for line in text.splitlines() if line[:1].isalpha() and line.endswith(":")] == [
        "Places:", "Common things:", "Options:", "Examples:",
    ]  # fmt: skip
    for part in ("A 100 % number. [default: 5]", "A word. [required]", "\n  $ x   work\n"):
        assert part in text
    assert "--third" not in text


LONG_NAME = "encoder.layers." * 20


def test_output_keeps_to_its_streams(capsys):
    for output in (Output(), Output(as_json=True), Output(quiet=True), Output(as_json=True, quiet=True)):
        output.note("a note")
        output.table(["layer", "share"], [["[bold]conv[0]", "12.0%"], [LONG_NAME, "1"]])
        output.line("a line")
        output.result({"value": 1})
        with output.progress("steps") as progress:
            progress(1, None)
            progress(2, 2, "[/] done")
        captured = capsys.readouterr()
        assert captured.err == ("" if output.quiet else "a note\n")
        if output.as_json:
            assert captured.out == '{\n  "value": 1\n}\n'
        elif output.quiet:
            assert captured.out == ""
        else:
            assert "[bold]conv[0]" in captured.out and LONG_NAME in captured.out  # in a line
            assert captured.out.endswith("a line\n")


def test_help_does_not_wait_for_torch():
    """Not for that of analyze either, but for the list of its experiments."""
    code = "import sys, attackroute; dir(attackroute); from attackroute.cli.app import COMMANDS, run\n"
    code += "assert [run([name, '--help']) for name in COMMANDS if name != 'analyze'] == [0] * 9\n"
    code += "print('loaded', {'torch', 'numpy', 'scipy', 'matplotlib', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("loaded set()\n")


def test_module_can_be_run():
    command = [sys.executable, "-m", "attackroute", "trace", "--width", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in attackroute.__all__ if not name.startswith("__")])
def test_public_names_load_and_stay_what_they_are(name):
    value = getattr(attackroute, name)
    assert value.__name__ == name
    assert value.__module__.startswith("attackroute.")
    importlib.import_module(attackroute._HOMES[name])
    assert getattr(attackroute, name) is value
    assert callable(value)


def test_type_checkers_see_the_names_that_run_time_has():
    tree = ast.parse(Path(str(attackroute.__file__)).read_text())
    (listed,) = (statement.body for statement in tree.body if isinstance(statement, ast.If))
    seen = {alias.asname: statement.module for statement in listed for alias in statement.names}
    assert len(seen) == len(listed) and seen == attackroute._HOMES
    assert set(attackroute.__all__) == {*seen} <= {*dir(attackroute)}


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(attackroute, "no_such_name")  # noqa: B009 - as an attribute it would be a useless expression
