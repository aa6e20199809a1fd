"""What the commands which train have in common: the test data, the folder, and what they say of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.core.accuracy import Accuracy
    from attackroute.hardening.history import EpochRecord
    from attackroute.zoo.data import ImageData


TEST, HELD_OUT = "test", "held-out"


def test_data(
    spec: str, train_data: ImageData, output: Output, image_size: int | None, skip_unreadable: bool
) -> ImageData | None:
    """The test images that belong to the training images; None, with a note, where the folder has none."""
    if train_data.split == "all":
        output.note("note: the folder has no train/ and test/ (or val/), so there is nothing to test on")
        return None
    from attackroute.zoo.sources import load_data

    return load_data(spec, split="test", image_size=image_size, skip_unreadable=skip_unreadable)


def divided(
    train_data: ImageData, test_data: ImageData | None, holdout: float, seed: int
) -> tuple[ImageData, ImageData | None]:
    """The images to learn from, and those that choose the best epoch: held out of the former, or the test images."""
    if not holdout:
        return train_data, test_data
    if not 0 < holdout < 1:
        raise UserError(f"--holdout {holdout:g} is not a share of the training images; give 0.1, or 0 for none")
    from dataclasses import replace

    from attackroute.zoo.data import held_out

    learnt, kept = held_out(train_data.dataset, holdout, seed)
    return replace(train_data, dataset=learnt), replace(train_data, dataset=kept)


def prepare(folder: Path, card: Any, *, resume: bool) -> None:
    """Describe the network in its folder before the first step, so that a run that is killed can be opened too."""
    from attackroute.hardening.checkpoint import STATE

    if (folder / STATE).exists() and not resume:
        raise UserError(f"{folder} already holds a run; pass --resume to go on with it, or choose another folder")
    card.save(folder)


@contextmanager
def on_epoch(output: Output, epochs: int, events: Path | None, on: str) -> Iterator[Callable[[EpochRecord], None]]:
    """What to call after every epoch: it says what the epoch did, and logs it for TensorBoard in a run's folder."""
    from attackroute.hardening.history import event_log

    with nullcontext() if events is None else event_log(events) as log:

        def report(record: EpochRecord) -> None:
            output.note(epoch_line(record, epochs, on))
            if log is not None:
                log(record)

        try:
            yield report
        except KeyboardInterrupt as error:
            output.note(f"interrupted: {error or 'between two epochs'}")
            raise


def epoch_line(record: EpochRecord, epochs: int, on: str) -> str:
    """What an epoch did, in one line; ``on`` which images it was tested."""
    test = "" if record.test is None else f", {on} accuracy {record.test.value:.2%}"
    robust = "" if record.robust is None else f", under the attack {record.robust.value:.2%}"
    penalties = "".join(f", {name} penalty {value:.4g}" for name, value in record.penalties.items())
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.loss:.3f}{penalties}, "
        f"training accuracy {record.train.value:.2%}{test}{robust}, {record.seconds:.0f} s"
    )


def best_line(best: EpochRecord, epochs: int, on: str) -> str:
    """What the best epoch reached, with intervals; ``on`` which images it was tested."""
    parts = [
        f"{name} {with_interval(found)}"
        for name, found in ((f"{on} accuracy", best.test), ("under the attack", best.robust))
        if found is not None
    ]
    return f"best epoch {best.epoch} of {epochs}: {', '.join(parts)}"


def with_interval(accuracy: Accuracy) -> str:
    """An accuracy and its interval."""
    low, high = accuracy.interval
    return f"{accuracy.value:.2%} (95 % interval {low:.2%} to {high:.2%})"
