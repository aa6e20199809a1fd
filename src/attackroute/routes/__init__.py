"""A route, the routes of samples, and their files.

In come masks of critical neurons, batch by batch, or files of them; out go `InstanceRoutes`, which is packed bits in
memory, a `RouteFolder`, which is the same on disk, and `Route`, what most samples have in common. Read
`instance_routes.py` first, then `route.py`; `masks.py` is the top-k on which all of them rest.
"""
