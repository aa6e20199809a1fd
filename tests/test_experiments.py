"""Occurrence, sensitivity and Grad-CAM, each against loops over samples and channels."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attackroute.analysis.controls import OFF_ROUTE, RANDOM, ROUTE, sample_routes
from attackroute.analysis.experiment import ExperimentResult
from attackroute.analysis.experiments.gradcam import CLEAN, INSIDE, SHIFT, map_panels, measure_gradcam
from attackroute.analysis.experiments.interventions import transplant_accuracy
from attackroute.analysis.experiments.occurrence import RANDOM_ROUTES, measure_occurrence
from attackroute.analysis.experiments.sensitivity import GRADIENT, SENSITIVITY, measure_sensitivity
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.statistics import Moments
from attackroute.core.table import Table
from attackroute.robustness.gradient_attacks import FGSM
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.trace import trace_routes
from experiment_samples import Case, counting, grad_cam, make_case, shifted
from route_samples import instances

LAYERS = ("0", "3", "8", "10")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(14)


def outputs(case: Case, image: Tensor) -> dict[str, Tensor]:
    """What each layer gives for one image, module by module."""
    found, x = {}, image[None]
    for name, module in case.model.named_children():
        x = module(x)
        if name in LAYERS:
            found[name] = x[0]
    return found


def saved(result: ExperimentResult, folder: Path) -> Document:
    """The result's document as its file holds it."""
    return Document.load(result.document({}).save(folder))


class TestOccurrence:
    def test_is_a_mean_frequency(self, tmp_path: Path) -> None:
        clean, other = instances(20, seed=1), instances(20, seed=2)
        found = measure_occurrence({"clean": clean, "pgd": other}, seeds=(0, 1))
        for layer, count in clean.channels.items():
            size = max(1, round(clean.width * count))
            for name, routes in (("clean", clean), ("pgd", other)):
                shares = sorted((sum(map(bool, column)) / 20 for column in routes.masks[layer].T), reverse=True)
                assert found.values(layer, name) == pytest.approx([sum(shares[:size]) / size])
            assert len(found.values(layer, RANDOM_ROUTES)) == 2
        above = sum(found.values(layer, "clean") > found.values(layer, "pgd") for layer in found.layers)
        assert f"of clean samples' routes; more than those of pgd in {above}, random routes in" in found.reading()
        assert saved(found, tmp_path).table.to_json() == found.table.to_json()

    def test_random_routes_occur_as_often_as_their_width_in_the_long_run(self) -> None:
        many = instances(4000, {"a": 10})
        found = measure_occurrence({"clean": many}, seeds=(0,))
        assert found.values("a", RANDOM_ROUTES)[0] == pytest.approx(0.4, abs=0.02)

    def test_routes_of_different_networks_are_refused(self) -> None:
        with pytest.raises(UserError, match="'mine'"):
            measure_occurrence({"clean": instances(), "mine": instances(channels={"a": 4})})
        with pytest.raises(UserError, match="no instance routes"):
            measure_occurrence({})


