"""What a route is worth: interventions, criteria, Grad-CAM, hardness, experiments, figures.

In come a network, images and a route; out go edited passes, rankings of channels, and for each experiment a table with
a sentence, figures and verdicts, always beside controls of the route's size. Read `interventions.py` first, then
`study.py` and `experiment.py`, which finds the experiments in `experiments/`.
"""
