"""Freeze what the package computes, and compare two such states to the last digit, as before and after a restructuring.

    python tools/freeze_results.py run OUT [--images FOLDER] [--only STEP,STEP]
    python tools/freeze_results.py compare BEFORE AFTER [--only STEP,STEP]

``run`` takes the ``attackroute`` that is importable, and writes one JSON file a step into OUT: tensors as their
checksum with some of their values, the tables of the commands as sets of rows, single numbers and sentences beside
them; no times, versions or paths. FOLDER holds images of 32x32 pixels for the presets, one folder a class; without it
they are drawn from a seed. It takes some minutes on one core; two runs on one machine are equal.

``compare`` prints every difference and exits with 1 if there is one. Files may be laid out anew: a row of BEFORE must
be part of a row of AFTER that the same command wrote, and no row of AFTER may be without one; columns may be added,
their order and that of the rows may change. A number or sentence beside the tables must be there again, wherever. What
was renamed or dropped on purpose is listed in ``RENAMED`` and ``IGNORED``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import attackroute as ar

# ---- What a change of the interface touches: adapt it here -----------------------------------------------------------

RENAMED: dict[str, str] = {}
"""Columns and numbers by their old name, where they have a new one."""
IGNORED = {
    *(
        "seconds",
        "version",
        "checksum",
        "format",
        "kind",
        "experiment",
        "folder",
        "page",
        "device",
        "devices",
        "finished",
    ),
    *("libraries", "files", "published", "resumed_from", "model_names", "forward_passes", "batches", "processes"),
}
"""Names of what says nothing about the numbers, with all below them."""
SETTINGS = {"terms", "settings", "provenance"}
"""Names of what a command was told: not compared, but a number that was beside a table may have moved there."""
TOLD = {"model", "data", "route"}
"""The same where it lies beside a table and not in a column."""
ROUNDED: set[str] = set()
"""Columns that are compared to 12 digits, where a formula was replaced by a library's on purpose."""
NOT_TABLES = {"measurements.jsonl", "model.json", "settings.json", "training.json", "route.json"}
ROUTE, ROUTES, WEIGHTS, LOG = "route.json", "routes.safetensors", "last.safetensors", "log.jsonl"
CRITERIA = ("activation", "gradient", "sensitivity", "attribution", "weight", "kernel")

TRAIN = ["train", "--model", "vgg_small", "--data", "mnist-sample", "--epochs", "1"]
DIGITS = ["--model", "digits", "--data", "mnist-sample"]
HARDEN = [
    *("--epochs", "1", "--eps", "0.1", "--evaluate", "fgsm", "--evaluate", "pgd"),
    *("--evaluate-samples", "60", "--check-samples", "8"),
]
RUN = ["--seed", "0", "--device", "cpu", "--quiet"]


def public(*places: str) -> Any:
    """The first of some names, each ``module:name``, that there is."""
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"none of {', '.join(places)}: say in {Path(__file__).name} what it is called now")


def traced(model: nn.Module, data: Any, attack: Any = None, **settings: Any) -> ar.InstanceRoutes:
    """Instance routes with scores; ``settings`` are linear, carrier, sketches, seed."""
    if hasattr(ar, "TraceConfig"):
        settings = {"config": ar.TraceConfig(**settings)}
    return ar.trace_routes(model, data, attack=attack, keep_scores=True, **settings)


def loss_gradient(model: nn.Module, data: Any) -> Mapping[str, Tensor]:
    where = ("attackroute.analysis:loss_gradient", "attackroute:loss_gradient", "attackroute:gradient")
    return public(*where)(model, data)


def sensitivity(model: nn.Module, data: Any, attack: Any) -> Mapping[str, Tensor]:
    return public("attackroute:sensitivity", "attackroute.analysis:sensitivity")(model, data, attack=attack)


