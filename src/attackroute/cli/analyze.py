"""``attackroute analyze``: what a route is worth, in the experiments of the paper's section 4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attackroute.cli.arguments import integer, option, parse_names, parse_share, switch
from attackroute.cli.options import (
    FILES,
    ROUTE,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    Session,
    TracingOptions,
    open_folder,
)

ANALYZE_EXAMPLES = """
Examples:

  All experiments on a network that was trained here, under PGD
  $ attackroute analyze --model runs/digits --data mnist-sample --samples 500 --out runs/digits/analysis

  Transplants for the paper's attacks and for noise, in three layers
  $ attackroute analyze --model runs/vgg --data cifar10:~/data --samples 1000 --only transplant \\
      --attack pgd --attack fgsm --attack step-ll --attack mi-fgsm --attack gaussian-noise --attack fog:severity=3 \\
      --layers features.0,features.3,features.7 --out runs/vgg/analysis

  A vision transformer: its attention projections and MLPs as layers, Grad-CAM over its tokens
  $ attackroute analyze --model torchvision:vit_b_16 --weights vit.pth --data imagenet:~/data --samples 64 \\
      --linear --batch-size 8 --only sensitivity,deactivate,weaken,gradcam --out runs/vit/analysis

  Go on after an interruption: finished experiments on the same terms are not run again
  $ attackroute analyze --model runs/vgg --data cifar10:~/data --out runs/vgg/analysis --resume

  For another program
  $ attackroute analyze --model runs/digits --data mnist-sample --out runs/a --json | jq '.experiments[].reading'

The experiments:

  occurrence    how much samples' routes have in common (Table 1), clean and attacked
  sensitivity   how much neurons move under attack, and the loss with them (Fig. 2)
  transplant    accuracy on attacked images with clean values in some channels (Fig. 3)
  deactivate    accuracy with channels set to zero (Fig. 4a)
  weaken        accuracy with the connections between channels scaled down (Fig. 4b)
  gradcam       where the route's channels look, and the others (Fig. 5)
  detect        whether an image's route gives an attack away

The files:

  EXPERIMENT.json, EXPERIMENT.csv   every number, and the terms on which it depends
  EXPERIMENT*.png, EXPERIMENT*.svg  the figures; deactivate-route shows the route itself
  route.json                        the route (attackroute.Route.load)

Where attention or normalisation over channels stands between two layers, no kernel slice joins two channels:
the control by weights is left out then, and weaken scales the connections that there are, as within MLPs; a note says
so. A map of Grad-CAM over tokens leaves out class tokens; the grid is that of the patches.

Controls of the route's size stand beside it everywhere: random channels off the route, and the channels that other
criteria rank first. Half of the images decide on routes and ranks, the other half are measured.
"""


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """Measure what the critical attacking route is worth, beside controls of the same size.

    Every experiment of the paper's section 4 gives a table, a figure and one sentence, and says in which layers the
    route beats each control. Ctrl-C keeps the experiments that are done; --resume goes on.
    """

    title: ClassVar[str] = "The experiments"
    out: Path = option("--out", "Where tables and figures go.", Path, "FOLDER", group=FILES)
    network: NetworkOptions
    images: ImageOptions
    only: tuple[str, ...] | None = option(
        "--only", "Some of the experiments; else all.", parse_names, "NAME,NAME", default=None
    )
    attacks: tuple[str, ...] = option(
        "--attack", "An attack or corruption, such as pgd:eps=4/255; else pgd. May be repeated; shares grow for the "
        "first.", str, "NAME", default=None, repeat=True,
    )  # fmt: skip
    layers: tuple[str, ...] | None = option(
        "--layers", "Some of the layers; else all. Occurrence and detection always take all.", parse_names,
        "NAME,NAME", default=None,
    )  # fmt: skip
    at: str = option(
        "--at", "Where channels are changed and maps taken: the layer's output (before batch norm), or activation.",
        str, "PLACE", default="output",
    )  # fmt: skip
    draws: int = option("--draws", "Random controls.", integer(1), "N", default=5)
    share: float = option(
        "--share", "Share of each layer's channels on the route, and in the controls.", parse_share, "SHARE",
        default=0.3, group=ROUTE,
    )  # fmt: skip
    tracing: TracingOptions
    resume: bool = switch("--resume", "Leave out experiments that --out holds already, on the same terms.", group=RUN)
    run: RunOptions


def analyze(options: AnalyzeOptions) -> None:
    """Run experiments into a folder, and show what each came to."""
    from attackroute.analysis.experiment import ExperimentResult, chosen_experiments
    from attackroute.analysis.experiment import analyze as run_experiments
    from attackroute.analysis.sites import check_site
    from attackroute.analysis.study import Study
    from attackroute.core.document import Document
    from attackroute.robustness.registry import parse_attack

    chosen_experiments(options.only)
    check_site(options.at)
    attacks = {text: parse_attack(text) for text in dict.fromkeys(options.attacks or ["pgd"])}
    config = options.tracing.config(options.run.seed)
    config.check_attack(attacks)
    session = Session.open(options.network, options.images, options.run)
    output = session.output
    study = Study(
        model=session.network,
        images=session.images,
        attacks=attacks,
        config=config,
        layers=options.layers,
        share=options.share,
        at=options.at,
        draws=options.draws,
        batch_size=options.run.batch_size,
        workers=options.run.workers,
        seed=options.run.seed,
        folder=open_folder(options.out),
        settings={name: session.settings[name] for name in ("model", "data", "samples", "device")},
        note=output.note,
        progress=output.progress,
    )

    def tell(document: Document, result: ExperimentResult | None) -> None:
        if result is None:
            output.line(f"{document.kind}: done before. {document.reading}")
            return
        output.line(f"\n{document.kind} ({document.about['seconds']:.0f} s)")
        summary = result.summary()
        output.table(summary.columns, summary.rows)
        output.line(document.reading)

    documents = run_experiments(study, options.only, resume=options.resume, done=tell)
    output.line(f"Tables and figures are in {options.out}")
    experiments = {name: document.to_json() for name, document in documents.items()}
    output.result({"folder": str(options.out), "experiments": experiments})
