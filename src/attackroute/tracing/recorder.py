"""One forward pass, recorded: route layers, how they are joined, and the window sums of every closed-form edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls, others_visit_linear_maps, require_gradients
from attackroute.core.model_state import explained
from attackroute.tracing.crossings import Held, Passage, passages
from attackroute.tracing.flow import EMPTY, Flow, Term, opaque
from attackroute.tracing.pass_checks import GraphWalk, Separation
from attackroute.tracing.rules.elements import followed
from attackroute.tracing.rules.operation import RULES, Operation, Reading, only_restrides, tensors_in, without_rule
from attackroute.tracing.trails import UNTOUCHED, Trail
from attackroute.tracing.windows import Axes, Axis, GainSums, PatternSums

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a closed-form edge: a range of source channels as the target's input carries it.

    Attributes:
        source: Index of the source layer.
        src: First of ``length`` channels of the source.
        dst: First of ``length`` input channels of the target.
        sums: ``N``: ``(n or 1, length, kh, kw)``, gains summed over the positions each kernel offset meets; for
            a map behind overlapping pooling a list, one entry per pattern of windows.
        scale: ``(length,)``, factor per channel, or None.
    """

    source: int
    src: int
    dst: int
    length: int
    sums: Tensor | list[PatternSums]
    scale: Tensor | None


@dataclass(frozen=True, eq=False)
class RecordedLayer:
    """One executed route layer.

    Attributes:
        kind: ``"conv2d"`` or ``"linear"``.
        channels: Number of neurons.
        weight: The executed weight, ``(C_out, C_in / groups, kh, kw)``; for linear maps ``(C_out, C_in, P, 1)``
            with P positions per input channel.
        axes: Vertical and horizontal axis of the kernel.
        pieces: Closed-form contributions of earlier layers.
        jacobian: Sources whose edge needs the Jacobian path.
        passages: Closed-form contributions of earlier layers, element by element.
        read: What the layer read.
    """

    name: str
    kind: str
    channels: int
    weight: Tensor
    groups: int
    axes: Axes | None
    pieces: tuple[Piece, ...]
    jacobian: frozenset[int]
    passages: tuple[Passage, ...] = ()
    read: Held | None = None

    @property
    def sources(self) -> frozenset[int]:
        """Indices of the adjacent earlier layers."""
        return self.jacobian.union(self.passed, (piece.source for piece in self.pieces))

    @property
    def passed(self) -> frozenset[int]:
        """Indices of the sources whose closed form goes element by element."""
        return frozenset[int]().union(*(passage.sources for passage in self.passages))

    @property
    def mixing(self) -> frozenset[int]:
        """Indices of the sources of which it is not known which input channels carry their neurons."""
        return self.jacobian | self.passed

    def corrected(self, closed: frozenset[int], jacobian: frozenset[int]) -> RecordedLayer:
        """The layer with only these sources, each computed in the given way."""
        pieces = tuple(piece for piece in self.pieces if piece.source in closed)
        cut = (replace(passage, sources=passage.sources & closed) for passage in self.passages)
        passages = tuple(passage for passage in cut if passage.sources)
        return replace(self, pieces=pieces, jacobian=jacobian, passages=passages)

    def settled(self) -> RecordedLayer:
        """The layer once the pass is over: what was written to since cannot serve a closed form."""
        kept = tuple(each for each in self.passages if each.crossing is None or each.crossing.kept)
        gone = self.passed.difference(*(passage.sources for passage in kept))
        return replace(self, passages=kept, jacobian=self.jacobian | gone) if gone else self


@dataclass(frozen=True, eq=False)
class Recording:
    """What one forward pass showed: the route layers in execution order, and the model's output."""

    layers: tuple[RecordedLayer, ...]
    output: Any
    leaves: Mapping[str, Tensor]  # outputs of the layers asked for as leaves that require grad, by name

    def leaf(self, index: int) -> tuple[Tensor, str]:
        """The leaf of a layer, by the layer's index, and the layer's kind."""
        return self.leaves[self.layers[index].name], self.layers[index].kind