# ---- Networks and images ---------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """One block of a transformer: attention and layer norm leave edges without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Workplace:
    """A temporary folder in which commands run, and what they run on."""

    def __init__(self, home: Path, images: Path | None) -> None:
        self.home = home
        if images is not None:
            (home / "images").symlink_to(images.resolve(), target_is_directory=True)
        else:
            _draw_images(home / "images")
        sources = str(Path(ar.__file__).resolve().parents[1])
        paths = [sources, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str, out: str) -> Path:
        """Run ``attackroute WORDS --out OUT`` in the folder."""
        line = [sys.executable, "-m", "attackroute", *words, "--out", out, *RUN]
        done = subprocess.run(line, cwd=self.home, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"attackroute {' '.join(line[3:])} exited with {done.returncode}:\n{done.stderr[-3000:]}")
        return self.home / out

    @cached_property
    def digits(self) -> Path:
        """The folder of a network trained on the embedded digits."""
        return self.command(*TRAIN, out="digits")

    @cached_property
    def network(self) -> nn.Module:
        """That network."""
        model = ar.build_model("vgg_small", in_channels=1)
        model.load_state_dict(load_file(self.digits / WEIGHTS))
        return model.eval()

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Some of the digits with their labels."""
        pairs = [ar.load_data("mnist-sample", samples=48, seed=0).dataset[index] for index in range(48)]
        return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    @property
    def tokens(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """A small transformer with images and labels for it."""
        torch.manual_seed(0)
        model = Tokens().eval()
        return model, (torch.rand(6, 3, 16, 16), torch.arange(6) % 5)


def preset(name: str) -> list[str]:
    return ["--model", f"preset:{name}", "--data", "folder:images"]


def preset_network(name: str) -> nn.Module:
    """A preset without the package's own reader of it."""
    card = next(Path(ar.__file__).parent.rglob(f"presets/{name}/model.json"))
    spec = json.loads(card.read_text())["model"]
    model = ar.build_model(spec.pop("name"), **spec)
    model.load_state_dict(load_file(card.with_name("best.safetensors")))
    return model.eval()


def _draw_images(root: Path) -> None:
    """Smooth noise as PNG files, ten classes of 40."""
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        folder = root / "test" / f"class{label}"
        folder.mkdir(parents=True)
        coarse = torch.rand(40, 3, 8, 8, generator=generator)
        images = F.interpolate(coarse, size=32, mode="bilinear").mul(255).round().to(torch.uint8)
        for number, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")


# ---- The steps -------------------------------------------------------------------------------------------------------

Results = dict[str, Any]


def train(place: Workplace) -> Results:
    results = {"log": table_of(place.digits)}
    return results | tensors("weights", load_file(place.digits / WEIGHTS))


def trace(place: Workplace) -> Results:
    assert place.digits
    attack = ["--attack", "pgd:eps=0.1"]
    results: Results = {}
    for name, options in {
        "clean": [],
        "attacked": attack,
        "noise": [*attack, "--carrier", "noise"],
        "linear": ["--linear"],
        "float64": ["--dtype", "float64", "--check", "2"],
    }.items():
        results |= trace_of(place, name, [*DIGITS, "--samples", "100", *options])
    model, data = place.tokens
    fgsm = ar.parse_attack("fgsm:eps=0.1")
    results |= routes_of("tokens exact", traced(model, data, linear=True))
    results |= routes_of("tokens sketched", traced(model, data, linear=True, sketches=32, seed=3))
    results |= routes_of("tokens noise", traced(model, data, fgsm, linear=True, carrier="noise"))
    pairs = {
        "digits influence": ar.influence(place.network, place.batch[0][:4], "features.7", "features.10"),
        "tokens influence": ar.influence(model, data[0], "embed", "qkv", linear=True),
    }
    return results | {name: tensor(values) for name, values in pairs.items()}


def presets(place: Workplace) -> Results:
    results: Results = {}
    pairs = {"vgg16-cifar10": ("features.0", "features.3"), "resnet18-cifar10": ("conv1", "layer1.0.conv1")}
    generator = torch.Generator().manual_seed(1)
    for name, pair in pairs.items():
        results |= trace_of(place, f"{name}-clean", [*preset(name), "--samples", "60"])
        results |= trace_of(place, f"{name}-pgd", [*preset(name), "--samples", "30", "--attack", "pgd"])
        images = torch.rand(4, 3, 32, 32, generator=generator)
        results[f"{name} influence"] = tensor(ar.influence(preset_network(name), images, *pair))
    return results


