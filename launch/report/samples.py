"""Sample pictures and sounds with the caption that the run's newest checkpoint writes under them.

Captions are greedy, of at most CAPTION_TOKENS tokens, and kept in RUN/report_samples.json, so that a second report of
the same checkpoint needs neither the model nor the shards.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.shards.manifest import write_atomically
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.sample_choice import ChosenSample, choose_samples
from triweave.launch.report.wording import readable
from triweave.pretrain.errors import PretrainError

if TYPE_CHECKING:
    from triweave.pretrain.checkpoints.load import LoadedRun

CACHE_NAME = "report_samples.json"
CACHE_VERSION = 1
"""Raised when samples are chosen or captioned in another way."""
CAPTION_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document with its generated caption. uri: the medium as a data: address."""

    key: str
    modality: str
    uri: str
    truth: str
    generated: str
    about: str
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class RunSamples:
    """The samples of a run, or the reason why there are none. step: of the checkpoint that wrote the captions."""

    step: int
    samples: tuple[Sample, ...] = ()
    reason: str = ""


def run_samples(run: ReportRun, pictures: int, *, tell: Callable[[str], None]) -> RunSamples:
    """Return up to `pictures` pictures and half as many sounds of a run, from the cache where it has them.

    tell: called with a line before work that takes seconds.
    """
    from triweave.pretrain.checkpoints.checkpoint import newest_checkpoint
    from triweave.pretrain.checkpoints.load import load_run

    counts = {"image": pictures, "audio": (pictures + 1) // 2}
    if not pictures:
        return RunSamples(step=0, reason="left out (--samples 0)")
    step = newest_checkpoint(run.folder)
    path = run.folder / CACHE_NAME
    if (cached := _read_cache(path, counts, step)) is not None:
        return cached
    if not step:
        return RunSamples(step=0, reason=f"there is no checkpoint in {run.folder}")
    try:
        loaded = load_run(run.folder, tell=tell)
        chosen = choose_samples(loaded.config.data.sources, counts, locate=loaded.locate)
        tell(f"{run.name}: captioning {len(chosen)} samples with the checkpoint of step {loaded.step}")
        samples = _captioned(loaded, chosen)
    except (DataError, PretrainError) as error:
        return RunSamples(step=step, reason=readable(f"{error}"))
    result = RunSamples(step=loaded.step, samples=tuple(samples))
    _write_cache(path, counts, result, tell)
    return result


def _captioned(loaded: LoadedRun, chosen: list[ChosenSample]) -> list[Sample]:
    from triweave.data_pipeline.media.modalities import MODALITIES
    from triweave.data_pipeline.stream.prompt import PromptMedia
    from triweave.pretrain.generation.generate import generate

    if not chosen:
        return []
    prompts = []
    for sample in chosen:
        info = MODALITIES[sample.modality].probe(sample.content)[0]
        prompts.append([PromptMedia(modality=sample.modality, content=sample.content, info=info, name=sample.key)])
    captions = generate(loaded, prompts, max_tokens=CAPTION_TOKENS)
    return [
        Sample(
            key=sample.key,
            modality=sample.modality,
            uri=f"data:{sample.mime};base64,{base64.b64encode(sample.shown).decode()}",
            truth=sample.truth,
            generated=readable(caption.text),
            about=sample.about,
            held_out=sample.held_out,
        )
        for sample, caption in zip(chosen, captions, strict=True)
    ]


def _read_cache(path: Path, counts: dict[str, int], step: int) -> RunSamples | None:
    """Return the cached samples of this step (of any, where the checkpoints are gone) and these counts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != CACHE_VERSION or content["counts"] != counts or step not in (0, content["step"]):
            return None
        samples = tuple(Sample(**item) for item in content["samples"])
        if not all(sample.uri.startswith(("data:image/jpeg;base64,", "data:audio/flac;base64,")) for sample in samples):
            return None
        return RunSamples(step=int(content["step"]), samples=samples)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, or not as this version writes it: made again


def _write_cache(path: Path, counts: dict[str, int], result: RunSamples, tell: Callable[[str], None]) -> None:
    content = {
        "version": CACHE_VERSION,
        "step": result.step,
        "counts": counts,
        "samples": [asdict(sample) for sample in result.samples],
    }
    try:
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        tell(f"{path}: the captions were not kept ({error.strerror}); the next report writes them again")