class TestResponses:
    def test_are_those_of_one_sample_at_a_time(self, case: Case, tmp_path: Path) -> None:
        compared = case.compared(baselines={"weight": case.weight}, seeds=(4,), batch_size=5)
        found = measure_sensitivity(compared, {"shifted": shifted})
        assert found.samples == 14
        attacked = shifted(case.model, *case.data)
        moved = {layer: [] for layer in LAYERS}  # type: dict[str, list[Tensor]]
        steep = {layer: [] for layer in LAYERS}  # type: dict[str, list[Tensor]]
        for i in range(14):
            with torch.no_grad():
                before, after = outputs(case, case.images[i]), outputs(case, attacked[i])
            for layer in LAYERS:
                moved[layer].append((before[layer] - after[layer]).abs().mean((1, 2)))
            kept: dict[str, Tensor] = {}
            x = case.images[i : i + 1]
            for name, module in case.model.named_children():
                x = module(x)
                if name in LAYERS:
                    x.retain_grad()
                    kept[name] = x
            nn.functional.cross_entropy(x, case.labels[i : i + 1]).backward()
            for layer in LAYERS:
                grad = kept[layer].grad
                assert grad is not None
                steep[layer].append(grad[0].abs().sum((1, 2)))
        case.model.zero_grad(set_to_none=True)
        sets = {ROUTE: case.route, OFF_ROUTE: case.route.complement(), RANDOM: case.route.random_like(4)}
        sets["weight"] = case.weight.route(0.3)
        for layer, (by, route) in product(LAYERS, sets.items()):
            for quantity, attack, each in ((SENSITIVITY, "shifted", moved), (GRADIENT, None, steep)):
                values = torch.stack(each[layer]).double().mean(0)[list(route.indices[layer])]
                (row,) = found.rows(layer, quantity, attack, by)
                assert row["neurons"] == len(values)
                assert row["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
                low, middle, high = (row[name] for name in ("minimum", "median", "maximum"))
                assert (low, high) == pytest.approx((float(values.min()), float(values.max())), rel=1e-4)
                assert middle == pytest.approx(float(values.quantile(0.5)), rel=1e-4)
        for verdict in found.verdicts:
            case_of = verdict["layer"], verdict["quantity"], verdict["attack"]
            (ours,) = found.rows(*case_of, ROUTE)
            theirs = [row["mean"] for row in found.rows(*case_of, verdict["control"])]
            assert verdict["beats"] == all(ours["mean"] > value for value in theirs)
        assert "gradient is higher than off-route" in found.reading()
        assert saved(found, tmp_path).about["samples"] == 14
        assert found.figures()["sensitivity"].axes[0].get_yscale() == "log"


class TestGradCam:
    def test_measures_are_those_of_single_maps(self, case: Case, tmp_path: Path) -> None:
        with counting(case.model) as sizes:
            compared = case.compared(baselines={"weight": case.weight}, seeds=(6,), batch_size=5)
            found = measure_gradcam(compared, "3", {"shifted": shifted})
        right = case.right()
        assert (found.samples, found.counted) == (14, len(right))
        assert len(sizes) == 2 * 3 + len(right)  # a clean and an attacked pass a batch, and those of the attack itself
        sets = {ROUTE: case.route, OFF_ROUTE: case.route.complement(), RANDOM: case.route.random_like(6)}
        sets["weight"] = case.weight.route(0.3)
        expected: dict[tuple[str, str, str], list[float]] = {}
        for by, route in sets.items():
            for i in right:
                image, label = case.images[i : i + 1], case.labels[i : i + 1]
                maps = {}
                for name, x in ((CLEAN, image), ("shifted", shifted(case.model, image, label))):
                    small = grad_cam(case.model, x, "3", route["3"])[None]
                    own = nn.functional.interpolate(small, (13, 13), mode="bilinear")[0, 0].double()
                    total = float(own.sum()) or math.nan  # a map that is all zero says nothing
                    middle = [(y, z) for y in range(13) for z in range(13) if 3 < y + 0.5 < 10 and 3 < z + 0.5 < 10]
                    inside = sum(float(own[y, z]) for y, z in middle)
                    maps[name] = own / total
                    expected.setdefault((name, by, INSIDE), []).append(inside / total)
                apart = float((maps[CLEAN] - maps["shifted"]).abs().sum()) / 2
                expected.setdefault(("shifted", by, SHIFT), []).append(apart)
        assert len(found.table) == len(expected)
        for row in found.table:
            every = torch.tensor(expected[row["images"], row["criterion"], row["measure"]]).double()
            values = every[~every.isnan()]
            assert len(every) == len(right) and row["samples"] == len(values) > 2
            assert row["mean"] == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-6)
            half = 1.96 * float(values.std()) / math.sqrt(len(values))
            assert row["high"] - row["mean"] == pytest.approx(half, rel=1e-2, abs=1e-6)
            ours = torch.tensor(expected[row["images"], ROUTE, row["measure"]]).double()
            assert row["route_minus_this"] == pytest.approx(float((ours - every).nanmean()), rel=1e-3, abs=1e-6)
        assert "shifts by" in found.reading() and saved(found, tmp_path).about["map_size"] == [13, 13]
        assert not found.figures()  # without images to look at

    def test_the_panels_share_one_scale_an_image(self, case: Case) -> None:
        panels = map_panels(case.model, *[part[:3] for part in case.data], case.route.mask("3"), "3", shifted)
        assert panels.cams.shape == (2, 2, 3, 13, 13)
        assert panels.cams.amax((0, 1, 3, 4)).tolist() == pytest.approx([1, 1, 1])
        clean = grad_cam(case.model, case.images[:3], "3", case.route["3"])
        scale = panels.cams[0, 0] / nn.functional.interpolate(clean[:, None], (13, 13), mode="bilinear")[:, 0]
        for each in scale:  # one factor for all positions
            known = each[each.isfinite() & (each > 0)]
            torch.testing.assert_close(known, known[0].expand_as(known), rtol=1e-3, atol=0)
        found = measure_gradcam(case.compared(seeds=()), "3", {"shifted": shifted})
        figure = replace(found, panels=panels).figures()["gradcam"]
        assert "Grad-CAM of 3 (13x13), at its output; shifted\n" in figure.get_suptitle()
        assert sum(bool(axes.images) for axes in figure.axes[:24]) == 18

    def test_bad_input_is_one_line(self, case: Case) -> None:
        wrong = (case.model(case.images).argmax(1) + 1) % 5
        for data, layer, attacks, message in (
            (case.data, "99", {"s": shifted}, "no layer '99'"),
            (case.data, "3", {}, "no attack"),
            ((case.images, wrong), "3", {"s": shifted}, "none of the 14 samples right"),
            (case.images, "3", {"s": shifted}, "no labels"),
        ):
            with pytest.raises(UserError, match=message) as error:
                measure_gradcam(case.compared(data=data), layer, attacks)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("measure", ["sensitivity", "gradcam", "transplant"])
