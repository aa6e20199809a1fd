"""What files may not do: choose code that runs, or make way for others before these are whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import attackroute
from attackroute.core.document import Document
from attackroute.routes.instance_routes import InstanceRoutes
from command_line import done, empty_figures, refused, run
from report_runs import data_of, make_network, make_pictures, save_traces

PAYLOAD = """
import os
open(os.environ["PAYLOAD"], "a").close()
def make():
    from attackroute import build_model
    return build_model("vgg_small", width=0.25, num_classes=2)
"""


@pytest.fixture
def mailed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that came by mail: its network is a function of a file beside it, and so are the libraries' names."""
    make_pictures(tmp_path / "pictures", 2)
    folder = tmp_path / "run"
    model = make_network(folder / "model")
    save_traces(folder, tmp_path / "pictures")
    card = json.loads((folder / "model" / "model.json").read_text())
    card["model"] |= {"name": "evil:make", "width": 1.0}
    (folder / "model" / "model.json").write_text(json.dumps(card))
    save_file(model.state_dict(), folder / "model" / "best.safetensors")
    for place in (folder, folder / "model"):
        for name in ("evil", "timm", "rich", "jinja2", "yaml", "pandas"):
            (place / f"{name}.py").write_text(PAYLOAD)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return folder


def of(mailed: Path) -> tuple[object, ...]:
    return "--data", f"folder:{mailed.parent / 'pictures'}", "--image-size", 32


def test_a_folder_chooses_no_code(mailed: Path) -> None:
    data, ran = of(mailed), mailed.parent / "ran"
    for command in (
        ("trace", "--model", "model", *data),
        ("trace", "--model", mailed / "model", *data, "--weights", "model/best.safetensors"),
        ("analyze", "--model", "model", *data, "--out", "a"),
        ("hardness", "--model", "model", *data, "--out", "a"),
        ("harden", "--model", "model", *data, "--lam", 1, "--out", "a"),
        ("evaluate", "--model", "model", *data),
    ):
        refused(run(*command), "model.json", "--model evil:make")
        assert not ran.exists(), command
    for command in (("report", "."), ("report", mailed), ("compare", ".", "."), ("report", "model", *data[:2])):
        result = run(*command)
        assert "evil:make" in result.stderr and not ran.exists(), (command, result.output)
    for name, settings in (("trace", {"model": "evil:make"}), ("deactivate", {"model": "timm:evil", "data": "demo"})):
        shutil.rmtree("model", ignore_errors=True)
        Document(name, settings, about={"attack": None}).save(".")
        run("report", ".")
        assert not ran.exists(), name


def test_python_m_takes_no_library_from_the_current_folder(mailed: Path) -> None:
    Path("shlex.py").write_text(PAYLOAD)
    subprocess.run([sys.executable, "-m", "attackroute", "--version"], capture_output=True, timeout=60, check=True)
    assert not (mailed.parent / "ran").exists()


def test_the_same_words_open_a_network_of_ones_own(mailed: Path) -> None:
    expected = InstanceRoutes.load("routes.safetensors")
    done("report", ".", "--model", "evil:make", "--samples", 2)
    assert (mailed.parent / "ran").exists()
    (view,) = data_of(Path("report.html"))["route_data"]
    assert all(edge["influence"][0] is not None for edge in view["edges"])
    named = ("--model", "evil:make", "--weights", "model/best.safetensors")
    done("trace", *named, *of(mailed), "--out", "again")
    assert InstanceRoutes.load("again/routes.safetensors") == expected


def test_links_and_pipes_in_a_run_are_left_alone(mailed: Path) -> None:
    secret = mailed.parent / "secret"
    secret.write_text("<svg>secret</svg>")
    Document("deactivate", {}, "Told.").save(".")
    Path("deactivate.svg").symlink_to(secret)
    os.mkfifo("deactivate-more.svg")
    os.mkfifo("pipe.json")
    done("report", ".", "--quiet")
    page = Path("report.html").read_text()
    assert "Told." in page and "<img" not in page.partition("<script")[0]


