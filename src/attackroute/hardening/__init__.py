"""Hardening: from a network, images and a route to a network that is trained with penalties on the route's neurons.

Read :mod:`attackroute.hardening.harden` first. The penalties (Eqs. (10) and (13), and the noise on the route) serve in
any training loop; :mod:`attackroute.hardening.training` is the one here, which repeats bit for bit and can be resumed.
"""
