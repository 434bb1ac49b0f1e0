"""The page: sections in the order a visitor wants them, rendered into one HTML file that loads nothing.

Every text goes through the template's escaping; the style sheet is named by its hash in the page's policy, which allows
nothing else but data: pictures and sounds. Equal inputs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triweave.launch.report import figures
from triweave.launch.report.content import Caption, Card, CardGroup, Folded, Section, render
from triweave.launch.report.health import health_section
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.samples import CAPTION_TOKENS, RunSamples
from triweave.launch.report.sections import (
    Fact,
    caption_table,
    classification_table,
    differing_settings,
    efficiency_table,
    key_facts,
    key_table,
    loss_table,
    machine_table,
    retrieval_table,
)
from triweave.launch.report.slow_steps import slow_section
from triweave.launch.report.verdict import Verdict, judge
from triweave.launch.report.wording import listing

TEMPLATE_NAME = "page.html.j2"


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """What stands above the sections for each run."""

    name: str
    verdict: Verdict
    facts: Sequence[Fact]


def render_page(runs: Sequence[ReportRun], samples: Sequence[RunSamples]) -> str:
    """Return the page of one run or of several side by side; samples belong to the runs in order."""
    return render(
        TEMPLATE_NAME,
        title=listing([run.name for run in runs]),
        kind="report",
        many=len(runs) > 1,
        runs=[RunHead(name=run.name, verdict=judge(run), facts=key_facts(run)) for run in runs],
        key_table=key_table(runs),
        sections=page_sections(runs, samples),
    )


def page_sections(runs: Sequence[ReportRun], samples: Sequence[RunSamples]) -> list[Section]:
    """Return the sections from the top of the page to its end."""
    contrastive, tasks = figures.contrastive_plots(runs), figures.task_plots(runs)
    return [
        Section(
            id="losses",
            title="Loss",
            paragraphs=(
                "Cross-entropy of the tokens that follow text only, a picture or a sound. Thin: single steps; strong: "
                "their running mean; dotted: the best model that ignores all context, where the demo has computed it.",
            ),
            plots=figures.loss_plots(runs) + figures.tower_plots(runs),
            tables=(loss_table(runs),),
        ),
        *([Section(id="objectives", title="Objectives", plots=tasks)] if tasks else []),
        *([Section(id="contrastive", title="Contrastive loss", plots=contrastive)] if contrastive else []),
        *([health] if (health := health_section(runs)) else []),
        *_evaluation_sections(runs),
        _sample_section(runs, samples),
        Section(
            id="efficiency",
            title="Time, packs and memory",
            plots=figures.efficiency_plots(runs),
            tables=(efficiency_table(runs),),
        ),
        *([slow] if (slow := slow_section(runs)) else []),
        Section(id="machine", title="Machine and versions", tables=(machine_table(runs),)),
        _config_section(runs),
    ]


def _evaluation_sections(runs: Sequence[ReportRun]) -> list[Section]:
    missing = [
        f"{run.name} has not been evaluated: run `triweave evaluate {run.folder}`, then this report again."
        for run in runs
        if run.evaluation is None
    ]
    if len(missing) == len(runs):
        return [Section(id="retrieval", title="Retrieval and captions", paragraphs=missing)]
    stated = [*(_evaluation_words(run) for run in runs if run.evaluation), *missing]
    sections = []
    if table := retrieval_table(runs):
        stated.append(_marks_words(runs))
        sections.append(
            Section(
                id="retrieval",
                title="Retrieval",
                paragraphs=stated,
                plots=figures.retrieval_plots(runs),
                tables=(table,),
            )
        )
        stated = []
    if table := caption_table(runs):
        words = "How much worse a caption is predicted when its picture or sound is exchanged for another one."
        plots = figures.caption_plots(runs)
        sections.append(
            Section(id="captions", title="Captions", paragraphs=(*stated, words), plots=plots, tables=(table,))
        )
        stated = []
    if table := classification_table(runs):
        sections.append(Section(id="classification", title="Classification", paragraphs=stated, tables=(table,)))
    return sections


def _marks_words(runs: Sequence[ReportRun]) -> str:
    trained = any(task.control for run in runs if run.evaluation for task in run.evaluation.retrieval)
    control = ", and the control: a model trained on shuffled pairs" if trained else ""
    return (
        "Queries are documents that the run has not seen, each ranked among the candidates of its language. Marks: "
        f"chance; classical floors, fitted on the training documents{control}."
    )


def _evaluation_words(run: ReportRun) -> str:
    evaluation = run.evaluation
    assert evaluation is not None
    where = f"the {evaluation.split} split" if evaluation.split else "the fold it left out"
    where = f"{evaluation.folds} folds" if evaluation.folds else where
    late = "" if evaluation.step == run.steps else f" (the run has gone on to step {run.steps:,})"
    evaluated = f"{run.name}: evaluated at step {evaluation.step:,}{late} on {where}"
    return f"{evaluated}; intervals are 95 %, by bootstrap over concepts."


def _sample_section(runs: Sequence[ReportRun], samples: Sequence[RunSamples]) -> Section:
    paragraphs = [
        f"{run.name}: no samples: {own.reason or 'the shards hold no picture or sound with a text'}."
        for run, own in zip(runs, samples, strict=True)
        if not own.samples
    ]
    shown = [own for own in samples if own.samples]
    if shown:
        steps = listing([f"{step:,}" for step in dict.fromkeys(own.step for own in shown)])
        held_out = all(sample.held_out for own in shown for sample in own.samples)
        origin = "held-out documents" if held_out else "documents that the run may have been trained on"
        paragraphs.append(
            f"Drawn by hash from {origin}, evenly over categories, none picked by hand. Captions are greedy, at most "
            f"{CAPTION_TOKENS} tokens, by the checkpoint of step {steps}."
        )
    cards = _cards(runs, samples)
    titles = {"image": "Pictures", "audio": "Sounds"}
    groups = [
        CardGroup(title=title, cards=own)
        for modality, title in titles.items()
        if (own := [card for card in cards if card.modality == modality])
    ]
    return Section(id="samples", title="Samples", paragraphs=paragraphs, samples=groups)


def _cards(runs: Sequence[ReportRun], samples: Sequence[RunSamples]) -> list[Card]:
    """Return one card for every sample, with the captions of all runs that show it."""
    captions: dict[tuple[str, str], list[Caption]] = {}
    first: dict[tuple[str, str], Card] = {}
    for run, own in zip(runs, samples, strict=True):
        for sample in own.samples:
            key = (sample.modality, sample.key)
            captions.setdefault(key, []).append(Caption(run=run.name, text=sample.generated))
            first.setdefault(
                key,
                Card(
                    modality=sample.modality,
                    uri=sample.uri,
                    truth=sample.truth,
                    about=sample.about,
                    captions=captions[key],
                ),
            )
    return list(first.values())


def _config_section(runs: Sequence[ReportRun]) -> Section:
    differing = differing_settings(runs)
    folded = [Folded(title=f"config.yaml of {run.name}", text=run.config_text) for run in runs if run.config_text]
    missing = [f"{run.name} has no config.yaml." for run in runs if not run.config_text]
    tables = (differing,) if differing else ()
    return Section(id="config", title="Config", paragraphs=missing, tables=tables, folded=folded)