def record(
    model: nn.Module,
    images: Tensor,
    *,
    linear: bool = False,
    leaves: frozenset[str] = frozenset(),
    sums: bool = True,
    expected: Sequence[str] | None = None,
    graph: GraphWalk | None = None,
    separation: Separation | None = None,
    follow: type[Tracker] | None = None,
) -> Recording:
    """Run a frozen model (:func:`attackroute.core.model_state.frozen`) on a batch and record its route layers.

    Args:
        images: ``(n, ...)`` on the model's device.
        linear: Whether linear maps are route layers too.
        leaves: Layers whose output becomes a leaf that requires grad, so that what follows can be differentiated.
        sums: Whether to gather window sums; without, only the structure is recorded.
        expected: The route layers, where they are known: nothing needs following after the last one.
        graph, separation: See every layer's output, and every operation; the images must then require grad.
        follow: What follows the pass; None for a `Tracker`, which follows derivatives.
    """
    count, leaf_outputs = len(expected) if expected else None, dict[str, Tensor]()
    tracker = (follow or Tracker)(images.shape[0], gather=sums, expected=count, separation=separation)

    def visit(call: LayerCall) -> Tensor:
        known = call.name in expected if expected else graph is None or call.of_images(len(images))
        if call.kind == "linear" and not known:
            return call.run()  # as the map that makes the biases of positions: no neurons of the images
        require_gradients(call.name)
        tracker.call = call
        try:
            output = call.run()
            with DisableTorchFunction():  # contexts around the pass are not to see what is only noted
                if call.kind == "linear":
                    tracker.linear(call, output)
                tracker.take_edit(output)
        finally:
            tracker.call = None
        if graph is not None:
            output = graph.visit(call.name, call.kind, output)
        if call.name in leaves:
            leaf = leaf_outputs[call.name] = output.detach().requires_grad_()
            with DisableTorchFunction():
                tracker.take_over(leaf, output)
            output = leaf.clone()  # a copy, since what follows may work in place
        return output

    # attention in steps that can be followed
    attention = sdpa_kernel(SDPBackend.MATH) if linear else nullcontext()
    calls = LayerCalls(model, visit, linear=linear)
    with torch.inference_mode(False), torch.enable_grad(), attention, calls, tracker:
        output = model(images.clone())  # a copy, since a model may work on its input in place
    tracker.require_kept_kernels()
    return Recording(tuple(layer.settled() for layer in tracker.layers), output, leaf_outputs)


def record_first(
    model: nn.Module,
    images: Tensor,
    *,
    linear: bool,
    graph: GraphWalk | None = None,
    separation: Separation | None = None,
    follow: type[Tracker] | None = None,
) -> Recording:
    """Record the structure on a few images, with errors that speak of the input; arguments as of :func:`record`.

    Raises:
        UserError: The model cannot run on the images, is TorchScript, or runs no route layer.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError("the model is TorchScript, at least in part, which hides its operations: pass the eager model")
    with explained(images):
        recording = record(model, images, linear=linear, sums=False, graph=graph, separation=separation, follow=follow)
    if not recording.layers:
        hint = "" if linear else "; for networks of linear maps pass linear=True (--linear)"
        raise UserError(f"no 2-D convolution ran in the model's forward pass, so there is no route layer{hint}")
    return recording


def is_recording() -> bool:
    """Whether a forward pass is being recorded."""
    return isinstance(_get_current_dispatch_mode(), Tracker)


class _Followed(NamedTuple):
    flow: Flow
    version: int
    storage: int
    trail: Trail | None = None  # None where only the sources are known

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor holds what it held: the same memory, not written to since."""
        return self.version == tensor._version and self.storage == tensor.untyped_storage()._cdata


