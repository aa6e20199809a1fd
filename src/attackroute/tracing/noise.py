"""The noise carrier: what of the noise at a layer's input each source brings there, from one pass of two batches.

The model runs on n clean images and the n attacked ones as one batch. A neuron's noise at a later layer's input is what
the attacked input would lose if that neuron alone gave what it gives for the clean image, all other route layers'
outputs held as they are under attack: Eqs. (1)-(2) hold them fixed likewise. On a chain this is ``|x(x') - x(x)|``, the
difference of the batch's own halves, and nothing needs to be followed. Where several sources meet, in a residual sum or
a gate, each operation is repeated for every source on the attacked rows with that source cleaned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall
from attackroute.tracing.flow import EMPTY, Flow, Path, Term, by_source, opaque
from attackroute.tracing.recorder import Piece, Tracker
from attackroute.tracing.rules.copies import constant, identity
from attackroute.tracing.rules.operation import RULES, Operation, overloads, tensors_in, without_rule
from attackroute.tracing.windows import Axis, PatternSums, mask_sums

_BLOCK = 1 << 20  # elements per block: temporaries that stay in the processor's cache


_DETACH = frozenset(overloads("detach"))


_CATS = frozenset(overloads("cat"))


_SIZED = frozenset(overloads("view", "_unsafe_view", "reshape"))  # whose arguments name the number of rows


_RESTRIDED = frozenset(overloads("as_strided_"))


class NoiseTracker(Tracker):
    """Follows the channels of n clean images and n attacked ones, and what each source's noise alone changes.

    A tensor's *cleaned* variant of a source is what its attacked rows would be if that source alone gave what it gives
    for the clean images. As long as all noise in a channel comes from one source, the clean rows are that variant, and
    none is kept. Noise is a matter of values: what is detached, rounded or compared passes it on.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cleaned: Any = WeakIdKeyDictionary()
        self._pairs = self.samples // 2

    def record(self, tensor: Tensor, flow: Flow, *, written: bool = False) -> None:
        """Note a tensor's flow: which channels it carries, without derivatives."""
        if flow.terms:
            bare = tuple(replace(term, scale=None, mask=None, path=Path()) for term in flow.terms)
            flow = replace(flow, terms=bare)
        super().record(tensor, flow, written=written)

    def _ruled(self, operation: Operation) -> Any:
        rule = identity if operation.func in _DETACH else RULES.get(operation.func, without_rule)
        variants = _Variants.of(operation, self._cleaned, self._pairs)
        sources = frozenset[int]() if rule is constant else _sources(operation)
        output = rule(operation)
        results = tensors_in(output)
        for tensor in results:
            self._cleaned.pop(tensor, None)
            if sources and not tensor.is_floating_point() and not tensor.is_inference():
                self.record(tensor, opaque(sources))
        if variants is not None:
            # not self.flow: the version of what is changed in place moves on only after the operation is done
            flows = [EMPTY if (record := self._flows.get(tensor)) is None else record.flow for tensor in results]
            merging = sorted({term.source for flow in flows for term in flow.terms})
            repeated = {source: variants.repeated(source, results) for source in merging}
            for index, (tensor, flow) in enumerate(zip(results, flows, strict=True)):
                if flow.terms:
                    self._cleaned[tensor] = {term.source: repeated[term.source][index] for term in flow.terms}
        return output

    def _without_gradient(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation = Operation(self, func, args, kwargs)
        sources = _sources(operation)
        output = operation.run()
        for tensor in tensors_in(output):
            self._cleaned.pop(tensor, None)
            if not tensor.is_inference():
                self.record(tensor, opaque(sources), written=any(tensor is value for value in args))
        return output

    def _pieces(
        self,
        call: LayerCall,
        flow: Flow,
        images: Tensor,
        axes: tuple[Axis, Axis] | None,
        elsewhere: frozenset[int],
    ) -> tuple[list[Piece], frozenset[int]]:
        if elsewhere:
            raise UserError(
                f"the kernel of layer {call.name!r} is itself computed from other layers' outputs, so noise reaches it "
                "on other ways than its input: use carrier='unit'"
            )
        lost = set(flow.opaque)
        pieces: list[Piece] = []
        delivered = _Delivered(flow, images, axes, self._cleaned.get(images), self._pairs)
        for source, terms in by_source(flow).items():
            if source in lost or not _single(terms):
                lost.add(source)
                continue
            for term in terms:
                sums: Tensor | list[PatternSums] = delivered.sums(term) if self._gather else []
                pieces.append(Piece(source, term.src, dst=term.dst, length=term.length, sums=sums, scale=None))
        return pieces, frozenset(lost)


def _sources(operation: Operation) -> frozenset[int]:
    read = tensors_in((operation.args, tuple(operation.kwargs.values())))
    return frozenset[int]().union(*(operation.ledger.flow(tensor).sources for tensor in read))


def _single(terms: Iterable[Term]) -> bool:
    """Whether each channel of the tensor carries at most one channel of a source, whose terms these are."""
    ranges = sorted((term.dst, term.dst + term.length) for term in terms)
    return all(left[1] <= right[0] for left, right in pairwise(ranges))


class _Variants:
    """The operands of one operation, as they are before it runs, and what it would give if a source were cleaned."""

    def __init__(self, operation: Operation, rows: Mapping[int, tuple[Tensor, Flow, Any]], pairs: int) -> None:
        self._operation = operation
        self._rows = rows  # id -> values of 2n rows, their flow, their cleaned variants
        self._pairs = pairs
        self._mutable = operation.func._schema.is_mutable

    @classmethod
    def of(cls, operation: Operation, cleaned: Any, pairs: int) -> _Variants | None:
        """None where no rule applies, or all noise of each channel still comes from one source afterwards."""
        if operation.func not in RULES:
            return None
        read = tensors_in((operation.args, tuple(operation.kwargs.values())))
        flows = {id(tensor): operation.ledger.flow(tensor) for tensor in read}
        dims = next((tensor.ndim for tensor in read if flows[id(tensor)].terms), None)
        # samples are apart, so what has as many rows in as many dimensions has one for each image
        rows = {id(value): value for value in read if value.ndim == dims and value.shape[0] == 2 * pairs}
        variants = {key: cleaned.get(value) if flows[key].terms else None for key, value in rows.items()}
        if not any(variants.values()) and (len(rows) < 2 or operation.func in _CATS):
            return None
        values_before = {
            key: (value.clone() if operation.func._schema.is_mutable and value is read[0] else value)
            for key, value in rows.items()
        }
        return cls(operation, {key: (values_before[key], flows[key], variants[key]) for key in rows}, pairs)

    def repeated(self, source: int, results: list[Tensor]) -> list[Tensor]:
        """The operation's results on the attacked rows with a source cleaned."""
        func, args, kwargs = self._operation.func, self._operation.args, self._operation.kwargs
        first = self._replaced(args[0], source)
        if func in _RESTRIDED:
            return [first]
        if func in _SIZED:
            return [first.reshape(self._pairs, *results[0].shape[1:])]
        if self._mutable and first is not args[0]:
            first = first.clone()
        arguments = [self._replaced(value, source) for value in args[1:]]
        named = {name: self._replaced(value, source) for name, value in kwargs.items()}
        return tensors_in(func(first, *arguments, **named))

    def _replaced(self, value: Any, source: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._replaced(item, source) for item in value]
        if not isinstance(value, Tensor) or id(value) not in self._rows:
            return value
        values, flow, cleaned = self._rows[id(value)]
        if cleaned is not None:
            return cleaned.get(source, values[self._pairs :])
        return _lazily(values, flow, source, self._pairs)


def _lazily(values: Tensor, flow: Flow, source: int, pairs: int) -> Tensor:
    """The attacked rows with a source cleaned, where the noise in each of its channels is its own alone."""
    terms = [term for term in flow.terms if term.source == source]
    if not terms:
        return values[pairs:]
    if terms[0].length == flow.shape[0]:
        return values[:pairs]
    mixed = values[pairs:].clone(memory_format=torch.contiguous_format)
    for term in terms:
        cut = slice(term.dst, term.dst + term.length)
        flow.view(mixed)[:, cut] = flow.view(values[:pairs])[:, cut]
    return mixed


class _Delivered:
    """Window sums of the noise that sources deliver to one layer's input; sources that share theirs share the work."""

    def __init__(
        self,
        flow: Flow,
        values: Tensor,
        axes: tuple[Axis, Axis] | None,
        cleaned: Mapping[int, Tensor] | None,
        pairs: int,
    ) -> None:
        self._flow, self._values, self._axes, self._cleaned, self._pairs = flow, values, axes, cleaned, pairs
        self._whole: Tensor | None = None

    def sums(self, term: Term) -> Tensor:
        """``N``, ``(n, length, kh, kw)``: the noise of a term's channels summed over what each kernel offset meets."""
        cut = slice(term.dst, term.dst + term.length)
        attacked = self._flow.view(self._values[self._pairs :])
        if self._cleaned is not None:
            cleaned = self._flow.view(self._cleaned[term.source])
            return noise_sums(attacked[:, cut], cleaned[:, cut], self._axes)
        if self._whole is None:
            self._whole = noise_sums(attacked, self._flow.view(self._values[: self._pairs]), self._axes)
        return self._whole[:, cut]


def noise_sums(attacked: Tensor, clean: Tensor, axes: tuple[Axis, Axis] | None) -> Tensor:
    """Window sums of ``|attacked - clean|``, maps ``(n, C, H, W)``, or ``(n, C, *spatial)`` before a linear map.

    Args:
        attacked: What a layer reads under attack.
        clean: The same, as it would be without some noise.
        axes: The convolution's axes; None for a linear map, to which every position is a kernel offset of its own.

    Returns:
        ``(n, C, kh, kw)``, for a linear map ``(n, C, P, 1)``, in float32 or float64.
    """
    dtype = torch.promote_types(attacked.dtype, torch.float32)
    if axes is None:
        noise = (attacked.to(dtype) - clean).abs_()
        return noise.flatten(2).unsqueeze(-1) if noise.ndim > 2 else noise[..., None, None]
    size = max(1, _BLOCK // max(1, attacked[0].numel())) if attacked.device.type == "cpu" else len(attacked)
    return torch.cat(
        [
            mask_sums((attacked_block.to(dtype) - clean_block).abs_(), *axes)
            for attacked_block, clean_block in zip(attacked.split(size), clean.split(size), strict=True)
        ]
    )
