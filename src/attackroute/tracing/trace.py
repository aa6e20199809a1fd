"""Critical attacking routes of samples (Eqs. (3)-(6)), streaming over data."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from attackroute.core.batches import BatchStream, Data, batches_in_order
from attackroute.core.checks import checked_labels, checked_logits, require_no_probabilities
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM
from attackroute.core.loss import Loss, seed_gradients
from attackroute.core.model_state import autocast_of, explained, frozen, placement, weights_digest
from attackroute.robustness.attack import Attack, attack_name, attacked
from attackroute.robustness.registry import as_attack
from attackroute.routes.folder import RouteFolder, RouteWriter
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import check_ranked, check_width
from attackroute.routes.provenance import Provenance
from attackroute.tracing.closed_form import critical_sums, passage_sums, per_deviation
from attackroute.tracing.config import NOISE, RAW, STD, TraceConfig
from attackroute.tracing.cuda_graph import GraphedPasses
from attackroute.tracing.deviations import Progress as Progress  # noqa: PLC0414, found here by what traces
from attackroute.tracing.noise import NoiseTracker
from attackroute.tracing.open_edges import OpenEdges, Products, Ranked, RankedBatch, Replays
from attackroute.tracing.recorder import RecordedLayer, record
from attackroute.tracing.segments import Segments
from attackroute.tracing.structure import AUTOGRAD, REPLAY, SKETCH, Structure


def seed_scores(kind: str, output: Tensor, gradient: Tensor, noise: bool, dtype: torch.dtype) -> Tensor:
    """What Eq. (4) ranks at a sink: ``sum over positions of |dL/dZ|``, or for noise of ``(Z(x') - Z(x)) dL/dZ(x')``.

    The latter keeps its sign: it is, to first order, how much of the loss the neuron's noise has brought about. For
    noise, the output Z of a layer of this ``kind`` has n clean rows, then the attacked ones. Returns ``(n, C)``.
    """
    if noise:
        clean, attacked = output.detach().to(dtype).chunk(2)
        size = (attacked - clean).mul_(gradient.chunk(2)[1])
    else:
        size = gradient.abs()
    size = size.movedim(CHANNEL_DIM[kind], -1)
    return size.flatten(1, -2).sum(1, dtype=dtype) if size.ndim > 2 else size.to(dtype)


Note = Callable[[str], object]
"""Called with a sentence for the user."""


# fmt: off
@overload
def trace_routes(
    model: nn.Module, data: Data, width: float = ..., *, attack: Attack | str | None = ..., config: TraceConfig = ...,
    loss: Loss | None = ..., keep_scores: bool = ..., batch_size: int = ..., autocast: torch.dtype | None = ...,
    folder: None = ..., resume: bool = ..., settings: Mapping[str, Any] | None = ..., note: Note | None = ...,
    progress: Progress | None = ...
) -> InstanceRoutes: ...
@overload
def trace_routes(
    model: nn.Module, data: Data, width: float = ..., *, attack: Attack | str | None = ..., config: TraceConfig = ...,
    loss: Loss | None = ..., keep_scores: bool = ..., batch_size: int = ..., autocast: torch.dtype | None = ...,
    folder: str | os.PathLike[str], resume: bool = ..., settings: Mapping[str, Any] | None = ...,
    note: Note | None = ..., progress: Progress | None = ...
) -> RouteFolder: ...
# fmt: on
def trace_routes(
    model: nn.Module,
    data: Data,
    width: float = 0.2,
    *,
    attack: Attack | str | None = None,
    config: TraceConfig = TraceConfig(),
    loss: Loss | None = None,
    keep_scores: bool = False,
    batch_size: int = 128,
    autocast: torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    note: Note | None = None,
    progress: Progress | None = None,
) -> InstanceRoutes | RouteFolder:
    """Critical attacking routes of every sample (Eqs. (1)-(6)), exact unless the config asks for an approximation.

    The model runs in eval mode on the device of its parameters and comes back as it was.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: A DataLoader (any iterable) of ``(images, labels)`` or of images, or one such pair or batch of tensors.
            Samples without labels are traced for the model's own prediction.
        width: Share of each layer's channels that a sample's route keeps, in (0, 1].
        attack: Trace what this makes of the images, such as ``"pgd"`` or any callable that takes model, images and
            labels; a sample without a label is attacked, and then traced, for the prediction on its clean image.
        config: Which layers are route layers, what is followed between them, and whether exactly; see
            :class:`attackroute.TraceConfig`.
        loss: ``(logits, labels) -> losses (N,)``; None is cross entropy, whose gradient is exact at any confidence.
        keep_scores: Keep the scores that top-k ranked, (N, C) per layer; memory then grows with them.
        batch_size: Rows per forward pass when ``data`` is tensors; a DataLoader brings its own.
        autocast: Run the forward pass under autocast in this dtype (bfloat16, float16).
        folder: Write the routes there while they are traced, instead of holding them in memory, with the model's route
            and a summary. The data must come in the same order every time. An interruption keeps what is done.
        resume: Go on with the trace in the folder, finished or not, if it holds one; the model, the first image and
            all settings must be the same.
        settings: What else the routes depend on, as JSON values, to be kept with them: ``model``, ``data``, ``split``
            and ``seed`` say where routes come from.
        note: Called with a sentence for each file in the folder that is damaged, and where samples are done already;
            None warns of the former.
        progress: Called with (samples done, samples in all or None) after every batch; with a folder also before them.

    Returns:
        The instance routes, with the method by which each edge was computed; in the folder, if one is given.

    Raises:
        UserError: There is no route layer, an input does not fit the model, values are not finite, the carrier lacks
            an attack, or the folder cannot be used.
    """
    check_width(width)
    attack = None if attack is None else as_attack(attack)
    config.check_attack(attack)
    if folder is None and resume:
        raise UserError("resume=True goes on with the trace in a folder: give folder=...")
    samples, rows = (0, batch_size) if folder is None else batches_in_order(data, batch_size)
    with frozen(model), autocast_of(model, autocast):
        config = config.measured(model, data, batch_size)
        # for a folder always the first batch, whatever is missing there, so that nothing depends on it
        stream = BatchStream(model, data, batch_size, None if folder is None else [0])
        images = stream.first[0]
        tracer = Tracer(model, images, width, attack, config, loss, keep_scores, settings or {})
        settings = {} if folder is None else tracer.file_settings(images, samples, rows, autocast)
        del images  # else it would be held while all others are traced
        if folder is None:
            routes = InstanceRoutes.concatenate(_traced(tracer, stream, progress))
            _remark_unranked(routes, note)
            return routes
        writer = RouteWriter(folder, settings, samples, rows)
        gaps = current().first(lambda: writer.begin(model, resume=resume))
        for fault in (fault for gap in gaps for fault in gap.faults):
            (note or warnings.warn)(f"note: {fault}")
        done = samples - sum(gap.stop - gap.start for gap in gaps)
        if done and note is not None:
            note(f"{done} of {samples} samples are done already")
        if progress is not None:
            progress(done, samples)
        numbers = [number for gap in gaps for number in range(gap.start // rows, -(-gap.stop // rows))]
        if numbers:
            _write(_traced(tracer, BatchStream(model, data, batch_size, numbers), progress, done), writer)
        stored = current().first(writer.finish)
        _remark_unranked(stored, note)
        return stored


def _remark_unranked(routes: InstanceRoutes | RouteFolder, note: Note | None) -> None:
    """Name each layer without a score but zero; a `UserError` if those from which routes start have none at all.

    An attack without an effect makes no noise, and that is a result.
    """
    counts = dict(zip(routes.layers, routes.totals["unranked"].tolist(), strict=True))
    sinks = counts.keys() - {source for source, _ in routes.methods}
    if not routes.provenance.criterion.startswith(NOISE) and all(counts[sink] == len(routes) for sink in sinks):
        raise UserError(
            f"all scores of the last layers ({', '.join(sorted(sinks))}) are zero, so nothing is left to start from: "
            "is the network dead, the loss without a gradient, or, with units='std', no neuron different over the data?"
        )
    for layer, count in counts.items():
        text = f"all scores of layer {layer!r} are zero for {count} of {len(routes)} samples: there, their routes are "
        if count and note is not None:
            note(f"note: {text}the first channels by index")
        elif count and current().leads:
            warnings.warn(f"{text}the first channels by index", stacklevel=3)


def _write(batches_of_routes: Iterator[InstanceRoutes], writer: RouteWriter) -> None:
    """Write what is traced, by the first process; an interruption keeps what is done."""
    leads = current().leads
    try:
        for routes in batches_of_routes:
            if leads:
                writer.add(routes)
    except BaseException:
        if leads:
            writer.keep()
        raise


def _traced(tracer: Tracer, stream: BatchStream, progress: Progress | None, done: int = 0) -> Iterator[InstanceRoutes]:
    """The routes of batch after batch, ``done`` samples having been traced before."""
    labelled: bool | None = None
    for routes in stream.map(tracer.trace):
        if labelled is not None and (routes.labels is not None) != labelled:
            raise UserError("labels must come with every batch or with none")
        labelled = routes.labels is not None
        yield routes
        done += len(routes)
        if progress is not None:
            progress(done, stream.total)


@dataclass(eq=False)
class Tracer:
    """Traces batches of one model, each for itself, on the structure that it shows on some images, the data's first.

    The caller holds the model frozen. For the attributes see :func:`trace_routes`.
    """

    model: nn.Module
    first: InitVar[Tensor]
    width: float
    attack: Attack | None = None
    config: TraceConfig = TraceConfig()
    loss: Loss | None = None
    keep_scores: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    passes: GraphedPasses = field(default_factory=GraphedPasses)

    def __post_init__(self, first: Tensor) -> None:
        linear, noise = self.config.linear, self.config.follows_noise
        elsewhere = REPLAY if noise else AUTOGRAD if self.config.sketches is None else SKETCH
        follow = NoiseTracker if noise else None
        structure, output = Structure.probe(self.model, first, linear=linear, elsewhere=elsewhere, follow=follow)
        logits = checked_logits(output, 2)
        if self.loss is None:
            require_no_probabilities(logits)
        self.structure, self.classes = structure.of_the_output(), logits.shape[1]

    def trace(self, images: Tensor, labels: Tensor | None) -> InstanceRoutes:
        """Routes of one batch, on the CPU."""
        traced, answers = (images, labels) if self.attack is None else attacked(self.model, self.attack, images, labels)
        if answers is not None:
            answers = checked_labels(answers, self.classes if self.loss is None else None, len(images))
        if self.config.follows_noise:
            result = self._ranked(traced, answers, images)
        elif images.device.type == "cuda" and not (self.structure.jacobian_edges or self.structure.passing):
            result = self.passes.run(self._ranked, traced, answers)
        else:
            result = self._ranked(traced, answers)
        checked_logits(result.logits, len(images))
        ranked = result.layers
        check_ranked(layer.scores for layer in ranked.values())
        return InstanceRoutes.from_masks(
            {name: layer.mask for name, layer in ranked.items()},
            self._provenance(len(images)),
            labels=None if labels is None else answers,
            predictions=result.predictions,
            methods=self.structure.methods,
            scores={name: layer.scores for name, layer in ranked.items()} if self.keep_scores else None,
            unranked=torch.stack([~layer.scores.any(1) for layer in ranked.values()], 1),
        )

    def _ranked(self, images: Tensor, labels: Tensor | None, clean: Tensor | None = None) -> RankedBatch:
        """Eqs. (3)-(6) for one batch, with ``clean`` images where it is an attack's noise that is followed.

        Nothing waits for the device, unless an edge has no closed form: values are checked when all is done.
        """
        names, sinks = self.structure.names, self.structure.sinks
        samples, passed = images.shape[0], images if clean is None else torch.cat([clean, images])
        follow, linear = None if clean is None else NoiseTracker, self.config.linear
        with explained(images):
            leaves = sinks | self.structure.cut
            recording = record(self.model, passed, linear=linear, leaves=leaves, expected=names, follow=follow)
        deviations = self.config.deviations
        layers = self.structure.applied(recording.layers)
        if deviations is not None:
            layers = tuple(per_deviation(layer, deviations) for layer in layers)
        logits = checked_logits(recording.output, passed.shape[0], finite=False)
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode, the seeds need the graph
            logits = logits[-samples:]
        predictions = logits.detach().argmax(dim=1) if logits.shape[1] > 1 else (logits.detach()[:, 0] > 0).long()
        answers = predictions if labels is None else labels
        seeds = seed_gradients(logits, answers, {name: recording.leaves[name] for name in sinks}, self.loss)
        dtype = torch.promote_types(images.dtype, torch.float32)
        scores = {  # Eq. (4); layers with successors start from zero
            index: seed_scores(layer.kind, recording.leaves[layer.name], seeds[layer.name], clean is not None, dtype)
            if layer.name in sinks
            else torch.zeros(samples, layer.channels, dtype=dtype, device=images.device)
            for index, layer in enumerate(layers)
        }
        open_edges = self._open_edges(passed, images, layers)
        ranked: dict[str, Ranked] = {}
        for index in reversed(range(len(layers))):  # every successor of a layer comes after it
            layer = layers[index]
            if index in self.structure.idle:
                continue
            # noise comes in the neuron's own units, whatever these are
            own = None if deviations is None or clean is not None else deviations.power(1, layer.name, scores[index])
            ranked[layer.name] = open_edges.rank(layer.name, scores[index], own)
            critical = ranked[layer.name].mask
            critical_sums(layer, critical, scores)  # Eq. (5)
            passage_sums(layer, critical, scores, recording)
            if layer.jacobian:
                check_ranked([ranked[layer.name].scores])
                open_edges.follow(layer.name, critical)
        return RankedBatch({name: ranked[name] for name in self.structure.layers}, logits.detach(), predictions)

    def _open_edges(self, passed: Tensor, images: Tensor, layers: Sequence[RecordedLayer]) -> OpenEdges:
        """What computes the edges without a closed form."""
        edges, sketches = self.structure.jacobian_edges, self.config.sketches
        if not edges:
            return OpenEdges(self.width)
        if self.config.follows_noise:
            return Replays(self.model, passed, layers=layers, edges=edges, width=self.width, linear=self.config.linear)
        segments = Segments(
            self.model, images, edges, linear=self.config.linear, fused=sketches is not None,
            deviations=self.config.deviations,
        )  # fmt: skip
        return Products(segments, images, width=self.width, sketches=sketches, seed=self.config.seed)

    def _provenance(self, samples: int) -> Provenance:
        """Where the routes of some samples come from, with a word on what is approximate."""
        approximate = SKETCH in self.structure.methods.values()
        criterion = NOISE if self.config.follows_noise else Provenance.criterion
        criterion += f", units {STD}" if self.config.deviations else ""
        if approximate:
            criterion += f", approximate ({self.config.sketches} sketches)"
        names = [self.settings[key] for key in ("data", "split") if self.settings.get(key) is not None]
        seed = self.settings.get("seed", self.config.seed if approximate else None)
        model, data = self.settings.get("model"), " ".join(names) or None
        attack = None if self.attack is None else attack_name(self.attack)
        return Provenance(samples, self.width, model=model, data=data, attack=attack, seed=seed, criterion=criterion)

    def file_settings(self, images: Tensor, samples: int, rows: int, autocast: torch.dtype | None) -> dict[str, Any]:
        """All on which routes in files depend, as JSON values; the first of ``images`` stands for all of them."""
        device, dtype = placement(self.model)
        return {
            **self.settings,
            "weights": weights_digest(self.model),
            "images": [samples, *images.shape[1:]],
            "first-image": hashlib.sha256(images[0].cpu().double().numpy().tobytes()).hexdigest()[:16],
            "width": self.width,
            "attack": self._provenance(samples).attack,
            "loss": None if self.loss is None else getattr(self.loss, "__qualname__", type(self.loss).__qualname__),
            "carrier": self.config.carrier,
            "linear": self.config.linear,
            "units": f"{STD} {deviations.digest}" if (deviations := self.config.deviations) else RAW,
            "sketches": self.config.sketches,
            "sketch-seed": self.config.seed,
            "keep-scores": self.keep_scores,
            "batch-size": rows,
            "dtype": str(autocast or dtype).removeprefix("torch."),
            "device": device.type,
        }