class _Written(NamedTuple):
    """Memory that an operation changed in place, and the version that its tensors had then."""

    reference: StorageWeakRef
    sources: frozenset[int]
    version: int


class Tracker(TorchDispatchMode):
    """Follows flows, and trails of elements, through the ATen operations of one forward pass."""

    by_elements = True  # whether trails are followed

    def __init__(self, samples: int, *, gather: bool, expected: int | None, separation: Separation | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._expected = expected
        self._separation = separation
        self.samples = samples
        self.layers: list[RecordedLayer] = []
        self._gather = gather
        self._flows: Any = WeakIdKeyDictionary()
        self._written: dict[int, _Written] = {}
        self._kernels: list[tuple[str, Tensor, int]] = []
        self._moves = 0
        self.call: LayerCall | None = None  # of a route layer, under way
        self._last: LayerCall | None = None

    # --- the ledger that rules write to

    def move(self) -> int:
        """A number for one operation that moves positions."""
        self._moves += 1
        return self._moves

    def flow(self, tensor: object) -> Flow:
        """What is known of a tensor; opaque where it, or what it shares memory with, was written to in between."""
        if not isinstance(tensor, Tensor):
            return EMPTY
        record: _Followed | None = self._flows.get(tensor)
        if record is not None and record.fits(tensor):
            return record.flow
        sources = frozenset[int]() if record is None else record.flow.sources
        if self._written and (written := self._written.get(tensor.untyped_storage()._cdata)) is not None:
            sources |= written.sources
        return opaque(sources) if sources else EMPTY

    def record(self, tensor: Tensor, flow: Flow, *, written: bool = False) -> None:
        """Note a tensor's flow; ``written`` if the operation under way changes it in place."""
        # the version counter of a tensor changed in place moves on only after the operation is done
        version = tensor._version + written
        if self._written or (written and flow.sources):
            storage = tensor.untyped_storage()
            earlier = self._written.get(storage._cdata)
            if written and flow.sources:
                # the weak reference keeps the address from being used again while this pass lasts
                reference = StorageWeakRef(storage) if earlier is None else earlier.reference
                sources = flow.sources if earlier is None else earlier.sources | flow.sources
                self._written[storage._cdata] = _Written(reference, sources, version)
            elif earlier is not None and not written:
                version = max(version, earlier.version)  # a view joins its base's counter only after this operation
        self._flows[tensor] = _Followed(flow, version, tensor.untyped_storage()._cdata)

    def trail(self, tensor: object) -> Trail:
        """How elements reach a tensor; its sources are lost where it, or its memory, was written to in between."""
        record: _Followed | None = self._flows.get(tensor) if isinstance(tensor, Tensor) else None
        if record is not None and record.trail is not None and record.fits(tensor):  # type: ignore[arg-type]
            return record.trail
        sources = self.flow(tensor).sources
        return Trail(lost=sources) if sources else UNTOUCHED

    def _lay(self, tensor: Tensor, trail: Trail) -> None:
        """Note the trail of a tensor whose flow is noted."""
        record: _Followed | None = self._flows.get(tensor)
        if record is not None and record.flow.sources:
            unseen = record.flow.sources - trail.sources
            trail = replace(trail, lost=trail.lost | unseen) if unseen else trail
            self._flows[tensor] = record._replace(trail=trail)

    def take_over(self, leaf: Tensor, output: Tensor) -> None:
        """Let a layer's output, cut off from what is before it, be followed as the output is."""
        trail, storage = Trail.of_layer(len(self.layers) - 1, leaf), leaf.untyped_storage()._cdata
        self._flows[leaf] = self._flows[output]._replace(version=leaf._version, storage=storage, trail=trail)

    # --- execution

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = self._followed(func, args, kwargs)
        if self._separation is not None:
            self._separation.watch(func, args, kwargs, output)
        return output

    def _followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # a convolution ends the segments before it, also one whose input is not followed any more
        if func is aten.convolution.default and args[0].ndim == 4 and not args[6]:
            return self._convolution(func, args, kwargs)
        taken_whole = self.call is not None and self.call.kind == "linear"
        if taken_whole or (len(self.layers) == self._expected and self.call is None):
            return func(*args, **kwargs)  # nothing left to follow, or a call that is taken as a whole when it is done
        operation = Operation(self, func, args, kwargs)
        return self._ruled(operation) if torch.is_grad_enabled() else self._without_gradient(operation)

    def _ruled(self, operation: Operation) -> Any:
        trails = {id(tensor): self.trail(tensor) for tensor in operation.operands}
        if operation.func._schema.is_mutable:
            self._lose_what_shares(operation)
        if operation.func is aten.as_strided_.default and not only_restrides(operation):
            trails = {}  # elements come to other places
        output = RULES.get(operation.func, without_rule)(operation)
        if any(trail.followed for trail in trails.values()):
            for tensor, trail in followed(Reading(**vars(operation), trails=trails), output):
                self._lay(tensor, trail)
        return output

    def _lose_what_shares(self, operation: Operation) -> None:
        """What is written to by a way past autograd (``h.data``, a detached alias) is followed no further."""
        for alias in operation.written:
            if self.flow(alias).sources:
                continue  # a rule sees to it
            storage = alias.untyped_storage()._cdata
            for tensor, record in list(self._flows.items()):
                if record.flow.sources and tensor.untyped_storage()._cdata == storage:
                    self._flows[tensor] = record._replace(flow=opaque(record.flow.sources), trail=None)

    def _without_gradient(self, operation: Operation) -> Any:
        """An operation under the model's own no_grad: what is new depends on nothing, what is changed in place does."""
        output = operation.run()
        for tensor in tensors_in(output):
            if not tensor.is_inference():
                written = any(tensor is value for value in operation.args)
                self.record(tensor, opaque(self.flow(tensor).sources) if written else EMPTY, written=written)
        return output

    def _convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        images, weight, bias, stride, padding, dilation, _, _, groups = args
        if self.call is None or self._last is self.call:
            raise UserError(
                "a convolution runs outside PyTorch's Python interface (TorchScript or a custom extension?), "
                "where it has no name: pass the eager model"
            )
        self._last = self.call
        output: Tensor = func(*args, **kwargs)
        axes = tuple(  # from the ends, since ATen may pass one number for both axes
            Axis.of(images.shape[dim], weight.shape[dim], stride[end], padding[end], dilation[end])
            for dim, end in ((2, 0), (3, -1))
        )
        dynamic = self.flow(weight).sources | self.flow(bias).sources  # a kernel that is itself computed
        self._add_layer(self.call, images, weight, groups, (axes[0], axes[1]), output, dynamic)
        return output

    def linear(self, call: LayerCall, output: Tensor) -> None:
        """Take note of a linear map that has run."""
        flow = self.flow(call.input)
        positions = math.prod(flow.spatial) if flow.flat and call.input.ndim == 2 else 1
        shaped = call.weight.reshape(call.weight.shape[0], -1, positions, 1)
        self._add_layer(call, call.input, shaped, 1, None, output, self.flow(call.weight).sources)

    def take_edit(self, output: Tensor) -> None:
        """Let what an intervention around the pass has made of the last layer's output be its output.

        Factors of channels, as of those that are silenced, go into the layer's weight. Other changes, and all of linear
        maps, whose calls are taken as a whole, leave the edges into the layer to exact products.
        """
        index, flow = len(self.layers) - 1, self.flow(output)
        layer = self.layers[index]
        if layer.kind == "linear":
            if others_visit_linear_maps():
                self.layers[index] = layer.corrected(frozenset(), layer.sources)
            return
        plain = (term.source == index and term.mask is None and term.src == term.dst for term in flow.terms)
        if flow.opaque or not all(plain) or any(term.path.moves for term in flow.terms):
            self.layers[index] = layer.corrected(frozenset(), layer.sources | flow.sources - {index})
        elif [(term.length, term.scale) for term in flow.terms] == [(layer.channels, None)]:
            return
        else:
            factors = layer.weight.new_zeros(layer.channels)
            for term in flow.terms:
                factors[term.span] = 1.0 if term.scale is None else term.scale.to(factors.dtype)
            self.layers[index] = replace(layer, weight=layer.weight * factors[:, None, None, None])
        self.record(output, Flow(tuple(output.shape[1:]), (Term(index, 0, 0, layer.channels),)))
        self._lay(output, Trail.of_layer(index, output))

    def require_kept_kernels(self) -> None:
        """Kernels are referred to, not copied: none may have been written to since it was used."""
        for name, weight, version in self._kernels:
            if weight._version != version:
                raise UserError(
                    f"the kernel of layer {name!r} is changed in place after its use, in the same forward pass: "
                    "give the later use a tensor of its own"
                )

    def _add_layer(
        self,
        call: LayerCall,
        images: Tensor,
        weight: Tensor,
        groups: int,
        axes: Axes | None,
        out: Tensor,
        elsewhere: frozenset[int],
    ) -> None:
        if out.shape[0] != self.samples:
            raise UserError(
                f"layer {call.name!r} runs on a batch of {out.shape[0]} for {self.samples} images; "
                "routes per sample need one row per image"
            )
        if not weight.is_inference():
            self._kernels.append((call.name, weight, weight._version))
        flow, trail = self.flow(images), self.trail(images)
        if axes is None and images.ndim != 2:  # a linear map reads the last dimension, whatever that is
            flow = opaque(flow.sources)
        pieces, lost = self._pieces(call.name, flow, images, axes, elsewhere)
        passed: tuple[Passage, ...] = ()
        if lost and self.by_elements:
            open_trail = replace(trail, lost=trail.lost | elsewhere | (trail.sources - lost))
            inputs = weight[0].numel() if axes is None else weight.shape[1] * groups
            passed = passages(open_trail, call.kind, self.samples, inputs)
            lost = lost.difference(*(passage.sources for passage in passed))
        index = len(self.layers)
        channels = out.shape[-1] if call.kind == "linear" else out.shape[1]
        self.layers.append(
            RecordedLayer(
                call.name, call.kind, channels=channels, weight=weight, groups=groups, axes=axes, pieces=tuple(pieces),
                jacobian=lost, passages=passed, read=Held(images) if passed else None
            )
        )  # fmt: skip
        # what follows owes to this layer alone: earlier ones act through it, and are not adjacent to later ones
        if call.kind == "linear" and out.ndim > 2:
            self.record(out, opaque((index,)))
        else:
            self.record(out, Flow(tuple(out.shape[1:]), (Term(index, 0, 0, channels),)))
        self._lay(out, Trail.of_layer(index, out))

    def _pieces(
        self, name: str, flow: Flow, images: Tensor, axes: Axes | None, elsewhere: frozenset[int]
    ) -> tuple[list[Piece], frozenset[int]]:
        """Closed-form parts of the edges into a layer that reads ``images``, and the sources whose edge has none."""
        lost = set(flow.opaque | elsewhere)
        gains = self._gains(name, flow, images, axes, elsewhere)
        pieces: list[Piece] = []
        by_source: dict[int, list[Term]] = {}
        for term in flow.terms:
            by_source.setdefault(term.source, []).append(term)
        for source, terms in by_source.items():
            if source in lost or not gains.closed(terms):
                lost.add(source)
                continue
            for term in terms:
                sums = gains.sums(term) if self._gather else []
                pieces.append(Piece(source, term.src, dst=term.dst, length=term.length, sums=sums, scale=term.scale))
        return pieces, frozenset(lost)

    def _gains(self, name: str, flow: Flow, images: Tensor, axes: Axes | None, elsewhere: frozenset[int]) -> GainSums:
        return GainSums(flow, images, axes)
