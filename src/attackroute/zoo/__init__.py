"""Networks, their weights, and data sets.

In come names (``vgg16``, ``preset:vgg16-cifar10``, ``torchvision:NAME``, ``cifar10:PATH``) and files; out go networks
that take images in [0, 1], and labelled images. Read `networks.py` first, then `weights.py`, which opens trained ones,
and `data.py`, which opens data.
"""
