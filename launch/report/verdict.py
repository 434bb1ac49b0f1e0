"""One sentence that answers the visitor's question from the figures: does the model learn from pictures and sounds?

yes     every interval of a caption's NLL gap lies above 0, and at least half of the retrieval tasks are above their
        best classical floor
floor   the same, with chance in place of the floor
partly  some gap's interval lies above 0, or at least half of the retrieval tasks are above chance
no      neither
open    not evaluated

Half, because of twenty intervals of 95 % one may be wrong by luck. Where a control on shuffled pairs is above chance in
more than half of its tasks, something else than the pairs earns the recall, and retrieval counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from triweave.launch.report.evaluation_file import Evaluation
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.wording import interval, listing, number

MODALITY_WORDS = {"image": "picture", "audio": "sound", "text": "text"}
_ANSWERS = {
    "yes": "Yes.",
    "floor": "Yes, but it mostly retrieves no better than simple features do.",
    "partly": "Partly.",
    "no": "No sign of it.",
    "open": "Not measured.",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """level: yes, floor, partly, no or open; answer: the level in words; sentence: what it rests on."""

    level: str
    answer: str
    sentence: str


def judge(run: ReportRun) -> Verdict:
    """Return the verdict on a run."""
    evaluation = run.evaluation
    if evaluation is None or not (evaluation.caption_nll or evaluation.retrieval):
        return _verdict("open", _sentence_of_losses(run))
    gaps = [item.interval[0] > 0 for item in evaluation.caption_nll]
    tasks = evaluation.retrieval
    controls = [task.control_above_chance for task in tasks if task.control is not None]
    by_pairs = 2 * sum(controls) <= len(controls)
    beats_floor = by_pairs and _at_least_half([task.beats_floor for task in tasks])
    beats_chance = by_pairs and _at_least_half([task.beats_chance for task in tasks])
    if gaps and all(gaps) and beats_chance:
        level = "yes" if beats_floor else "floor"
    else:
        level = "partly" if any(gaps) or beats_chance else "no"
    return _verdict(level, "; ".join([*_gap_clauses(evaluation), *_retrieval_clauses(evaluation)]) + ".")


def _at_least_half(answers: list[bool]) -> bool:
    return bool(answers) and 2 * sum(answers) >= len(answers)


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
        above, below = sum(task.beats_floor for task in floors), sum(task.below_floor for task in floors)
        clause += f" and above the best classical floor in {above} of {len(floors)}"
        clause += f" (below it in {below})" if below else ""
    clauses = [clause]
    controls = [task for task in tasks if task.control is not None]
    if controls:
        at_chance = sum(task.control_at_chance for task in controls)
        clauses.append(f"a control trained on shuffled pairs is at chance in {at_chance} of {len(controls)}")
    return clauses
