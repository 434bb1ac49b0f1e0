"""One sentence that answers the visitor's question from the figures: does the model learn from pictures and sounds?

yes     every interval of a caption's NLL gap lies above 0, and some retrieval task is above its best classical floor
partly  some gap's interval lies above 0, or some retrieval task is above chance
no      neither
open    not evaluated
"""

from __future__ import annotations

from dataclasses import dataclass

from triweave.launch.report.evaluation_file import Evaluation
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.wording import interval, listing, number

MODALITY_WORDS = {"image": "picture", "audio": "sound", "text": "text"}
_ANSWERS = {"yes": "Yes.", "partly": "Partly.", "no": "No sign of it.", "open": "Not measured."}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """level: yes, partly, no or open; answer: the level in words; sentence: what it rests on."""

    level: str
    answer: str
    sentence: str


def judge(run: ReportRun) -> Verdict:
    """Return the verdict on a run."""
    evaluation = run.evaluation
    if evaluation is None or not (evaluation.caption_nll or evaluation.retrieval):
        return _verdict("open", _sentence_of_losses(run))
    gaps = [item.interval[0] > 0 for item in evaluation.caption_nll]
    beats_floor = any(task.beats_floor for task in evaluation.retrieval)
    beats_chance = any(task.beats_chance for task in evaluation.retrieval)
    if gaps and all(gaps) and beats_floor:
        level = "yes"
    else:
        level = "partly" if any(gaps) or beats_chance else "no"
    return _verdict(level, "; ".join([*_gap_clauses(evaluation), *_retrieval_clauses(evaluation)]) + ".")


def _verdict(level: str, sentence: str) -> Verdict:
    return Verdict(level=level, answer=_ANSWERS[level], sentence=sentence[0].upper() + sentence[1:])


def _sentence_of_losses(run: ReportRun) -> str:
    below = [name for name, loss in run.final_losses.items() if loss < run.unigram.get(name, float("-inf"))]
    advice = f"whether pictures and sounds matter to it, `triweave evaluate {run.folder}` measures."
    if not below:
        return advice
    return f"on tokens that follow {listing(below)} its loss is below that of the best unigram model; {advice}"


def _gap_clauses(evaluation: Evaluation) -> list[str]:
    clauses = []
    for item in evaluation.caption_nll:
        word = MODALITY_WORDS.get(item.name, item.name)
        bounds = f"95 % interval {interval(item.interval, 3)}"
        if item.interval[0] > 0:
            clauses.append(f"a caption costs {number(item.gap, 3)} nats per token more under a wrong {word} ({bounds})")
        else:
            clauses.append(f"a wrong {word} does not measurably worsen captions ({number(item.gap, 3)} nats, {bounds})")
    return clauses


def _retrieval_clauses(evaluation: Evaluation) -> list[str]:
    tasks = evaluation.retrieval
    if not tasks:
        return []
    chance = sum(task.beats_chance for task in tasks)
    floors = [task for task in tasks if task.difference is not None]
    clause = f"retrieval (R@10) is above chance in {chance} of {len(tasks)} tasks"
    if floors:
        clause += f" and above the best classical floor in {sum(task.beats_floor for task in floors)} of {len(floors)}"
    clauses = [clause]
    controls = [task for task in tasks if task.control is not None]
    if controls:
        at_chance = sum(task.control_at_chance for task in controls)
        clauses.append(f"a control trained on shuffled pairs is at chance in {at_chance} of {len(controls)}")
    return clauses
