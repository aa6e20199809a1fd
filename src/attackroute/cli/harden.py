"""``attackroute harden``: fine-tune a network with penalties on its critical attacking route."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options, train_options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.hardening.harden import Factor

EXAMPLES = """
 Examples:

   Which lambda? Train briefly with several, write nothing, and compare
   $ attackroute harden --model runs/digits --data mnist-sample --penalty gradient --sweep 0.003,0.03,0.3 \\
       --epochs 1 --eps 0.1

   The paper's Vanilla_g and Vanilla_w (Eqs. (11), (14)): penalties without an attack
   $ attackroute harden --model runs/digits --data mnist-sample --penalty gradient --lam 0.03 --eps 0.1 \\
       --out runs/vanilla-g
   $ attackroute harden --model runs/digits --data mnist-sample --penalty weight --lam 0.001 --eps 0.1 \\
       --out runs/vanilla-w

   PAT_g and PAT_w (Eqs. (12), (15)), from a network of attackroute train --attack
   $ attackroute harden --model runs/robust --data mnist-sample --penalty gradient --lam 0.01 \\
       --attack pgd:eps=0.1,steps=5,step_size=0.03 --out runs/pat-g

   Not the paper's: what the attack changes in the neurons through which most of its noise passes
   $ attackroute harden --model runs/robust --data mnist-sample --penalty stabilisation --lam 0.01 --carrier noise \\
       --attack pgd:eps=0.1,steps=5,step_size=0.03 --out runs/pat-s

   Controls of the same size: random neurons off the route, all neurons, no penalty
   $ attackroute harden --model runs/digits --data mnist-sample --penalty gradient --lam 0.03 \\
       --target random --out runs/vanilla-g-random
   $ attackroute harden --model runs/digits --data mnist-sample --penalty none --out runs/vanilla-longer

 The folder, which other commands take as --model, is that of attackroute train, and:

   route.json        the route whose neurons were punished, or from which the control was drawn
   hardening.json    before and after, how the route changed, and each penalty's strength

 Lambda times a penalty's strength is its share in the gradient of the first step; begin where that is about 0.1.
