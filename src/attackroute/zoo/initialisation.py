"""Initial weights of the built-in networks."""

from __future__ import annotations

from torch import nn


def initialise_convolutions(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan-in) (He et al., 2015) and set its bias to 0.

    Activations keep their size from layer to layer, which AlexNet needs, having no batch normalisation.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