# Results that are there


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network and its pictures."""
    root = tmp_path_factory.mktemp("files")
    for split in ("train", "test"):
        make_pictures(root / "pictures" / split, 4)
    make_network(root / "net")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRAINING = ("--epochs", 1, "--batch-size", 4, "--holdout", 0)
COMMANDS = {
    "train": ("train", "--model", "vgg_small", "--model-width", 0.25, *TRAINING),
    "trace": ("trace",),
    "analyze": ("analyze", "--only", "occurrence", "--attack", "fgsm"),
    "hardness": ("hardness", "--attack", "fgsm"),
    "harden": ("harden", "--lam", 0.1, "--evaluate", "fgsm", "--check-samples", 0, "--no-compare-full", *TRAINING),
    "evaluate": ("evaluate", "--attack", "fgsm", "--check-samples", 0),
}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with empty_figures():
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_results_are_replaced_when_they_are_asked_to_be_and_whole(home: Path, tmp_path: Path, name: str) -> None:
    out, data = tmp_path / "out", home / "pictures"
    model = () if name == "train" else ("--model", home / "net")

    def command(pictures: Path, *more: object) -> tuple[object, ...]:
        given = *COMMANDS[name], *model, "--data", f"folder:{pictures}", "--image-size", 32, "--out", out, "--quiet"
        return *given, *more

    done(*command(data))
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    refused(run(*command(data)), out, "--overwrite")
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    for split in ("train", "test"):
        for image in list((broken / split / "light").iterdir())[1:]:
            image.write_bytes(image.read_bytes()[:-300])  # its header is whole, so that work begins
    assert run(*command(broken, "--overwrite", "--seed", 1)).exit_code == 2
    assert {file: there for file, there in contents(out).items() if ".new" not in file} == before
    done(*command(data, "--overwrite", "--seed", 1))
    after = contents(out)
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine" and after != before


def test_an_interrupted_replacement_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attackroute.tracing.trace import Tracer

    data = ("--data", f"folder:{home / 'pictures'}", "--batch-size", 3, "--out", tmp_path, "--quiet")
    command = ("trace", "--model", home / "net", *data)
    done(*command)
    before = contents(tmp_path)
    calls: list[int] = []
    trace = Tracer.trace

    def breaking(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trace(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Tracer, "trace", breaking)
    assert run(*command, "--width", 0.5, "--overwrite").exit_code == 130
    assert {name: there for name, there in contents(tmp_path).items() if not name.startswith(".new")} == before
    done(*command, "--width", 0.5, "--overwrite", "--resume")
    assert len(calls) == 4 and contents(tmp_path).keys() == before.keys()  # three batches, of which one twice
    assert InstanceRoutes.load(tmp_path / "routes.safetensors").width == 0.5


def test_experiments_on_other_terms_are_not_replaced_by_resuming(home: Path, tmp_path: Path) -> None:
    command = (
        *COMMANDS["analyze"],
        "--model",
        home / "net",
        "--data",
        f"folder:{home / 'pictures'}",
        "--out",
        tmp_path,
    )
    done(*command)
    before = contents(tmp_path)
    refused(run(*command, "--seed", 1, "--resume"), "occurrence.json", "--overwrite")
    assert contents(tmp_path) == before
    assert "done before" in done(*command, "--resume").stdout


def test_one_command_at_a_time_works_in_a_folder(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    command = ("trace", "--model", home / "net", "--data", f"folder:{home / 'pictures'}", "--out", tmp_path, "--resume")
    code = "import sys\nfrom pathlib import Path\nfrom attackroute.core.files import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    holder = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        refused(run(*command), "another process is at work")
        process.communicate()
    done(*command)


def test_a_page_replaces_a_page_alone(mailed: Path) -> None:
    done("report", ".", "--quiet")
    first = Path("report.html").read_bytes()
    done("report", ".", "--quiet")
    link, pipe, kept = Path("link.html"), Path("pipe.html"), Path("kept.html")
    link.symlink_to("kept.html")
    refused(run("report", ".", "--page", link), "link.html")  # though nothing is where it leads
    kept.write_bytes(first)
    os.mkfifo(pipe)
    for target in (link, pipe, Path("/dev/null"), Path("model/best.safetensors"), Path("model")):
        for command in (("report", "."), ("compare", ".", ".")):
            refused(run(*command, "--page", target), target)
    assert link.is_symlink() and pipe.is_fifo() and kept.read_bytes() == first and Path("/dev/null").is_char_device()


# What cannot be used


LONG = "x" * 5000


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", LONG, "pipe", "/dev/zero"])
def test_paths_that_lead_to_no_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    data = ("--data", f"folder:{home / 'pictures'}")
    for command in (
        ("trace", "--model", path, *data),
        ("trace", "--model", home / "net", "--data", f"folder:{path}"),
        ("trace", "--model", home / "net", *data, "--weights", path),
        ("trace", "--model", home / "net", *data, "--out", path),
        ("hardness", "--model", home / "net", *data, "--out", "out", "--route", path),
        ("report", path),
        ("reproduce", "table1", *data, "--page", path, "--out", "out"),
    ):
        refused(run(*command))


def test_a_home_is_found_after_an_equals_sign(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done("trace", "--model", home / "net", "--data", f"folder:{home / 'pictures'}", "--out=~/x")
    assert (tmp_path / "x" / "route.json").exists() and not Path("~").exists()


@pytest.mark.parametrize("option", ["seed", "image-size", "batch-size", "workers", "samples", "check"])
def test_numbers_that_no_computer_takes(home: Path, option: str) -> None:
    data = ("--data", f"folder:{home / 'pictures'}")
    refused(run("trace", "--model", home / "net", *data, f"--{option}", "9" * 20), f"--{option}", "above")


def test_checkpoints_of_the_right_format_with_wrong_contents(home: Path, tmp_path: Path) -> None:
    data = ("--data", f"folder:{home / 'pictures'}", "--image-size", 32, "--out", tmp_path, "--quiet")
    command = (*COMMANDS["train"], *data)
    done(*command)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in (
        *((name, value) for name in state if name != "format" for value in (None, 3)),
        ("history", [{}]), ("history", [3]), ("optimiser", {}), ("weights", {"a": 1}),
    ):  # fmt: skip
        torch.save({**state, name: value}, tmp_path / "state.pt")
        refused(run(*command, "--resume"), tmp_path)
    (tmp_path / "state.pt").unlink()
    os.mkfifo(tmp_path / "state.pt")
    refused(run(*command, "--resume"), "state.pt")


def test_grey_networks_read_files_in_grey(home: Path, tmp_path: Path) -> None:
    data = ("--data", f"folder:{home / 'pictures'}")
    common = (*data, "--image-size", 32, "--quiet")
    done(*COMMANDS["train"], *common, "--grey", "--out", tmp_path / "net")
    assert json.loads((tmp_path / "net" / "model.json").read_text())["model"]["in_channels"] == 1
    done("trace", "--model", tmp_path / "net", *data, "--out", tmp_path / "routes")
    assert Document.load(tmp_path / "routes" / "summary.json").settings["images"][1:] == [1, 32, 32]
    done("report", tmp_path / "routes", "--samples", 2, "--quiet")
    (view,) = data_of(tmp_path / "routes" / "report.html")["route_data"]
    assert all(edge["influence"][0] is not None for edge in view["edges"])


def test_what_torchrun_sets_must_be_numbers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "abc", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    refused(run("trace", "--model", home / "net", "--data", f"folder:{home / 'pictures'}"), "RANK is 'abc'", "torchrun")


def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "attackroute", "--help"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: the output")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_loaded_says_nothing(tmp_path: Path, number: int) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "attackroute", "trace", "--model", "x", "--data", "y"]
    paths = os.pathsep.join([str(tmp_path), str(Path(attackroute.__file__).parents[1])])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "")
