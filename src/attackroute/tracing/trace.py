"""Critical attacking routes of samples (Eqs. (3)-(6)), streaming over data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attackroute.core.batches import BatchStream, Data, batches
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.loss import Loss, seed_gradients
from attackroute.core.model_state import autocast_of, explained, frozen
from attackroute.robustness.attack import Attack, attack_name, attacked
from attackroute.routes import masks
from attackroute.routes.instance_routes import InstanceRoutes, InstanceRoutesBuilder
from attackroute.routes.masks import check_width, top_k
from attackroute.routes.provenance import Provenance
from attackroute.routes.sketch_errors import SketchNotes
from attackroute.tracing.closed_form import critical_sums, influence_matrix
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.frozen_gates import FrozenGates
from attackroute.tracing.noise import NOISE, UNIT, NoiseTracker, check_carrier
from attackroute.tracing.open_edges import Mixing, Products, Ranked, Sketcher
from attackroute.tracing.recorder import RecordedLayer, record
from attackroute.tracing.replay import Replays
from attackroute.tracing.segments import Segments
from attackroute.tracing.sketches import AUTO, Sketches, check_sketches
from attackroute.tracing.structure import AUTOGRAD, REPLAY, SKETCH, Structure


def seed_scores(kind: str, output: Tensor, gradient: Tensor, noise: bool, dtype: torch.dtype) -> Tensor:
    """What Eq. (4) ranks at a sink: ``sum over positions of |dL/dZ|``, or for noise of ``(Z(x') - Z(x)) dL/dZ(x')``.

    The latter keeps its sign: it is, to first order, how much of the loss the neuron's noise has brought about.

    Args:
        kind: ``"conv2d"`` or ``"linear"``.
        output: The sink's output Z; for noise n clean rows, then the attacked ones.
        gradient: dL/dZ, shaped like it.
        noise: Whether noise is what is followed.
        dtype: Of the result.

    Returns:
        ``(n, C)``.
    """
    if noise:
        clean, attacked = output.detach().to(dtype).chunk(2)
        size = (attacked - clean).mul_(gradient.chunk(2)[1])
    else:
        size = gradient.abs()
    if kind == "conv2d":
        size = size.movedim(1, -1)
    return size.flatten(1, -2).sum(1, dtype=dtype) if size.ndim > 2 else size.to(dtype)


Progress = Callable[[int, "int | None"], None]
"""Called after every batch with the number of samples done and, where known, in all."""


def trace_routes(
    model: nn.Module,
    data: Data,
    width: float = 0.2,
    *,
    attack: Attack | None = None,
    config: TraceConfig | None = None,
    carrier: str = UNIT,
    loss: Loss | None = None,
    linear: bool = False,
    keep_scores: bool = False,
    batch_size: int = 128,
    sketches: Sketches = None,
    seed: int = 0,
    freeze_gates: bool = False,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> InstanceRoutes:
    """Critical attacking routes of every sample (Eqs. (1)-(6)), exact unless ``sketches`` are asked for.

    The model runs in eval mode on the device of its parameters and comes back as it was.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: A DataLoader (any iterable) of ``(images, labels)`` or of images, or one such pair or batch of tensors.
            Samples without labels are traced for the model's own prediction.
        width: Share of each layer's channels that a sample's route keeps, in (0, 1].
        config: How routes are traced; instead of the options of the same names.
        attack: Trace what this makes of the images, as in ``ar.parse_attack("pgd")``; a sample without a label is
            attacked, and then traced, for the model's prediction on its clean image.
        carrier: What is pushed through the segments between layers: ``"unit"``, ones, which is the paper's influence,
            or ``"noise"``, what ``attack`` changes at each layer's input, exact as well; see docs/definitions.md.
        loss: ``(logits, labels) -> losses (N,)``; None is cross entropy, whose gradient is exact at any confidence.
        linear: Whether linear maps are route layers too; their neurons are output features.
        keep_scores: Keep the scores that top-k ranked, (N, C) per layer; memory then grows with them.
        batch_size: Rows per forward pass when ``data`` is tensors; a DataLoader brings its own.
        sketches: Estimate edges that have no closed form (attention, layer norm, ...) from so many random products each
            instead of one product per element, which can take thousands of times as long. **Approximate**: such an
            edge's method is ``"sketch"``, and ``routes.sketched`` says how far each layer can be trusted. A multiple of
            8, such as 32, or ``"auto"``: 32, doubled per layer and sample until 95 % of the kept channels are
            expected to be the exact ones, or at most 512. None computes these edges exactly.
        seed: Of the sketches. An image's numbers depend on it and the image alone, not on its batch.
        freeze_gates: Take normaliser statistics, attention weights and squeeze-excite gates as constants when
            differentiating, as propagation rules do. **Approximate**, but group and layer norm between convolutions
            then have a closed form.
        autocast: Run the forward pass under autocast in this dtype (bfloat16, float16).
        progress: Called with (samples done, samples in all or None) after every batch.

    Returns:
        The instance routes, with the method by which each edge was computed.

    Raises:
        UserError: There is no route layer, an input does not fit the model, values are not finite, or the carrier is
            unknown, lacks an attack, or cannot be sketched.
    """
    check_width(width)
    if config is not None:
        linear, carrier, sketches = config.linear, config.carrier, config.sketches
        seed, freeze_gates = config.seed, config.freeze_gates
    check_sketches(sketches)
    check_carrier(carrier, attack, sketches, freeze_gates=freeze_gates)
    parts: list[InstanceRoutes] = []
    done = 0
    with frozen(model), autocast_of(model, autocast):
        stream = BatchStream(model, data, batch_size)
        tracer = RouteTracer.probe(
            model, stream.first[0], width, attack=attack, carrier=carrier, loss=loss, linear=linear,
            keep_scores=keep_scores, sketches=sketches, seed=seed, freeze_gates=freeze_gates,
        )  # fmt: skip
        for part in stream.map(tracer.trace):
            if parts and (part.labels is None) != (parts[0].labels is None):
                raise UserError("labels must come with every batch or with none")
            parts.append(part)
            done += len(part)
            if progress is not None:
                progress(done, stream.total)
    return InstanceRoutes.concatenate(parts)


def influence(model: nn.Module, x: Tensor, source: str, target: str, *, linear: bool = False) -> Tensor:
    """Influence of every channel of one route layer on every channel of an adjacent one (Eqs. (1)-(2)).

    Args:
        model: The network.
        x: ``(N, C, H, W)`` batch of images.
        source: Name of the earlier layer.
        target: Name of a layer that follows it directly.
        linear: Whether linear maps are route layers too.

    Returns:
        ``(N, C_target, C_source)``: the sum over both channels' positions of ``|dZ_target / dZ_source|``.

    Raises:
        UserError: A name is unknown, or the layers are not adjacent.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"x is {type(x).__name__}: pass the images as one tensor (N, C, H, W)")
    with frozen(model):
        for images, _ in batches(model, x, x.shape[0] or 1):
            structure, _ = Structure.probe(model, images, linear=linear)
            names, methods = structure.names, structure.methods
            for name in (source, target):
                if name not in names:
                    raise UserError(f"no route layer {name!r} ran: the layers are {', '.join(names)}")
            if (source, target) not in methods:
                after = ", ".join(later for earlier, later in methods if earlier == source) or "no route layer"
                raise UserError(f"{source!r} and {target!r} are not adjacent; directly after {source!r}: {after}")
            if methods[source, target] == AUTOGRAD:
                return Segments(model, images, {target: [source]}, linear=linear).influence(target)[source]
            layers = structure.applied(record(model, images, linear=linear).layers)
            index = names.index(source)
            return influence_matrix(layers[names.index(target)], index, structure.counts[index], images.shape[0])
    raise UserError("the batch holds no image")


