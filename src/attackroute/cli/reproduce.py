"""``attackroute reproduce``: the paper's tables and figures with the paper's settings, beside the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attackroute.cli.arguments import integer, option, switch
from attackroute.cli.options import FILES, RUN, RunOptions, open_folder, resolve_device

REPRODUCE_EXAMPLES = """
Examples:

   Table 1 on the networks that come with the package, and your copy of CIFAR-10
   $ attackroute reproduce table1 --data cifar10:~/data --out runs/paper

   All that takes no training, for one network; then the page
   $ attackroute reproduce table1 table4 fig2 fig3 fig4 fig5 fig6 --data cifar10:~/data \\
       --model preset:vgg16-cifar10 --out runs/paper

   Your own network
   $ attackroute reproduce fig3 --data cifar10:~/data --model runs/vgg --out runs/paper

   Table 2, whose networks are trained from a clone of the repository in hours; see python -m studies.hardening --help
   $ python -m studies.hardening --data cifar10:~/data --train-samples 25000 --out runs/paper/table2
   $ attackroute reproduce table2 --out runs/paper

   Go on after an interruption
   $ attackroute reproduce all --data cifar10:~/data --out runs/paper --resume

 The targets:

   table1   how much images' routes share, and how few images give the route
   table2   hardening on CIFAR-10, with its controls, from the study in --out/table2
   table3   the same on SVHN, from the study in --out/table3
   table4   gradients of hard and of weak images
   fig2     sensitivity and gradients of the route's neurons
   fig3     transplants of clean values
   fig4     silenced channels, weakened connections
   fig5     Grad-CAM of the route's channels
   fig6     whom the hardness metric predicts to be fooled
   all      all of these, of tables 2 and 3 those whose study is there

 The files:

   NETWORK/PART.json, .csv, .png, .svg   every number and figure of one experiment on one network
   table2/, table3/                      where studies.hardening puts networks and numbers of a study
   reproduction.md                       all of it, beside the paper's numbers, with a verdict for each claim
"""


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Reproduce tables and figures of the paper with its settings, and say of each claim whether it holds.

    Half of the images decide on routes and ranks, the other half are measured. Every comparison has its controls, and a
    control that does as well is named. What was interrupted goes on with --resume.
    """

    title: ClassVar[str] = "What is reproduced"
    targets: tuple[str, ...] = option("", "table1 to table4, fig2 to fig6, or all.", str, "TARGET", repeat=True)
    data: str | None = option(
        "--data", "cifar10:PATH, svhn:PATH, imagenet:PATH or folder:PATH; tables 2 and 3 need none.", str, "DATA",
        default=None,
    )  # fmt: skip
    out: Path = option("--out", "Where everything goes.", Path, "FOLDER", group=FILES)
    models: tuple[str, ...] = option(
        "--model", "A trained network: preset:NAME or a train folder; may be repeated. Else every preset for the data.",
        str, "MODEL", default=None, repeat=True,
    )  # fmt: skip
    samples: int = option(
        "--samples", "Test images; half decide on routes and ranks, half are measured. Table 1 takes all there are.",
        integer(2), "N", default=2500,
    )  # fmt: skip
    page: Path | None = option(
        "--page", "Put the tables between the marks of this Markdown file; else into --out/reproduction.md.", Path,
        "FILE", default=None, group=FILES,
    )  # fmt: skip
    run: RunOptions
    resume: bool = switch("--resume", "Leave what --out holds already on the same terms as it is.", group=RUN)


def reproduce(options: ReproduceOptions) -> None:
    """Run the experiments, and print the verdicts."""
    from attackroute.paper.run import ReproductionSettings
    from attackroute.paper.run import reproduce as run

    output = options.run.output
    settings = ReproductionSettings(
        targets=options.targets,
        data=options.data,
        folder=options.out,
        models=options.models,
        samples=options.samples,
        page=options.page,
        batch_size=options.run.batch_size,
        seed=options.run.seed,
        device=resolve_device(options.run.device),
        resume=options.resume,
    )
    open_folder(options.out)
    claims_of = run(settings, line=output.line, note=output.note, progress=output.progress)
    listed = [{"target": target, **vars(claim)} for target, claims in claims_of.items() for claim in claims]
    output.result({"page": str(settings.filled), "claims": listed})
    for target, claims in claims_of.items():
        output.line(f"\n{target}")
        for claim in claims:
            output.line(f"  {claim}")
    output.line(f"\nAll of it is in {settings.filled}; tables and figures in {options.out}")
