"""The tables and figures of Li et al. (2021) with the paper's settings, beside the paper's numbers, claim by claim.

In come networks, data and targets (:mod:`attackroute.paper.run`, where to begin reading); out come the experiments'
files and a page whose claims each have a verdict.
"""