@dataclass(frozen=True, eq=False)
class RouteTracer:
    """Traces batches of one model, each for itself; for the attributes see :func:`trace_routes`.

    The caller holds the model frozen.
    """

    engine: _Engine
    width: float
    attack: Attack | None
    loss: Loss | None
    keep_scores: bool

    @classmethod
    def probe(
        cls,
        model: nn.Module,
        images: Tensor,
        width: float,
        *,
        attack: Attack | None = None,
        carrier: str = UNIT,
        loss: Loss | None = None,
        linear: bool = False,
        keep_scores: bool = False,
        sketches: Sketches = None,
        seed: int = 0,
        freeze_gates: bool = False,
    ) -> RouteTracer:
        """Run the model on some images, the data's first, to learn its route layers and edges."""
        engine = _Engine.probe(
            model, images, carrier=carrier, linear=linear, sketches=sketches, seed=seed, freeze=freeze_gates
        )
        return cls(engine, width, attack, loss, keep_scores)

    def trace(self, images: Tensor, labels: Tensor | None) -> InstanceRoutes:
        """Routes of one batch, on the CPU."""
        model, structure = self.engine.model, self.engine.structure
        shown, answers = (images, labels) if self.attack is None else attacked(model, self.attack, images, labels)
        clean = images if self.engine.carrier == NOISE else None
        result = self.engine.trace(shown, answers, self.width, self.loss, clean)
        builder = InstanceRoutesBuilder(structure.names, structure.channels, self.width, keep_scores=self.keep_scores)
        builder.add(
            result.masks,
            labels=result.labels if labels is not None else None,
            predictions=result.predictions,
            scores=result.scores if self.keep_scores else None,
            sketched=result.notes(structure.channels, keep_errors=self.keep_scores),
        )
        name = None if self.attack is None else attack_name(self.attack)
        origin = self.engine.provenance(Provenance(len(images), self.width, attack=name))
        return builder.build(methods=structure.methods, provenance=origin)


