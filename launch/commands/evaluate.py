"""examples:
  triweave evaluate runs/demo/train                    tables, and runs/demo/train/evaluation.json
  triweave evaluate runs/demo/train --json --out /tmp/evaluation.json
  triweave evaluate runs/demo/train --control          also a model trained on shuffled pairs (trained when missing)
  triweave evaluate runs/demo/train --folds 5          a model for each fold by concept; all queries together
  triweave evaluate runs/demo/train --plots plots      PNG and SVG
  triweave evaluate runs/demo/train --split validation --out validation.json     to choose settings by

It asks about what the run held out (`split: train` holds out the split test), beside floors fitted on what it trained
on. --control and --folds train below RUN; interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triweave.launch.errors import LaunchError

if TYPE_CHECKING:
    from triweave.pretrain.checkpoints.load import LoadedRun

RESULT_NAME = "evaluation.json"
MOST_FOLDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run_dir of a training")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="what is asked of a run that trained on split: train; choose settings by validation (default: test)",
    )
    parser.add_argument("--folds", type=int, metavar="N", help="train and ask a model for each of N folds by concept")
    parser.add_argument("--control", action="store_true", help="train and ask a model of shuffled pairs beside it")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"result file (default: RUN/{RESULT_NAME})")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots as PNG and SVG into this folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of RUN to ask (default: the newest)")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0, help="of shuffles, ties and resamples (default: 0)")
    parser.add_argument(
        "--num-ranks", type=int, metavar="N", help="ranks of the trainings (default: one per GPU, 1 without)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write the result, print it."""
    check(arguments)
    import torch

    from triweave.data_pipeline.shards.manifest import write_atomically
    from triweave.pretrain.evaluation.evaluate import evaluate_folds

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    runs = fold_runs(arguments) if arguments.folds else [load(arguments, arguments.run, arguments.step)]
    controls = [control_of(arguments, each) for each in runs] if arguments.control else None
    result = evaluate_folds(
        runs, controls=controls, run_dir=arguments.run, split=arguments.split, seed=arguments.seed, tell=tell
    )
    target = arguments.run / RESULT_NAME if arguments.out is None else arguments.out
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(result, indent=1, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise LaunchError(f"{target}: {error.strerror}; choose a file that can be written: --out FILE") from None
    if arguments.plots is not None:
        from triweave.launch.evaluation_plots import write_plots

        for path in write_plots(result, arguments.plots):
            tell(f"plot: {path}")
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        from triweave.launch.evaluation_tables import print_tables

        print_tables(result)
        print(f"\n{target}")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise LaunchError for options that cannot be."""
    if arguments.folds is not None and not 2 <= arguments.folds <= MOST_FOLDS:
        raise LaunchError(f"--folds {arguments.folds}: must be from 2 to {MOST_FOLDS}")
    if arguments.folds is not None and arguments.split != "test":
        raise LaunchError("--split goes with a run that trained on a split, not with --folds; leave one of them out")
    if arguments.folds is not None and arguments.step is not None:
        raise LaunchError("--step goes with one model, not with --folds; leave one of them out")
    for name in ("threads", "num_ranks"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise LaunchError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def fold_runs(arguments: argparse.Namespace) -> list[LoadedRun]:
    """Train what is missing of the folds' models, and load them."""
    from triweave.launch.variants import fold_config

    config = load(arguments, arguments.run, None).config
    configs = [fold_config(config, arguments.run, fold, arguments.folds) for fold in range(arguments.folds)]
    return [load(arguments, train(arguments, each), each.train.steps) for each in configs]


def control_of(arguments: argparse.Namespace, trained: LoadedRun) -> LoadedRun:
    """Train the control of a run where it is missing, and load it."""
    from triweave.launch.variants import control_config

    if "contrastive" not in trained.config.model.objectives:
        raise LaunchError(
            f"--control: {trained.run_dir} has no contrastive objective, so there is no retrieval to compare; "
            "leave the option out"
        )
    config = control_config(trained.config, trained.run_dir)
    return load(arguments, train(arguments, config), config.train.steps)


def train(arguments: argparse.Namespace, config: Any) -> Path:
    """Train a variant of the run to its end."""
    from triweave.launch.machine import inspect_machine
    from triweave.launch.variants import train_variant

    machine = inspect_machine()
    ranks = machine.default_ranks if arguments.num_ranks is None else arguments.num_ranks
    return train_variant(config, ranks=ranks, machine=machine, tell=tell)


def load(arguments: argparse.Namespace, run_dir: Path, step: int | None) -> LoadedRun:
    """Load a run's model."""
    from triweave.pretrain.checkpoints.load import load_run

    return load_run(run_dir, step=step, device=arguments.device, tell=tell)


def tell(line: str) -> None:
    """Print a progress line where results do not go."""
    print(line, file=sys.stderr, flush=True)