def analyze(place: Workplace) -> Results:
    assert place.digits
    options = ["--draws", "2", "--attack", "pgd:eps=0.1", "--attack", "gaussian-noise"]
    digits = place.command("analyze", *DIGITS, "--samples", "100", *options, out="analysis")
    options = ["--draws", "2", "--only", "transplant,sensitivity"]
    other = place.command("analyze", *preset("vgg16-cifar10"), "--samples", "60", *options, out="preset-analysis")
    route = ar.Route.load(digits / ROUTE)
    return {"digits": table_of(digits), "preset": table_of(other)} | route_of("digits route", route)


def hardness(place: Workplace) -> Results:
    assert place.digits
    digits = [*DIGITS, "--samples", "100", "--attack", "fgsm:eps=0.1"]
    other = [*preset("resnet18-cifar10"), "--samples", "40", "--attack", "fgsm:eps=1/255"]
    return {
        "digits": table_of(place.command("hardness", *digits, out="hardness")),
        "preset": table_of(place.command("hardness", *other, out="preset-hardness")),
    }


def evaluate(place: Workplace) -> Results:
    assert place.digits
    attacks = ["--attack", "fgsm", "--attack", "pgd", "--attack", "mi-fgsm", "--attack", "gaussian-noise"]
    options = [*DIGITS, "--samples", "100", "--eps", "0.1", *attacks, "--check-samples", "32"]
    return {"digits": table_of(place.command("evaluate", *options, out="evaluation"))}


def harden(place: Workplace) -> Results:
    assert place.digits
    results: Results = {}
    for penalty, lam in {"gradient": "0.1", "weight": "0.001"}.items():
        options = [*DIGITS, "--penalty", penalty, "--lam", lam, *HARDEN]
        folder = place.command("harden", *options, out=f"hardened-{penalty}")
        results[penalty] = table_of(folder)
        results |= tensors(f"{penalty} weights", load_file(folder / WEIGHTS))
        results |= route_of(f"{penalty} route", ar.Route.load(folder / ROUTE))
    return results


def channels(place: Workplace) -> Results:
    model, data, attack = place.network, place.batch, ar.parse_attack("pgd:eps=0.1")
    results: Results = {}
    for name in CRITERIA:
        needed = {"attack": attack} if name in ("sensitivity", "attribution") else {}
        results |= route_of(name, ar.rank_channels(model, data, by=name, **needed))
    results |= tensors("sensitivity values", sensitivity(model, data, attack))
    results |= tensors("gradient values", loss_gradient(model, data))
    route = traced(model, data).aggregate(width=0.3)
    results["hardest"] = [int(index) for index in ar.hardness(model, route, data).hardest(10)]
    images = attack(model, *data)
    results["attacked images"] = tensor(images)
    edits = {
        "deactivated": ar.deactivate(model, route),
        "transplanted": ar.transplant(model, data[0], route, ["features.0", "features.7"]),
        "weakened": ar.weaken(model, route, 0.5),
    }
    for name, edit in edits.items():
        with edit, torch.no_grad():
            results[f"{name} logits"] = tensor(model(images))
    return results


def reproduce(place: Workplace) -> Results:
    targets = ["table1", "fig2", "fig3", "--data", "folder:images", "--model", "preset:resnet18-cifar10"]
    return {"resnet18-cifar10": table_of(place.command("reproduce", *targets, "--samples", "40", out="paper"))}


STEPS: dict[str, Callable[[Workplace], Results]] = {
    step.__name__: step for step in (train, trace, presets, analyze, hardness, evaluate, harden, channels, reproduce)
}


def trace_of(place: Workplace, name: str, options: list[str]) -> Results:
    """What ``attackroute trace`` makes of some options: the tables, the model's route, the instances' routes."""
    folder = place.command("trace", *options, "--keep-scores", out=f"routes-{name}")
    results = {f"{name} summary": table_of(folder)} | route_of(f"{name} route", ar.Route.load(folder / ROUTE))
    return results | routes_of(name, ar.InstanceRoutes.load(folder / ROUTES))


