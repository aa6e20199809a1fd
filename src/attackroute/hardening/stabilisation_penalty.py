"""The penalty on the noise in a route's neurons: what an attack changes there. It is none of the paper's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.core.model_state import RepeatablePass
from attackroute.hardening.gradient_penalty import require_ran
from attackroute.hardening.objective import summed
from attackroute.routes.layer_map import require_channels, require_model
from attackroute.routes.route import Route


class StabilisationPenalty:
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
    differentiated.

    Args:
        model: Any network; call it as a whole inside :meth:`watch`, or through a wrapper.
        route: The neurons, as traced; linear maps may be among the layers.

    Raises:
        UserError: The model cannot carry the route, or the route has no neuron.
    """

    def __init__(self, model: nn.Module, route: Route) -> None:
        require_model(route.channels, model)
        self._model, self._route = model, route
        self._chosen = [layer for layer in route if len(route.indices[layer])]
        if not self._chosen:
            raise UserError("the route has no neuron, so there is no noise to punish")
        self._index = cache(lambda layer, device: route[layer].to(device))
        self._repeat: RepeatablePass | None = None  # runs the clean images as they would have run in the pass's place
        self._attacked: dict[str, Tensor] = {}  # the route's channels of each layer in the pass

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context for the forward pass of the attacked images; of several passes, the last one counts."""

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._model:  # a copy of the model made meanwhile copies its hooks
                self._repeat, self._attacked = RepeatablePass(module, args, kwargs), {}

        self._repeat = None
        handle = self._model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with LayerCalls(self._model, self._visit, linear=True):
                yield
        finally:
            handle.remove()

    def __call__(self, clean: Tensor) -> Tensor:
        """``L_s`` between the pass that was watched and one of the clean images, a scalar that can be differentiated.

        Args:
            clean: The images before the attack, ``(N, ...)``, in the order of the attacked ones.

        Raises:
            UserError: No pass was watched, or a layer of the route did not run in it, or gives other shapes now.
        """
        (repeat, self._repeat), (outputs, self._attacked) = (self._repeat, None), (self._attacked, {})
        if repeat is None:
            raise UserError("no forward pass was watched: call the model on the attacked images inside penalty.watch()")
        require_ran(self._chosen, outputs)
        changes: dict[str, Tensor] = {}

        def compare(call: LayerCall) -> Tensor:
            output = call.run()
            if call.name in outputs:
                chosen, attacked = self._on_route(call, output), outputs[call.name]
                if chosen.shape != attacked.shape:
                    raise UserError(
                        f"layer {call.name!r} gives {tuple(chosen.shape)} on the route for the clean images but "
                        f"{tuple(attacked.shape)} for the attacked ones: both must be the same images"
                    )
                # summed over channels, averaged over samples and positions
                changes[call.name] = (attacked - chosen).abs().mean() * attacked.shape[CHANNEL_DIM[call.kind]]
            return output

        with LayerCalls(self._model, compare, linear=True):
            repeat.run(clean)
        return summed(changes.values())

    def _visit(self, call: LayerCall) -> Tensor:
        output = call.run()
        if self._repeat is not None and call.name in self._chosen:
            if not torch.is_grad_enabled():
                raise UserError("the watched pass runs without gradients; call the model outside no_grad")
            self._attacked[call.name] = self._on_route(call, output)
        return output

    def _on_route(self, call: LayerCall, output: Tensor) -> Tensor:
        """The route's channels of an output, a copy in float32 or wider, since what follows may work in place."""
        dim = CHANNEL_DIM[call.kind]
        require_channels(call.name, self._route.channels[call.name], output.shape[dim])
        chosen = output.index_select(dim, self._index(call.name, output.device))
        return chosen.to(torch.promote_types(output.dtype, torch.float32))
