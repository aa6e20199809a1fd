"""What a route is worth: interventions, criteria, Grad-CAM, hardness, experiments, figures."""

from __future__ import annotations
