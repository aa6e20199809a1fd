"""What a route is worth: interventions, criteria, Grad-CAM, hardness, experiments, figures."""

from __future__ import annotations

from attackroute.analysis.channel_statistics import loss_gradient, sensitivity
from attackroute.analysis.criteria import ChannelScores, channel_scores, rank_channels
from attackroute.analysis.experiment import analyze
from attackroute.analysis.gradcam import grad_cam
from attackroute.analysis.hardness import Hardness, hardness
from attackroute.analysis.interventions import Graft, deactivate, record_outputs, transplant, weaken
from attackroute.analysis.study import Study

__all__ = [
    "ChannelScores",
    "Graft",
    "Hardness",
    "Study",
    "analyze",
    "channel_scores",
    "deactivate",
    "grad_cam",
    "hardness",
    "loss_gradient",
    "rank_channels",
    "record_outputs",
    "sensitivity",
    "transplant",
    "weaken",
]
