"""What a page needs beyond the files of a run: influence between channels, and traces that are not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from attackroute.attacks.application import Attack, attack_name, attacked
from attackroute.errors import UserError
from attackroute.fingerprint import require_same
from attackroute.instances import InstanceRoutes
from attackroute.layers import frozen
from attackroute.report.mean_influence import MeanInfluence, mean_influence
from attackroute.report.run_folder import RunFolder
from attackroute.streams import Data, batches
from attackroute.trace import trace_routes

Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class Measured:
    """Traces of clean and attacked samples, and mean influence on both.

    Attributes:
        clean: Routes of samples as they are; None where neither the folder nor a model gives them.
        attacked: Routes of attacked samples.
        clean_influence: Mean influence on clean images; None without a model.
        attacked_influence: The same on attacked images.
        traced: Which of the traces were made for the page, "clean" or "attacked".
    """

    clean: InstanceRoutes | None
    attacked: InstanceRoutes | None
    clean_influence: MeanInfluence | None = None
    attacked_influence: MeanInfluence | None = None
    traced: tuple[str, ...] = ()


def measure(
    model: nn.Module,
    data: Data,
    run: RunFolder,
    attack: Attack | None,
    *,
    linear: bool = False,
    width: float = 0.2,
    progress: Progress | None = None,
) -> Measured:
    """Mean influence on clean and on attacked images, and those of the two traces that the run lacks.

    Args:
        model: The network of the run.
        data: A few images with labels; their attacked twins are held in memory.
        run: The run's folder.
        attack: What to do to the images; None leaves attacked influence out.
        linear: Whether linear maps are route layers too.
        width: Share of each layer's channels on a sample's route, for new traces.
        progress: Called with the batches' samples that are done, for each of the passes.

    Raises:
        UserError: The model has other layers than the run's routes, or cannot be traced.
    """
    clean_influence = mean_influence(model, data, linear=linear, progress=progress)
    for routes in (run.routes, run.attacked):
        if routes is not None:
            require_same(routes.channels, clean_influence.channels, "the model")
    if run.route is not None:
        require_same(run.route.channels, clean_influence.channels, "the model")
    traced = []
    clean = run.routes
    if clean is None:
        clean = trace_routes(model, data, width, linear=linear, progress=progress)
        traced.append("clean")
    if attack is None:
        return Measured(clean, run.attacked, clean_influence, None, tuple(traced))
    images = _attacked_batches(model, data, attack)
    found = run.attacked
    if found is None:
        found = trace_routes(model, images, width, linear=linear, progress=progress)
        found = replace(found, provenance=replace(found.provenance, attack=attack_name(attack)))
        traced.append("attacked")
    influence = mean_influence(model, images, linear=linear, progress=progress)
    return Measured(clean, found, clean_influence, influence, tuple(traced))


def _attacked_batches(model: nn.Module, data: Data, attack: Attack) -> list[tuple[Tensor, Tensor]]:
    with frozen(model):
        found = [attacked(model, attack, images, labels) for images, labels in batches(model, data, 128)]
    if not found:
        raise UserError("the data hold no sample: the loader is empty")
    return found
