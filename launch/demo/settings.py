"""The run configs that the demo trains with: the shipped ones, with this demo's paths and corpora."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from triweave.launch.demo.corpora import CorpusSet

SHORT_TEMPLATE = Path(__file__).parents[1] / "configs" / "demo_cpu.yaml"
LONG_TEMPLATE = Path(__file__).parents[1] / "configs" / "long_cpu.yaml"


def demo_config(
    template: Path, chosen: CorpusSet, *, shards: Path, tokenizer: Path, run_dir: Path, steps: int | None
) -> dict[str, Any]:
    """Return a shipped config with these places: its sources that are in the set, one of weight 1 for any other.

    steps: None takes those of the template.
    """
    tree: dict[str, Any] = yaml.safe_load(template.read_text(encoding="utf-8"))
    shipped = {source["name"]: source for source in tree["data"]["sources"]}
    first = tree["data"]["sources"][0]
    sources = [{**first, "weight": 1.0, **shipped.get(name, {}), "name": name} for name in chosen.sources]
    tree["data"]["sources"] = [{**source, "shards": str(shards / source["name"])} for source in sources]
    tree["data"]["tokenizer"] = str(tokenizer)
    tree["run_dir"] = str(run_dir)
    if steps is not None:
        tree["train"]["steps"] = steps
    return tree


def with_seed(tree: dict[str, Any], seed: int, run_dir: Path) -> dict[str, Any]:
    """Return the config with another seed, of the initial weights as of the order of the data."""
    changed = deepcopy(tree) | {"seed": seed, "run_dir": str(run_dir)}
    changed["data"]["seed"] = seed
    return changed


def with_shuffled_pairs(tree: dict[str, Any], shuffle_seed: int, run_dir: Path) -> dict[str, Any]:
    """Return the config of the control: every picture and sound exchanged for another one."""
    changed = deepcopy(tree) | {"run_dir": str(run_dir)}
    for source in changed["data"]["sources"]:
        source["shuffle_pairs"] = shuffle_seed
    return changed


def write_config(tree: dict[str, Any], path: Path) -> Path:
    """Write a config and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path
