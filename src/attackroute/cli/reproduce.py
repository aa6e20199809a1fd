"""``attackroute reproduce``: the paper's tables and figures with the paper's settings, beside the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attackroute.cli.arguments import integer, option, parse_path, switch
from attackroute.cli.options import FILES, RUN, RunOptions, out_option, refuse_earlier, resolve_device


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
    out: Path = out_option("Where everything goes.")
    models: tuple[str, ...] = option(
        "--model", "A trained network: preset:NAME or a train folder; may be repeated. Else every preset for the data.",
        str, "MODEL", default=None, repeat=True,
    )  # fmt: skip
    samples: int = option(
        "--samples", "Test images; half decide on routes and ranks, half are measured. Table 1 takes all there are.",
        integer(2), "N", default=2500,
    )  # fmt: skip
    page: Path | None = option(
        "--page", "Put the tables between the marks of this Markdown file; else into --out/reproduction.md.",
        parse_path, "FILE", default=None, group=FILES,
    )  # fmt: skip
    run: RunOptions
    resume: bool = switch("--resume", "Leave what --out holds already on the same terms as it is.", group=RUN)


def reproduce(options: ReproduceOptions) -> None:
    """Run the experiments, and print the verdicts."""
    from attackroute.core.files import made_folder
    from attackroute.paper.experiments import PARTS
    from attackroute.paper.run import PAGE, ReproductionSettings
    from attackroute.paper.run import reproduce as run

    output = options.run.output
    settings = ReproductionSettings(
        targets=options.targets, data=options.data, folder=options.out, models=options.models, samples=options.samples,
        page=options.page, batch_size=options.run.batch_size, seed=options.run.seed,
        device=resolve_device(options.run.device), resume=options.resume,
    )  # fmt: skip
    made_folder(options.out)
    if not options.resume:
        files = [f"*/{name}.json" for target in settings.experiments for name in PARTS[target]]
        refuse_earlier(options.out, [*files, *([] if options.page else [PAGE])], options.run, resume=False)
    claims_of = run(settings, line=output.line, note=output.note, progress=output.progress)
    listed = [{"target": target, **vars(claim)} for target, claims in claims_of.items() for claim in claims]
    output.result({"page": str(settings.filled), "claims": listed})
    for target, claims in claims_of.items():
        output.line(f"\n{target}")
        for claim in claims:
            output.line(f"  {claim}")
    output.line(f"\nAll of it is in {settings.filled}; tables and figures in {options.out}")