"""

_PENALTY = "The penalty"
_EVALUATION = "Before and after"


class Penalties(str, Enum):
    """What is punished."""

    GRADIENT = "gradient"
    WEIGHT = "weight"
    STABILISATION = "stabilisation"
    BOTH = "both"
    NONE = "none"


class Targets(str, Enum):
    """Whose neurons are punished."""

    ROUTE = "route"
    RANDOM = "random"
    ALL = "all"


def harden(
    model: options.Model,
    data: options.Data,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where checkpoints, log and route go; not needed with --sweep."),
    ] = None,
    weights: options.Weights = None,
    model_width: options.ModelWidth = None,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    penalty: Annotated[
        Penalties,
        typer.Option(
            "--penalty",
            rich_help_panel=_PENALTY,
            help="The route's loss gradients (Eq. (10)), the weights between its neurons (Eq. (13)), both, or "
            "stabilisation, what --attack changes in its neurons (not the paper's). Kernels "
            "behind attention or normalisation over channels join no two neurons, and have no weight penalty.",
        ),
    ] = Penalties.GRADIENT,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lam",
            metavar="FACTOR",
            rich_help_panel=_PENALTY,
            help="Lambda, the penalty's factor; with both penalties also as gradient=0.03,weight=0.001.",
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="F,F,...", rich_help_panel=_PENALTY, help="Try these lambdas and write nothing."
        ),
    ] = None,
    target: Annotated[
        Targets,
        typer.Option(
            "--target",
            rich_help_panel=_PENALTY,
            help="The route's neurons, or for controls as many random ones off it, or all.",
        ),
    ] = Targets.ROUTE,
    route: Annotated[
        Path | None,
        typer.Option(
            "--route",
            metavar="FILE",
            rich_help_panel=_PENALTY,
            help="A route of attackroute trace; else one is traced.",
        ),
    ] = None,
    route_samples: Annotated[
        float,
        typer.Option(
            "--route-samples",
            metavar="SHARE",
            parser=options.parse_share,
            rich_help_panel=_PENALTY,
            help="Share of the training images to trace.",
        ),
    ] = 0.1,
    carrier: options.Carrier = options.Carriers.UNIT,
    linear: options.Linear = False,
    sketches: options.Sketches = None,
    compare_full: Annotated[
        bool,
        typer.Option(
            "--compare-full/--no-compare-full",
            rich_help_panel=_PENALTY,
            help="Trace all training images too, and say how much of the route they agree on.",
        ),
    ] = True,
    refresh: Annotated[
        int | None,
        typer.Option(
            "--refresh", metavar="N", min=1, rich_help_panel=_PENALTY, help="Trace the route anew every N epochs."
        ),
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            rich_help_panel=_PENALTY,
            help="Gradient penalty by finite differences (an approximation) instead of double backward.",
        ),
    ] = False,
    folded: Annotated[
        bool,
        typer.Option(
            "--folded/--raw",
            rich_help_panel=_PENALTY,
            help="Weight penalty on kernels with batch norm folded in, or on kernels as they are.",
        ),
    ] = True,
    epochs: train_options.Epochs = 10,
    lr: train_options.Rate = 0.01,
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
    evaluate_by: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate",
            metavar="NAME",
            rich_help_panel=_EVALUATION,
            help="An attack or corruption to compare under, as in attackroute evaluate; repeat it for several.",
            show_default="fgsm, mi-fgsm, pgd, gaussian-noise, and autoattack on a subset",
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            "--eps",
            metavar="RADIUS",
            parser=options.parse_number,
            rich_help_panel=_EVALUATION,
            help="Radius of those that do not state their own.",
            show_default="that of --attack, or 8/255",
        ),
    ] = None,
    evaluate_samples: Annotated[
        int | None,
        typer.Option(
            "--evaluate-samples",
            metavar="N",
            min=1,
            rich_help_panel=_EVALUATION,
            help="Only so many test images.",
            show_default="all",
        ),
    ] = None,
    autoattack_samples: Annotated[
        int | None,
        typer.Option(
            "--autoattack-samples",
            metavar="N",
            min=0,
            rich_help_panel=_EVALUATION,
            help="AutoAttack on so many of them (needs the extra autoattack); 0 leaves it out.",
            show_default="50, none with --evaluate",
        ),
    ] = None,
    check_samples: Annotated[
        int,
        typer.Option(
            "--check-samples",
            metavar="N",
            min=0,
            rich_help_panel=_EVALUATION,
            help="On how many of them to look for masked gradients; 0 for no checks.",
        ),
    ] = 128,
    batch_size: options.BatchSize = 128,
    workers: train_options.Workers = 0,
    resume: train_options.Resume = False,
    tensorboard: train_options.TensorBoard = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fine-tune a network with a penalty on its critical attacking route, and compare it with what it was.

    Runs repeat bit for bit and go on with --resume, as those of attackroute train.
    """
    from attackroute.cli.harden_comparison import DEFAULT_ATTACKS, autoattack_by, compared_by
    from attackroute.cli.harden_run import HardenRun
    from attackroute.hardening.settings import APPROXIMATE, EXACT, FINE_TUNING, HardenSettings, TrainSettings
    from attackroute.robustness.registry import parse_attack
    from attackroute.tracing.config import TraceConfig

    output = Output(as_json, quiet)
    names = {Penalties.BOTH: (Penalties.GRADIENT.value, Penalties.WEIGHT.value), Penalties.NONE: ()}.get(
        penalty, (penalty.value,)
    )
    _check_factors(names, lam, sweep)
    factor, tried = _factor(names, lam), None if sweep is None else _tried(sweep)
    if sweep is None and out is None:
        raise UserError("name the folder of the hardened network with --out, or try lambdas with --sweep")
    if sweep is not None and (out is not None or resume or tensorboard):
        raise UserError("--sweep writes nothing; leave out --out, --resume and --tensorboard")
    train = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=FINE_TUNING.momentum,
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
    run = HardenRun.open(
        model,
        data,
        weights=weights,
        width=model_width,
        image_size=image_size,
        skip_unreadable=skip_unreadable,
        holdout=holdout,
        evaluate_samples=evaluate_samples,
        device=options.resolve_device(device),
        attacks=compared_by(evaluate_by or DEFAULT_ATTACKS, eps, against, seed),
        autoattack=autoattack_by(autoattack_samples, evaluate_by, eps, against, seed, output),
        checks=check_samples,
        options={
            "penalty": names,
            "attack": against,
            "route": route,
            "settings": HardenSettings(
                target=target.value,
                route_samples=route_samples,
                refresh=refresh,
                compare_full=compare_full,
                trace=TraceConfig(linear=linear, sketches=sketches, carrier=carrier.value),
                method=APPROXIMATE if approximate else EXACT,
                folded=folded,
            ),
            "train": train,
        },
        output=output,
    )
    if tried is not None:
        run.sweep(tried)
    elif out is not None:
        run.harden(options.open_folder(out), factor, resume=resume, tensorboard=tensorboard)


def _check_factors(penalties: Sequence[str], lam: str | None, sweep: str | None) -> None:
    if not penalties and (lam is not None or sweep is not None):
        raise UserError("--penalty none has no lambda; leave out --lam and --sweep")
    if penalties and (lam is None) == (sweep is None):
        raise UserError("give the penalty's factor with --lam, or several to try with --sweep 0.01,0.1,1")


def _factor(penalties: Sequence[str], lam: str | None) -> Factor:
    """Lambda, for all penalties or for each."""
    if lam is None:
        return 0.0
    if "=" not in lam:
        return _number("--lam", lam)
    named = [part.partition("=")[::2] for part in lam.split(",")]
    if sorted(name.strip() for name, _ in named) != sorted(penalties):
        example = ",".join(f"{name}=0.01" for name in penalties)
        raise UserError(f"--lam {lam} does not name each penalty once; write {example}, or one number for all")
    return {name.strip(): _number("--lam", text) for name, text in named}


def _tried(sweep: str) -> list[float]:
    """The lambdas of a sweep."""
    factors = [_number("--sweep", text) for text in sweep.split(",")]
    if len({f"{factor:g}" for factor in factors}) < len(factors):
        raise UserError(f"--sweep {sweep} has a factor twice; give each once")
    return factors


def _number(option: str, text: str) -> float:
    try:
        return options.parse_number(text)
    except typer.BadParameter as error:
        raise UserError(f"{option}: {error.message}") from None
