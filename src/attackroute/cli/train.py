"""``attackroute train``: train a network and keep it in a folder that the other commands can open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options, train_options, train_report
from attackroute.cli.console import Output

if TYPE_CHECKING:
    from attackroute.hardening.history import TrainResult

EXAMPLES = """
 Examples:

   A network in about a minute, without a download
   $ attackroute train --model vgg_small --data mnist-sample --epochs 3 --out runs/digits

   A quarter-width VGG-16 on CIFAR-10, with the usual augmentation
   $ attackroute train --model vgg16 --width 0.25 --data cifar10:~/data --augment crop-flip \\
       --epochs 30 --out runs/vgg

   Go on after an interruption: the same command with --resume, for the same result
   $ attackroute train --model vgg16 --width 0.25 --data cifar10:~/data --augment crop-flip \\
       --epochs 30 --out runs/vgg --resume

   Adversarial training: every step learns from images that PGD attacks
   $ attackroute train --model vgg_small --data mnist-sample --attack pgd:eps=0.1,steps=5,step_size=0.03 \\
       --epochs 10 --out runs/robust

   A network of your own, made by make_net() in mynets.py, on your own images
   $ attackroute train --model mynets:make_net --data folder:photos --image-size 64 --out runs/photos

 The folder, which other commands take as --model:

   best.safetensors, last.safetensors   weights; the best ones are loaded: those of the epoch with the highest
                                        accuracy, with --attack that under the attack, on images held out of
                                        training (--holdout)
   model.json                           how to build the network
   log.jsonl, settings.json             one line an epoch; how it was trained
   state.pt                             what --resume needs
"""


def train(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where checkpoints and the log go.")],
    width: train_options.Width = 1.0,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    epochs: train_options.Epochs = 30,
    lr: train_options.Rate = 0.1,
    schedule: train_options.Schedule = train_options.Schedules.ONE_CYCLE,
    weight_decay: train_options.WeightDecay = 5e-4,
    augment: train_options.Augment = train_options.Augmentations.NONE,
    attack: train_options.Attack = None,
    robust_samples: train_options.RobustSamples = 500,
    accumulate: train_options.Accumulate = 1,
    clip_norm: train_options.ClipNorm = None,
    holdout: train_options.Holdout = 0.1,
    amp: train_options.Amp = False,
    channels_last: train_options.ChannelsLast = False,
    batch_size: options.BatchSize = 128,
    workers: train_options.Workers = 0,
    resume: train_options.Resume = False,
    tensorboard: train_options.TensorBoard = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a network with cross entropy, on clean images or, with --attack, on attacked ones (adversarial training).

    The run repeats bit for bit with the same seed on the same machine, keeps a checkpoint after every epoch, and goes
    on with --resume after Ctrl-C, SIGTERM or a crash as if it had never stopped.
    """
    import torch

    from attackroute.core.distributed import current, leading
    from attackroute.hardening.settings import TrainSettings
    from attackroute.hardening.training import train as run_training
    from attackroute.robustness.registry import parse_attack
    from attackroute.zoo.networks import build
    from attackroute.zoo.sources import load_data
    from attackroute.zoo.weights import ModelCard, spec_for, with_own_normalisation

    output = Output(as_json, quiet)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule.value,
        augment=augment.value,
        accumulate=accumulate,
        clip_norm=clip_norm,
        amp=amp,
        channels_last=channels_last,
        seed=seed,
        workers=workers,
        robust_samples=robust_samples,
    )
    against = None if attack is None else parse_attack(attack)
    home = options.resolve_device(device)
    train_data = load_data(data, split="train", image_size=image_size, skip_unreadable=skip_unreadable)
    test_data = None
    if not holdout:
        test_data = train_report.test_data(data, train_data, output, image_size, skip_unreadable)
    for part in (train_data, test_data):
        options.report_skipped(part, output)
    on = train_report.HELD_OUT if holdout else train_report.TEST
    learnt, chosen_by = train_report.divided(train_data, test_data, holdout, seed)
    spec = spec_for(model, train_data, width=width)
    torch.manual_seed(seed)
    network = build(spec).to(home)
    card = ModelCard(with_own_normalisation(spec, network), train_data.classes)
    current().first(lambda: train_report.prepare(options.open_folder(out), card, resume=resume))
    with (
        output.progress("steps") as progress,
        train_report.on_epoch(output, epochs, out if tensorboard and leading() else None, on) as on_epoch,
    ):
        result = run_training(
            network,
            learnt.dataset,
            None if chosen_by is None else chosen_by.dataset,
            settings,
            attack=against,
            folder=out,
            resume=resume,
            on_epoch=on_epoch,
            progress=progress,
        )
    _report(result, out, output, on)


def _report(result: TrainResult, folder: Path, output: Output, on: str) -> None:
    best, last = result.best, result.last
    output.result(
        {
            "folder": str(folder),
            "epochs": last.epoch,
            "resumed_from": result.resumed_from,
            "loss": last.loss,
            "train_accuracy": last.train.value,
            "test_accuracy": None if last.test is None else last.test.value,
            "tested_on": f"{on} images",
            "best_epoch": None if best is None else best.epoch,
            "best_test_accuracy": None if best is None or best.test is None else best.test.value,
            "best_robust_accuracy": None if best is None or best.robust is None else best.robust.value,
        }
    )
    if best is not None:
        output.line(train_report.best_line(best, last.epoch, on))
    output.line(f"training accuracy {last.train.value:.2%}; weights and log are in {folder}")
    output.line(f"next: attackroute trace --model {folder} --data ...")
