"""Penalties on a route, and training with them."""