@dataclass(frozen=True, eq=False)
class _Traced:
    ranked: dict[str, Ranked]
    labels: Tensor
    predictions: Tensor

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: layer.mask for name, layer in self.ranked.items()}

    @property
    def scores(self) -> dict[str, Tensor]:
        return {name: layer.scores for name, layer in self.ranked.items()}

    def notes(self, channels: dict[str, int], *, keep_errors: bool) -> SketchNotes | None:
        """What is known of the errors, where edges were sketched."""
        cuts = {name: layer.cut for name, layer in self.ranked.items() if layer.cut is not None}
        if not cuts:
            return None
        return SketchNotes(
            channels,
            {name: layer.draws.cpu() for name, layer in self.ranked.items() if layer.draws is not None},
            {name: cut.overlap.float().cpu() for name, cut in cuts.items()},
            {name: masks.pack(cut.undecided) for name, cut in cuts.items()},
            {name: cut.errors.cpu() for name, cut in cuts.items()} if keep_errors else {},
        )


@dataclass(frozen=True, eq=False)
class _Engine:
    """The computation of a batch, on the structure that a probe of the model showed."""

    model: nn.Module
    carrier: str
    linear: bool
    structure: Structure
    sketches: Sketches
    seed: int
    freeze: bool

    @classmethod
    def probe(
        cls,
        model: nn.Module,
        images: Tensor,
        *,
        carrier: str,
        linear: bool,
        sketches: Sketches,
        seed: int,
        freeze: bool,
    ) -> _Engine:
        """Run the model on the first images to learn its route layers and edges."""
        elsewhere = REPLAY if carrier == NOISE else AUTOGRAD if sketches is None else SKETCH
        follow = NoiseTracker if carrier == NOISE else None
        with _gates(freeze):
            structure, output = Structure.probe(model, images, linear=linear, elsewhere=elsewhere, follow=follow)
        checked_logits(output, 2)
        return cls(model, carrier, linear, structure, sketches, seed, freeze)

    def provenance(self, origin: Provenance) -> Provenance:
        """The origin of routes, which says so where it is approximate."""
        criterion = NOISE if self.carrier == NOISE else origin.criterion
        if self.freeze:
            criterion += " with frozen gates, approximate"
        if SKETCH not in self.structure.methods.values():
            return replace(origin, criterion=criterion)
        number = self.sketches if self.sketches == AUTO else f"{self.sketches} sketches"
        return replace(origin, criterion=f"{criterion}, approximate ({number})", seed=self.seed)

    def trace(
        self, images: Tensor, labels: Tensor | None, width: float, loss: Loss | None, clean: Tensor | None
    ) -> _Traced:
        """Routes of one batch: Eqs. (3)-(6); ``clean`` are the images before the attack whose noise is followed."""
        with _gates(self.freeze):
            return self._trace(images, labels, width, loss, clean)

    def _trace(
        self, images: Tensor, labels: Tensor | None, width: float, loss: Loss | None, clean: Tensor | None
    ) -> _Traced:
        names, sinks = self.structure.names, self.structure.sinks
        samples, shown = images.shape[0], images if clean is None else torch.cat([clean, images])
        follow = None if clean is None else NoiseTracker
        with explained(images):
            recording = record(self.model, shown, linear=self.linear, leaves=sinks, expected=len(names), follow=follow)
        layers = self.structure.applied(recording.layers)
        logits = checked_logits(recording.output, shown.shape[0])
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode, the seeds need the graph
            logits = logits[-samples:]
        predictions = logits.detach().argmax(dim=1)
        labels = predictions if labels is None else checked_labels(labels, logits.shape[1], samples)
        seeds = seed_gradients(logits, labels, dict(recording.leaves), loss)
        dtype = torch.promote_types(images.dtype, torch.float32)
        scores = {  # Eq. (4); layers with successors start from zero
            index: seed_scores(layer.kind, recording.leaves[layer.name], seeds[layer.name], clean is not None, dtype)
            if layer.name in sinks
            else torch.zeros(samples, layer.channels, dtype=dtype, device=images.device)
            for index, layer in enumerate(layers)
        }
        mixing = self._mixing(shown, images, layers, width)
        ranked: dict[str, Ranked] = {}
        for index in reversed(range(len(layers))):  # every successor of a layer comes after it
            layer, score = layers[index], scores[index]
            found = Ranked(score, top_k(score, width)) if mixing is None else mixing.rank(layer.name, score)
            ranked[layer.name] = found
            critical_sums(layer, found.mask, scores)  # Eq. (5)
            if mixing is not None and layer.jacobian:
                mixing.follow(layer.name, found.mask)
        return _Traced({name: ranked[name] for name in names}, labels, predictions)

    def _mixing(self, shown: Tensor, images: Tensor, layers: Sequence[RecordedLayer], width: float) -> Mixing | None:
        """What computes the edges without a closed form; None where there is no such edge."""
        edges = self.structure.jacobian_edges
        if not edges:
            return None
        if self.carrier == NOISE:
            return Replays(self.model, shown, layers, edges, width, linear=self.linear)
        segments = Segments(self.model, images, edges, linear=self.linear, fused=self.sketches is not None)
        if self.sketches is None:
            return Products(segments, width)
        return Sketcher(segments, images, self.sketches, self.seed, width)


def _gates(freeze: bool) -> AbstractContextManager[object]:
    return FrozenGates() if freeze else nullcontext()
