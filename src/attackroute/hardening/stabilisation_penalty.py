"""The penalty on the noise in a route's neurons: what an attack changes there. It is none of the paper's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.core.model_state import RepeatablePass
from attackroute.hardening.gradient_penalty import WatchingPenalty
from attackroute.hardening.objective import summed
from attackroute.routes.layer_map import require_channels


class StabilisationPenalty(WatchingPenalty):
    """``L_s``, the sum over a route's neurons of ``|Z(x') - Z(x)|_1 / dim Z``, averaged over the batch.

    For use in any training loop::

        penalty = StabilisationPenalty(model, route)
        with penalty.watch():
            logits = model(attacked)
        loss = functional.cross_entropy(logits, labels) + lam * penalty(images)

    Z is a layer's own output, before normalisation and activation, and ``dim Z`` the number of a neuron's positions, so
    that layers of all sizes count alike: it is the sum of the neurons' sensitivities. The clean images run once more,
    in the model's own mode, with the same random numbers (dropout) as the attacked ones; batch norm then takes the
    statistics of their own batch, and running statistics stay as the attacked pass left them. Both passes are
    differentiated. Model, route and errors are those of :class:`WatchingPenalty`.
    """

    _repeat: RepeatablePass | None = None  # runs the clean images as they would have run in the pass's place

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(args, kwargs)
        self._repeat = RepeatablePass(self._model, args, kwargs)

    def __call__(self, clean: Tensor) -> Tensor:
        """``L_s`` between the pass that was watched and one of the clean images, a scalar that can be differentiated.

        Args:
            clean: The images before the attack, ``(N, ...)``, in the order of the attacked ones.

        Raises:
            UserError: No pass was watched, or a layer of the route did not run in it, or gives other shapes now.
        """
        outputs = self._taken()
        repeat, self._repeat = self._repeat, None
        assert repeat is not None  # as the pass was watched
        changes: dict[str, Tensor] = {}

        def compare(call: LayerCall) -> Tensor:
            output = call.run()
            if call.name in outputs:
                chosen, attacked = self._route_of(call, output), outputs[call.name]
                if chosen.shape != attacked.shape:
                    raise UserError(
                        f"layer {call.name!r} gives {tuple(chosen.shape)} on the route for the clean images but "
                        f"{tuple(attacked.shape)} for the attacked ones: both must be the same images"
                    )
                # summed over channels, averaged over samples and positions
                dim = CHANNEL_DIM[call.kind]
                sizes = self._sizes(chosen, dim)
                change = (attacked - chosen).abs() if sizes is None else ((attacked - chosen) / sizes).abs()
                changes[call.name] = change.mean() * attacked.shape[dim]
            return output

        with LayerCalls(self._model, compare, linear=True):
            repeat.run(clean)
        return summed(changes.values())

    def _noted(self, call: LayerCall, output: Tensor) -> tuple[Any, Tensor]:
        return self._route_of(call, output), output

    def _route_of(self, call: LayerCall, output: Tensor) -> Tensor:
        """The route's channels of an output, a copy in float32 or wider, since what follows may work in place."""
        dim = CHANNEL_DIM[call.kind]
        require_channels(call.name, self._route.channels[call.name], output.shape[dim])
        chosen = output.index_select(dim, self._on_route(call.name, output.device))
        return chosen.to(torch.promote_types(output.dtype, torch.float32))
