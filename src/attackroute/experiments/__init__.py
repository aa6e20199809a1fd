"""Experiments on routes, one a file: inputs, a tidy table, a figure, one sentence."""
