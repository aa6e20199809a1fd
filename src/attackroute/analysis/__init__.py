"""What a route is worth: interventions, criteria, Grad-CAM, hardness, experiments, figures.

In come a network, images and a route; out go edited passes, rankings of channels, and for each experiment a table with
a sentence, figures and verdicts, always beside controls of the route's size. Read `interventions.py` first, then
`study.py` and `experiment.py`, which finds the experiments in `experiments/`.
"""

from attackroute.analysis.channel_statistics import loss_gradient as loss_gradient
from attackroute.analysis.channel_statistics import sensitivity as sensitivity
from attackroute.analysis.criteria import ChannelScores as ChannelScores
from attackroute.analysis.criteria import channel_scores as channel_scores
from attackroute.analysis.criteria import rank_channels as rank_channels
from attackroute.analysis.experiment import analyze as analyze
from attackroute.analysis.gradcam import layer_evidence as layer_evidence
from attackroute.analysis.hardness import Hardness as Hardness
from attackroute.analysis.hardness import hardness as hardness
from attackroute.analysis.interventions import deactivate as deactivate
from attackroute.analysis.interventions import record_outputs as record_outputs
from attackroute.analysis.interventions import transplant as transplant
from attackroute.analysis.interventions import weaken as weaken
from attackroute.analysis.study import Study as Study
