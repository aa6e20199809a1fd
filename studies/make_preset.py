"""Make a preset of a folder that ``attackroute train`` or ``harden`` wrote.

    python -m studies.make_preset runs/vgg vgg16-cifar10 --data cifar10:~/data --note "..." -- attackroute train ...

Weights are stored in float16, and the accuracy of what was stored is measured on the test images.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from attackroute.core.statistics import count_correct
from attackroute.zoo.data import load_data
from attackroute.zoo.weights import BEST, CARD, PRESETS, TRAINING, load_preset

_COUNTER = "num_batches_tracked"  # of no use in eval mode


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--note", default="")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    preset = PRESETS / options.name
    preset.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.load_file(options.folder / BEST)
    halves = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in weights.items()
        if not name.endswith(_COUNTER)
    }
    safetensors.torch.save_file(halves, preset / BEST)
    shutil.copy(options.folder / CARD, preset / CARD)
    model = load_preset(options.name)
    tests = load_data(options.data, split="test")
    accuracy = count_correct(model, tests.dataset)
    content = {
        "command": shlex.join(options.command),
        "note": options.note,
        "accuracy": {"correct": accuracy.correct, "total": accuracy.total},
    }
    (preset / TRAINING).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{options.name}: {accuracy.value:.2%} of {accuracy.total} test images, {preset}")


if __name__ == "__main__":
    main()
