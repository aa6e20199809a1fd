"""Networks whose layers follow one upon another, with torchvision's names for their three parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attackroute.zoo.normalisation import Normalise, Statistics


class ChainNet(nn.Module):
    """``classifier(flatten(avgpool(features(normalise(x)))))``.

    Args:
        statistics: For the normalisation of the input.
        features: Maps (N, C, H, W) to the last convolutional layer's maps.
        avgpool: Brings these to the height and width that the classifier needs.
        classifier: Maps flat features to logits.
    """

    def __init__(self, statistics: Statistics, features: nn.Module, avgpool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.normalise = Normalise(statistics)
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        maps = self.avgpool(self.features(self.normalise(images)))
        logits: Tensor = self.classifier(torch.flatten(maps, 1))
        return logits
