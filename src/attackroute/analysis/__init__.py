"""What a route is worth: interventions, criteria, Grad-CAM, hardness, experiments, figures.

In come a network, images and a route; out go edited passes, rankings of channels, and for each experiment a table with
a sentence, figures and verdicts, always beside controls of the route's size. Read `interventions.py` first, then
`study.py` and `experiment.py`, which finds the experiments in `experiments/`.
"""

from __future__ import annotations

from attackroute.analysis.channel_statistics import loss_gradient, sensitivity
from attackroute.analysis.criteria import ChannelScores, channel_scores, rank_channels
from attackroute.analysis.experiment import analyze
from attackroute.analysis.gradcam import layer_evidence
from attackroute.analysis.hardness import Hardness, hardness
from attackroute.analysis.interventions import deactivate, record_outputs, transplant, weaken
from attackroute.analysis.study import Study

__all__ = [
    "ChannelScores",
    "Hardness",
    "Study",
    "analyze",
    "channel_scores",
    "deactivate",
    "hardness",
    "layer_evidence",
    "loss_gradient",
    "rank_channels",
    "record_outputs",
    "sensitivity",
    "transplant",
    "weaken",
]
