"""The noise carrier: what of the noise at a layer's input each source brings there, from one pass of two batches.

The model runs on n clean images and the n attacked ones as one batch. A neuron's noise at a later layer's input is what
the attacked input would lose if that neuron alone gave what it gives for the clean image, all other route layers'
outputs held as they are under attack: Eqs. (1)-(2) hold them fixed likewise. On a chain this is ``|x(x') - x(x)|``, the
difference of the batch's own halves, and nothing needs to be followed. Where several sources meet, in a residual sum or
a gate, each operation is repeated for every source on the attacked rows with that source cleaned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.core.errors import UserError
from attackroute.tracing.flow import EMPTY, Flow, Path, Term, disentangled, opaque
from attackroute.tracing.recorder import Tracker
from attackroute.tracing.rules.layout import constant, identity
from attackroute.tracing.rules.operation import RULES, Operation, aten, overloads, tensors_in, without_rule
from attackroute.tracing.windows import Axes, GainSums, mask_sums

_BLOCK = 1 << 20  # elements per block: temporaries that stay in the processor's cache
_SIZED = frozenset(overloads("view", "_unsafe_view", "reshape"))  # whose arguments name the number of rows


class NoiseTracker(Tracker):
    """Follows the channels of n clean images and n attacked ones, and what each source's noise alone changes.

    A tensor's *cleaned* variant of a source is what its attacked rows would be if that source alone gave what it gives
    for the clean images. As long as all noise in a channel comes from one source, the clean rows are that variant, and
    none is kept. Noise is a matter of values: what is detached, rounded or compared passes it on.
    """

    by_elements = False

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
        rule = identity if operation.func is aten.detach.default else RULES.get(operation.func, without_rule)
        variants = _Variants.of(operation, self._cleaned, self._pairs)
        sources = frozenset[int]() if rule is constant else operation.sources
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

    def _without_gradient(self, operation: Operation) -> Any:
        sources = operation.sources
        output = operation.run()
        for tensor in tensors_in(output):
            self._cleaned.pop(tensor, None)
            if not tensor.is_inference():
                self.record(tensor, opaque(sources), written=any(tensor is value for value in operation.args))
        return output

    def _gains(self, name: str, flow: Flow, images: Tensor, axes: Axes | None, elsewhere: frozenset[int]) -> GainSums:
        if elsewhere:
            raise UserError(
                f"the kernel of layer {name!r} is itself computed from other layers' outputs, so noise reaches it "
                "on other ways than its input: use carrier='unit'"
            )
        return _NoiseSums(flow, images, axes, cleaned=self._cleaned.get(images), pairs=self._pairs)


@dataclass
class _Variants:
    """The operands of one operation, as they are before it runs, and what it would give if a source were cleaned."""

    operation: Operation
    rows: Mapping[int, tuple[Tensor, Flow, Any]]  # id -> values of 2n rows, their flow, their cleaned variants
    pairs: int

    @classmethod
    def of(cls, operation: Operation, cleaned: Any, pairs: int) -> _Variants | None:
        """None where no rule applies, or all noise of each channel still comes from one source afterwards."""
        if operation.func not in RULES:
            return None
        read, mutable = operation.operands, operation.func._schema.is_mutable
        flows = {id(tensor): operation.ledger.flow(tensor) for tensor in read}
        dims = next((tensor.ndim for tensor in read if flows[id(tensor)].terms), None)
        # samples are apart, so what has as many rows in as many dimensions has one for each image
        rows = {id(value): value for value in read if value.ndim == dims and value.shape[0] == 2 * pairs}
        variants = {key: cleaned.get(value) if flows[key].terms else None for key, value in rows.items()}
        if not any(variants.values()) and (len(rows) < 2 or operation.func is aten.cat.default):
            return None
        values_before = {key: value.clone() if mutable and value is read[0] else value for key, value in rows.items()}
        return cls(operation, {key: (values_before[key], flows[key], variants[key]) for key in rows}, pairs)

    def repeated(self, source: int, results: list[Tensor]) -> list[Tensor]:
        """The operation's results on the attacked rows with a source cleaned."""
        func, args, kwargs = self.operation.func, self.operation.args, self.operation.kwargs
        first = self._replaced(args[0], source)
        if func is aten.as_strided_.default:
            return [first]
        if func in _SIZED:
            return [first.reshape(self.pairs, *results[0].shape[1:])]
        if func._schema.is_mutable and first is not args[0]:
            first = first.clone()
        arguments = [self._replaced(value, source) for value in args[1:]]
        named = {name: self._replaced(value, source) for name, value in kwargs.items()}
        return tensors_in(func(first, *arguments, **named))

    def _replaced(self, value: Any, source: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._replaced(item, source) for item in value]
        if not isinstance(value, Tensor) or id(value) not in self.rows:
            return value
        values, flow, cleaned = self.rows[id(value)]
        if cleaned is not None:
            return cleaned.get(source, values[self.pairs :])
        return _lazily(values, flow, source, self.pairs)


def _lazily(values: Tensor, flow: Flow, source: int, pairs: int) -> Tensor:
    """The attacked rows with a source cleaned, where the noise in each of its channels is its own alone."""
    terms = [term for term in flow.terms if term.source == source]
    if not terms:
        return values[pairs:]
    if terms[0].length == flow.shape[0]:
        return values[:pairs]
    mixed = values[pairs:].clone(memory_format=torch.contiguous_format)
    for term in terms:
        flow.view(mixed)[:, term.span] = flow.view(values[:pairs])[:, term.span]
    return mixed


@dataclass(kw_only=True)
class _NoiseSums(GainSums):
    """Window sums of the noise that sources deliver to one layer's input; sources that share theirs share the work."""

    cleaned: Mapping[int, Tensor] | None
    pairs: int

    def closed(self, terms: Sequence[Term]) -> bool:
        """Whether each channel of the input carries at most one channel of the source."""
        return disentangled((term.dst, term.length) for term in terms)

    def sums(self, term: Term) -> Tensor:
        """``N``, ``(n, length, kh, kw)``: the noise of a term's channels summed over what each kernel offset meets."""
        attacked = self.flow.view(self.values[self.pairs :])
        if self.cleaned is not None:
            cleaned = self.flow.view(self.cleaned[term.source])
            return noise_sums(attacked[:, term.span], cleaned[:, term.span], self.axes)
        if not self.counted:
            self.counted["all"] = noise_sums(attacked, self.flow.view(self.values[: self.pairs]), self.axes)
        return self.counted["all"][:, term.span]


def noise_sums(attacked: Tensor, clean: Tensor, axes: Axes | None) -> Tensor:
    """Window sums of ``|attacked - clean|``: what a layer reads, ``(n, C, H, W)``, and would read without some noise.

    Returns ``(n, C, kh, kw)`` in float32 or float64. A linear map has no axes: it reads ``(n, C, *spatial)``, every
    position is a kernel offset of its own, and sums are ``(n, C, P, 1)``.
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
