"""The noise carrier by brute force: slow, short, and there to check the fast engine against.

Every neuron is cleaned by itself: the network runs on the attacked images once more with all route layers' outputs put
in from a plain pass, that neuron's from the clean images. What then differs at a later layer's input is carried on by
the layer itself, with the absolute values of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.tracing.oracle import (
    Loss,
    OracleTrace,
    _gradients,
    _labels,
    _objective,
    _per_channel,
    _prepared,
    _Recorder,
    _run,
    _sources,
    _top,
)


def trace(
    model: nn.Module,
    clean: Tensor,
    attacked: Tensor,
    y: Tensor | None = None,
    *,
    width: float = 0.2,
    loss: Loss | None = None,
    linear: bool = False,
) -> OracleTrace:
    """Routes that follow the noise between two versions of the same samples.

    Args:
        model: Maps samples to logits (N, K), each on its own. It runs in eval mode and is left as it was.
        clean: Samples, (N, ...).
        attacked: The same samples after an attack.
        y: Labels, int (N,); None takes the model's own predictions on the attacked samples.
        width: Share of each layer's neurons that is critical, in (0, 1].
        loss: Maps (logits, y) to losses per sample, (N,); None is cross entropy, scaled as for the paper's routes.
        linear: Whether linear layers are route layers too.

    Returns:
        As for the paper's routes; `influence` is what each neuron's noise adds to those of the next layer,
        (N, C_target, C_source).
    """
    calls, logits = _run(model, attacked, linear)
    before, _ = _run(model, clean, linear)
    objective, cotangent = _objective(logits, _labels(logits, y, len(attacked)), loss)
    edges = [(source, target) for target in calls for source in _sources(calls, target)]
    given = {name: call.leaf.detach() for name, call in calls.items()}
    held = {name: call.leaf.detach() for name, call in before.items()}
    inputs = _Replay(given, {}).run(model, attacked, linear).inputs
    influences: dict[tuple[str, str], Tensor] = {}
    for source in dict.fromkeys(source for source, _ in edges):
        targets = [target for start, target in edges if start == source]
        read = {target: inputs[target] for target in targets}
        columns: dict[str, list[Tensor]] = {target: [] for target in targets}
        for channel in range(given[source].shape[1]):
            one = given[source].clone()
            one[:, channel] = held[source][:, channel]
            carried = _Replay({**given, source: one}, read).run(model, attacked, linear).carried
            for target in targets:
                columns[target].append(_per_channel(carried[target]))
        for target in targets:
            influences[source, target] = torch.stack(columns[target], dim=2)
    scores: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name in reversed(calls):
        successors = [target for source, target in edges if source == name]
        if successors:  # Eq. (5)
            critical = [influences[name, target].masked_fill(~masks[target].unsqueeze(2), 0) for target in successors]
            scores[name] = torch.stack([matrix.sum(dim=1) for matrix in critical]).sum(dim=0)
        else:
            (gradient,) = _gradients(objective, [calls[name].leaf], cotangent)
            noise = given[name] - held[name]
            scores[name] = _per_channel(torch.zeros_like(noise) if gradient is None else noise * gradient)
        masks[name] = _top(scores[name], width)
    scores, masks = ({name: found[name] for name in calls} for found in (scores, masks))
    return OracleTrace(tuple(calls), tuple(edges), influences, scores, masks)


class _Replay:
    """One forward pass with the route layers' outputs put in.

    Attributes:
        inputs: What each layer read.
        carried: For the layers whose former inputs are given, what the change is worth to their neurons, (N, C, ...).
    """

    def __init__(self, given: Mapping[str, Tensor], former: Mapping[str, Tensor]) -> None:
        self.given, self.former = given, former
        self.inputs: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}

    def run(self, model: nn.Module, x: Tensor, linear: bool) -> _Replay:
        running: list[str] = []
        mode = _ReplayMode(self, running, len(x), linear)
        with torch.inference_mode(False), torch.no_grad(), _prepared(model, running), mode:
            model(x.detach().clone())
        return self


class _ReplayMode(_Recorder):
    """Puts outputs in, and measures inputs."""

    def __init__(self, replay: _Replay, running: Sequence[str], samples: int, linear: bool) -> None:
        super().__init__(running, samples, linear)
        self._replay = replay
        self._last = ""
        self._measuring = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self._last = ""
        convolves = func in (torch.convolution, torch.conv2d)
        read = None
        if convolves or func is nn.functional.linear:
            read = (args[0] if args else kwargs["input"]).clone()
        output = super().__torch_function__(func, types, args, kwargs)
        if read is None or not self._last:
            return output
        name = self._last
        self._replay.inputs[name] = read
        if name in self._replay.former:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            options = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
            noise = (read - self._replay.former[name]).abs()
            carried = func(noise, weight.abs(), None, *args[3:], **options)
            self._measuring = True
            _ = self._cut(carried, 1) if convolves else self._cut_linear(carried)
            self._measuring = False
        return output

    def _cut(self, output: Tensor, axis: int) -> Tensor:
        if self._measuring:
            self._replay.carried[self._last] = output.movedim(axis, 1)
            return output
        self._last = self._name()
        return self._replay.given[self._last].movedim(1, axis).clone()
