"""Let a trained model go on from pictures, sounds and text: a caption for a picture, a transcript of a voice.

examples:
  triweave generate runs/demo/train --image cat.png
  triweave generate runs/demo/train --image cat.png --image dog.png --json
  triweave generate runs/demo/train --audio meow.ogg --text "A small" --temperature 0.8 --top-p 0.9 --seed 1
  triweave generate runs/demo/train --prompt prompts.json --step 120

prompts.json is a list of parts, or a list of such lists; YAML will do too, and paths are relative to the file:
  [{"image": "cat.png"}, {"text": "A small"}]
  [[{"text": "This is a "}, {"image": "cat.png"}, {"text": "and this a"}], [{"audio": "meow.ogg"}]]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triweave.data_pipeline.errors import PromptError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.prompt import PromptPart, read_media, read_prompts

if TYPE_CHECKING:
    from triweave.pretrain.checkpoints.load import LoadedRun
    from triweave.pretrain.generation.generate import Generation


class _AddMedia(argparse.Action):
    """Append (modality, file) to one list, so that pictures and sounds keep their order on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert option_string is not None
        namespace.media = [*(namespace.media or []), (self.const, Path(values))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, help="run_dir of a training, such as runs/demo/train")
    for name in MODALITIES:
        parser.add_argument(
            f"--{name}",
            action=_AddMedia,
            const=name,
            dest="media",
            metavar="FILE",
            help=f"{name} file to go on from; may be repeated, each is a prompt of its own",
        )
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="JSON or YAML file of interleaved prompts")
    parser.add_argument("--text", help="text behind each file, which the model goes on from; alone it is the prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="most new tokens of a prompt (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    parser.add_argument("--step", type=int, help="checkpoint to load (default: the newest whole one)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--no-cache", action="store_true", help="compute every position again for every token")
    parser.add_argument("--json", action="store_true", help="print results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read the prompts, load the model, go on, print."""
    prompts = _prompts(arguments)
    from triweave.pretrain.checkpoints.load import load_run
    from triweave.pretrain.generation.generate import generate

    loaded = load_run(arguments.run, step=arguments.step, device=arguments.device)
    results = generate(
        loaded,
        prompts,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        cache=not arguments.no_cache,
    )
    if arguments.json:
        print(json.dumps(_as_json(loaded, prompts, results), indent=1, ensure_ascii=False))
    else:
        _show(loaded, prompts, results)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[list[PromptPart]]:
    if arguments.prompt is not None:
        if arguments.media or arguments.text is not None:
            options = ", ".join(f"--{name}" for name in MODALITIES)
            raise PromptError(f"--prompt {arguments.prompt} holds whole prompts; leave out {options} and --text")
        return read_prompts(arguments.prompt)
    behind: list[PromptPart] = [] if arguments.text is None else [arguments.text]
    if arguments.media:
        return [[read_media(path, modality), *behind] for modality, path in arguments.media]
    if not behind:
        options = ", ".join(f"--{name} FILE" for name in MODALITIES)
        raise PromptError(f"nothing to go on from; pass {options}, --text TEXT or --prompt FILE")
    return [behind]


def _as_json(
    loaded: LoadedRun, prompts: Sequence[Sequence[PromptPart]], results: Sequence[Generation]
) -> dict[str, Any]:
    return {
        "run_dir": str(loaded.run_dir),
        "step": loaded.step,
        "generations": [
            {
                "prompt": [{"text": part} if isinstance(part, str) else {part.modality: part.name} for part in parts],
                "text": result.text,
                "tokens": result.tokens,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_tokens,
            }
            for parts, result in zip(prompts, results, strict=True)
        ],
    }


def _show(loaded: LoadedRun, prompts: Sequence[Sequence[PromptPart]], results: Sequence[Generation]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{loaded.run_dir}, step {loaded.step}", title_justify="left", show_lines=len(results) > 1)
    for heading in ("prompt", "goes on", "end"):
        table.add_column(heading, overflow="fold")
    for parts, result in zip(prompts, results, strict=True):
        told = [part if isinstance(part, str) else f"<{part.modality} {Path(part.name).name}>" for part in parts]
        end = f"{result.finish_reason}, {len(result.tokens)} tokens"
        # Text and not markup: a caption may hold brackets
        table.add_row(Text(" ".join(told)), Text(result.text, style="bold"), Text(end, style="dim"))
    Console().print(table)
