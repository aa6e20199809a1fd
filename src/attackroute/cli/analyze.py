"""``attackroute analyze``: what a route is worth, in the experiments of the paper's section 4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attackroute.cli.arguments import option, parse_names, parse_share, switch
from attackroute.cli.options import (
    ROUTE,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    Session,
    TracingOptions,
    count,
    out_option,
    refuse_earlier,
    results_in,
)


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """Measure what the critical attacking route is worth, beside controls of the same size.

    Every experiment of the paper's section 4 gives a table, a figure and one sentence, and says in which layers the
    route beats each control. Ctrl-C keeps the experiments that are done; --resume goes on.
    """

    title: ClassVar[str] = "The experiments"
    out: Path = out_option("Where tables and figures go.")
    network: NetworkOptions
    images: ImageOptions
    only: tuple[str, ...] | None = option(
        "--only", "Some of the experiments; else all but hold, a long one.", parse_names, "NAME,NAME", default=None
    )
    attacks: tuple[str, ...] = option(
        "--attack", "An attack, such as pgd:eps=4/255; else pgd. May be repeated; shares grow for the "
        "first.", str, "NAME", default=None, repeat=True,
    )  # fmt: skip
    layers: tuple[str, ...] | None = option(
        "--layers", "Some of the layers; else all. Occurrence always takes all.", parse_names,
        "NAME,NAME", default=None,
    )  # fmt: skip
    at: str = option(
        "--at", "Where channels are changed and maps taken: the layer's output (before batch norm), or activation.",
        str, "PLACE", default="output",
    )  # fmt: skip
    draws: int = count("--draws", "Random controls.", 5)
    share: float = option(
        "--route-width", "Share of each layer's channels on the route, and in the controls.", parse_share, "SHARE",
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
    from attackroute.core.distributed import current
    from attackroute.core.document import Document
    from attackroute.robustness.registry import parse_attack

    chosen = chosen_experiments(options.only)
    check_site(options.at)
    attacks = {str(attack): attack for attack in map(parse_attack, options.attacks or ["pgd"])}
    config = options.tracing.config(options.run.seed)
    config.check_attack(attacks)
    session = Session.open(options.network, options.images, options.run)
    output = options.run.output

    def tell(document: Document, result: ExperimentResult | None) -> None:
        if result is None:
            output.line(f"{document.kind}: done before. {document.reading}")
            return
        output.line(f"\n{document.kind} ({document.about['seconds']:.0f} s)")
        output.line(document.reading)

    refuse_earlier(options.out, ["summary.json", "hardening.json"], options.run)  # a route of theirs is there too
    files = [f"{each.name}.json" for each in chosen]
    with results_in(options.out, files, options.run, resume=options.resume) as folder:
        study = Study(
            model=session.network, images=session.images, attacks=attacks, config=config, layers=options.layers,
            share=options.share, at=options.at, draws=options.draws, batch_size=options.run.batch_size,
            workers=options.run.workers, seed=options.run.seed, folder=folder,
            settings={name: session.settings[name] for name in ("model", "data", "samples", "device")},
            note=output.note, progress=output.progress,
        )  # fmt: skip
        if options.resume:  # what is there on other terms is not replaced unasked either
            current().first(
                lambda: [
                    refuse_earlier(folder, [f"{each.name}.json"], options.run)
                    for each in chosen
                    if each.finished(study) is None and Document.is_at(folder / f"{each.name}.json")
                ]
            )
        documents = run_experiments(study, options.only, resume=options.resume, done=tell)
    output.line(f"Tables and figures are in {options.out}")
    experiments = {name: document.to_json() for name, document in documents.items()}
    output.result({"folder": str(options.out), "experiments": experiments})