# ---- Canonical content -----------------------------------------------------------------------------------------------


def tensor(values: Tensor) -> Results:
    """A tensor's checksum, with some of its values so that a difference can be understood."""
    flat = values.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()
    few = flat[:: max(1, flat.numel() // 6)][:6].tolist()
    return {"sha256": digest, "shape": list(values.shape), "dtype": str(values.dtype), "some": [repr(v) for v in few]}


def tensors(name: str, values: Mapping[str, Tensor]) -> Results:
    return {f"{name}: {key}": tensor(values[key]) for key in values}


def route_of(name: str, route: ar.Route) -> Results:
    """A route's channels, and how often samples' routes use each."""
    results: Results = {f"{name}: {layer}": list(route.indices[layer]) for layer in route.layers}
    return results if route.frequency is None else results | tensors(f"{name} frequency", route.frequency)


def routes_of(name: str, routes: ar.InstanceRoutes) -> Results:
    """All that instance routes hold but their provenance."""
    results = tensors(f"{name} masks", routes.masks) | tensors(f"{name} scores", routes.scores)
    results[f"{name} methods"] = [f"{source} -> {target}: {how}" for (source, target), how in routes.methods.items()]
    for note in ("labels", "predictions"):
        values = getattr(routes, note)
        results[f"{name} {note}"] = None if values is None else values.tolist()
    return results


def table_of(folder: Path) -> Results:
    """What lies in the files of a command: rows of all tables, numbers beside them, settings, lines of text."""
    rows: list[dict[str, str]] = []
    facts: dict[str, list[str]] = {"facts": [], "settings": []}
    lines: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.name in NOT_TABLES:
            continue
        if path.suffix == ".json":
            _walk(json.loads(path.read_text()), "", "facts", rows, facts)
        elif path.suffix == ".jsonl":
            _walk([json.loads(line) for line in path.read_text().splitlines()], "", "facts", rows, facts)
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                _walk(list(csv.DictReader(file)), "", "facts", rows, facts)
        elif path.suffix == ".md":
            lines += [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("<!--")]
    unique = {json.dumps(row, sort_keys=True) for row in rows}
    beside = {name: sorted(set(values)) for name, values in facts.items()}
    return {"rows": [json.loads(row) for row in sorted(unique)], **beside, "lines": lines}


def _walk(value: Any, name: str, kind: str, rows: list[dict[str, str]], facts: dict[str, list[str]]) -> None:
    """Sort what a file holds: objects in a list are rows, all else belongs to its innermost name."""
    if name in IGNORED:
        return
    kind = "settings" if name in SETTINGS else kind
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if kind == "facts" and not all(set(item) >= {"name"} and name == "attacks" for item in value):
            rows.extend(dict(sorted(_cells(item))) for item in value)
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk(item, key, kind, rows, facts)
    elif (text := _text(value)) is not None:
        facts[kind].append(f"{name} = {text}")


def _cells(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if key in IGNORED:
            continue
        if isinstance(value, dict):
            yield from _cells(value, f"{prefix}{key}.")
        elif (text := _text(value)) is not None:
            yield prefix + key, text


def _text(value: Any) -> str | None:
    """A cell: the same from CSV and from JSON, and None where it is not defined."""
    if isinstance(value, list):
        return json.dumps([item if isinstance(item, dict) else _text(item) for item in value])
    text = "" if value is None else str(value)
    with suppress(ValueError):
        text = repr(float(text))
    return None if text in ("", "nan", "inf", "-inf") else text


# ---- The comparison --------------------------------------------------------------------------------------------------


def compare(before: Path, after: Path, only: list[str]) -> int:
    """Print every difference between two folders; how many there are."""
    names = [{path.stem for path in folder.glob("*.json")} & set(only) for folder in (before, after)]
    differences = [f"{name}: only in {before if name in names[0] else after}" for name in sorted(names[0] ^ names[1])]
    values = 0
    for name in sorted(names[0] & names[1]):
        old, new = (json.loads((folder / f"{name}.json").read_text()) for folder in (before, after))
        for key in old | new:
            label = f"{name}, {key}"
            if key not in old or key not in new:
                differences.append(f"{label}: {'missing' if key in old else 'extra'}")
            elif isinstance(old[key], dict) and "rows" in old[key]:
                values += len(old[key]["rows"]) + len(old[key]["facts"]) + len(old[key]["lines"])
                differences += [f"{label}: {line}" for line in _tables(old[key], new[key])]
            else:
                values += 1
                if old[key] != new[key]:
                    differences.append(f"{label}: {json.dumps(old[key])} -> {json.dumps(new[key])}")
    print("\n".join(differences))
    print(f"{len(differences)} differences in {values} results")
    return len(differences)


def _tables(old: Results, new: Results) -> Iterator[str]:
    before, after = ([_renamed(row) for row in table["rows"]] for table in (old, new))
    exact = {json.dumps(row, sort_keys=True) for row in after}
    wanted = {json.dumps(row, sort_keys=True) for row in before}
    for row in before:
        if json.dumps(row, sort_keys=True) in exact or any(row.items() <= other.items() for other in after):
            continue
        near = max(after, key=lambda other: len(row.items() & other.items()), default={})
        changed = {key: f"{row[key]} -> {near.get(key, 'missing')}" for key in row if near.get(key) != row[key]}
        yield f"row {json.dumps(row)} has no match; the nearest differs in {json.dumps(changed)}"
    for row in after:
        if json.dumps(row, sort_keys=True) not in wanted and not any(other.items() <= row.items() for other in before):
            yield f"extra row {json.dumps(row)}"
    there = {_renamed_fact(fact) for fact in [*new["facts"], *new["settings"]]}
    cells = {f"{key} = {text}" for row in after for key, text in row.items()}
    for fact in map(_renamed_fact, old["facts"]):
        name = fact.split(" = ")[0]
        if fact not in there | cells and name not in TOLD | IGNORED:
            others = sorted(other for other in there | cells if other.split(" = ")[0] == name)
            yield f"{fact} is gone; there is {'; '.join(others) or 'nothing of that name'}"
    for line in old["lines"]:
        if line not in new["lines"]:
            yield f"line gone: {line}"
    for line in new["lines"]:
        if line not in old["lines"]:
            yield f"line new: {line}"


def _renamed(row: Mapping[str, str]) -> dict[str, str]:
    names = {key: RENAMED.get(key, key) for key in row if key.split(".")[0] not in IGNORED}
    return {new: f"{float(row[key]):.12g}" if new in ROUNDED else row[key] for key, new in names.items()}


def _renamed_fact(fact: str) -> str:
    name, _, text = fact.partition(" = ")
    return f"{RENAMED.get(name, name)} = {text}"


# ---- The command -----------------------------------------------------------------------------------------------------


def run(out: Path, images: Path | None, only: list[str]) -> None:
    """Compute the steps and write one file each."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    print(f"attackroute from {Path(ar.__file__).parent}")
    with tempfile.TemporaryDirectory() as home:
        place = Workplace(Path(home), images)
        for name in only:
            start = sum(os.times()[:4])
            results = STEPS[name](place)
            (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {len(results)} results, {sum(os.times()[:4]) - start:.0f} s of one core", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="compute everything with the attackroute that is importable")
    running.add_argument("out", type=Path)
    running.add_argument("--images", type=Path)
    comparing = commands.add_parser("compare", help="print every difference between two runs")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    for command in (running, comparing):
        command.add_argument("--only", default=",".join(STEPS), help=f"some of {', '.join(STEPS)}")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := [name for name in only if name not in STEPS]:
        parser.error(f"no step {', '.join(unknown)}: there are {', '.join(STEPS)}")
    if options.command == "compare":
        sys.exit(1 if compare(options.before, options.after, only) else 0)
    run(options.out, options.images, only)


if __name__ == "__main__":
    main()