def test_attacks_are_taken_by_their_specification(case: Case, measure: str) -> None:
    def table(attack: object) -> Table:
        attacks, compared = {"fgsm": attack}, case.compared(seeds=(1,))
        if measure == "gradcam":
            return measure_gradcam(compared, "3", attacks).table  # type: ignore[arg-type]
        by = measure_sensitivity if measure == "sensitivity" else transplant_accuracy
        return by(compared, attacks).table  # type: ignore[operator]

    assert table("fgsm:eps=0.1").to_json() == table(FGSM(0.1)).to_json()


def test_sample_routes_by_simple_rules(case: Case) -> None:
    found = sample_routes(case.model, [(case.images[:5], case.labels[:5]), (case.images[5:], case.labels[5:])])
    assert found[ROUTE] == trace_routes(case.model, case.data)
    for i in range(14):
        with torch.no_grad():
            values = outputs(case, case.images[i])
        for layer in LAYERS:
            size = max(1, round(0.2 * len(values[layer])))
            best = values[layer].abs().mean((1, 2)).topk(size).indices.sort().values
            assert found["activation"].masks[layer][i].nonzero().flatten().tolist() == best.tolist()
    assert isinstance(found["gradient"], InstanceRoutes) and len(found["gradient"]) == 14


def test_moments_leave_nan_out_and_do_not_depend_on_batches() -> None:
    values = torch.randn(3, 50, dtype=torch.float64) + 1e6
    values[0, ::7] = torch.nan
    values[2] = torch.nan
    for size in (1, 8, 50):
        moments = Moments(3)
        for part in values.split(size, dim=1):
            moments.add(Moments.of(part))
        for row, mean in zip(values[:2], moments.means(), strict=False):
            known = row[~row.isnan()]
            assert mean.samples == len(known) and mean.value == pytest.approx(float(known.mean()))
            assert mean.high - mean.value == pytest.approx(1.959964 * float(known.std()) / len(known) ** 0.5, rel=1e-6)
        assert moments.means()[2].samples == 0 and math.isnan(moments.means()[2].value)


def test_the_occurrence_figure_shows_every_series() -> None:
    found = measure_occurrence({"clean": instances(20), "pgd": instances(20, seed=5)})
    (axes,) = found.figures()["occurrence"].axes
    first = [100 * found.values(layer, "clean")[0] for layer in found.layers]
    assert list(axes.lines[0].get_ydata()) == first and len(axes.lines) == 3  # clean, pgd, random
