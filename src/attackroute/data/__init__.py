"""Labelled images in [0, 1]: benchmark sets on disk, folders of files, and digits that a package carries."""

from __future__ import annotations

from attackroute.data.batched import ImageBatches
from attackroute.data.images import ImageData, check_images, loader
from attackroute.data.sources import load_data

__all__ = ["ImageBatches", "ImageData", "check_images", "load_data", "loader"]
