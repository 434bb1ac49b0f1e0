"""Build shards; a run that was interrupted or killed continues when it is called again.

examples:
  triweave build --source tuxpaint --input corpora/tuxpaint --out shards/tuxpaint --workers 4 \\
      --audio-rate 16000 --image-max-side 128
  triweave build --source asterisk --input corpora/asterisk --out shards/asterisk --language en,fr --audio-rate 16000
  triweave build --source emoji --input corpora/emoji --out shards/emoji
  triweave build --source folder --input photos --out shards/photos
  triweave build --source manifest --input rows.parquet --out shards/rows --shard-size-mb 512
  triweave build --source webdataset --input old-tars --out shards/rebuilt --json
  triweave build --source energon --input prepared --out shards/prepared
  triweave build --source hf_datasets --input saved --out shards/saved --columns user=question,image,assistant=answer
  triweave build --source video --input lessons --out shards/lessons --frame-every-ms 2000 --image-max-side 448
  triweave build --source html --input corpora/gimp-help --out shards/gimp-help --language en --image-max-side 448
  triweave build --source interleaved --input obelics --media pictures --out shards/obelics --workers 8
  triweave build --source html --input pages --out shards/pages --filter gopher --filter pictures --filter min_words=20
  triweave build --source chat --input llava_instruct.json --media coco --out shards/llava
  triweave build --source html --input pages --out shards/pages --scrub pii,secrets --scrub phone=DE --blocklist no.txt
  triweave build --source chat --input llava_instruct.json --media coco --out shards/llava --workers 64 \\
      --engine ray --ray-address head:6379

  triweave build --source html --input pages --out shards/pages --dedup text=0.8,image=6

inputs:
  tuxpaint     the folder that `triweave fetch tuxpaint` wrote; asterisk, emoji, fillets: likewise
  folder       media files; files of one stem make a document, with text from .txt or .json
  manifest     a .parquet or .jsonl file of rows: id, parts (with paths or bytes), labels, source
  webdataset   plain .tar files of any WebDataset, also Triweave's own
  wids, energon   the index .json of a wids set; the folder that `energon prepare` worked on
  hf_datasets  what Hugging Face datasets saved (Arrow) or Parquet with its Image and Audio columns; --columns
  video        a folder of videos with .txt or .json beside them: pictures and sound on one clock (extra `video`)
  html         a folder of pages and their pictures (`triweave fetch gimp-help` wrote one)
  interleaved  a .parquet file or a folder of them, as OBELICS, OmniCorpus and MINT-1T are; --media: the pictures, each
               named by the sha256 of its URL
  chat         a .json or .jsonl of conversations, as LLaVA and ShareGPT are; --media: where their paths begin
  coco, flickr30k, vqa, librispeech, common_voice   the folder that the corpus unpacks to, annotations beside media

Documents carry the labels `group` (their concept, level, picture or speaker) and `split` (train, validation, test),
which depend on the whole corpus, not on the options; not so those of folder, manifest, webdataset, html, interleaved
and chat. Media that a page names and that are not there are left out, and the ledger's kept row says which.

filters (docs/corpora.md has every key):
  gopher, c4        text: length, words, lines, repetition      pictures   size, aspect, blur
  speech            clips: length, silence, clipping            key=value  any threshold by itself
Media that fail are left out of their document; the document goes with the last of them, or where its text fails. What
has opted out (`source.opt_out`) goes unless drop_opt_out=false.

text (docs/corpora.md, "Personal data, secrets, blocklists"):
  --scrub pii       e-mail and IP addresses, telephone numbers, IBANs, payment cards become <EMAIL>, <PHONE>, ...
  --scrub secrets   private keys, access tokens, passwords
  --blocklist FILE  words, domains and media that leave their document out; or module:function
  --annotate        license=SPDX where the files state none, language (the filters see both), words and parts of speech
                    of Chinese, entities by a spaCy model

near duplicates (docs/corpora.md):
  --dedup text=0.8,image=6   leave out a document whose text and pictures are near those of one earlier in build order;
                             the ledger's `duplicate_of` names it. Pictures that are compared carry their `phash`.

OUT/ledger.parquet says what became of every input row: kept, filtered, failed or duplicate. --retry-failed encodes the
failed ones again, whose files may have been mended, and ends with what a fresh build would write. OUT/throughput.json
says how long each stage took. `triweave stats OUT --html page.html` makes a page of all that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triweave.data_pipeline.annotate.registry import annotation_steps
from triweave.data_pipeline.dedup.near_duplicates import NearDuplicateFinder, near_duplicate_finder, phash_step
from triweave.data_pipeline.errors import BuildError, SourceError
from triweave.data_pipeline.filters.options import filter_options
from triweave.data_pipeline.scrub.blocklist_step import blocklist_step
from triweave.data_pipeline.scrub.step import scrub_step
from triweave.data_pipeline.shards.build import BuildOptions, BuildProgress, build
from triweave.data_pipeline.shards.engines.registry import ENGINES
from triweave.data_pipeline.shards.ledger import read_ledger, reason_counts
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaOptions
from triweave.data_pipeline.shards.steps import DocumentStep
from triweave.data_pipeline.shards.throughput import read_throughput
from triweave.data_pipeline.sources.base import Source
from triweave.data_pipeline.sources.registry import SOURCES
from triweave.data_pipeline.storage.location import require_local
from triweave.launch.progress import work_progress

_BYTES_PER_MB = 1 << 20
_SHOWN_REASONS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--source", required=True, choices=SOURCES, help="kind of corpus")
    parser.add_argument("--input", required=True, type=Path, help="the corpus")
    parser.add_argument("--out", required=True, type=Path, help="shard folder to write; new, empty, or half-built")
    parser.add_argument("--workers", type=int, default=1, help="encoding processes (default 1); same bytes for any")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="processes of this machine, or Ray")
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="the Ray cluster (default: start Ray on this machine alone)"
    )
    parser.add_argument("--shard-size-mb", type=float, default=256, help="largest shard in MiB (default 256)")
    parser.add_argument("--audio-rate", type=int, metavar="HZ", help="re-encode clips to mono FLAC at this rate")
    parser.add_argument("--image-max-side", type=int, metavar="PX", help="re-encode pictures to at most this side")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--shuffle-seed", type=int, default=0, help="seed of the row order (default 0)")
    order.add_argument("--keep-order", action="store_true", help="keep the order of the input")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="RULE",
        help="a preset or key=value, repeatable, for example --filter gopher --filter image_min_side_px=100",
    )
    parser.add_argument("--filters", type=Path, metavar="FILE", help="YAML of such keys and values")
    parser.add_argument(
        "--blocklist",
        action="append",
        default=[],
        metavar="LIST",
        help="leave out what a file of `word:`, `domain:` and `media:` lines names, or a function (module:function) "
        "refuses; repeatable",
    )
    parser.add_argument(
        "--scrub",
        action="append",
        default=[],
        metavar="KINDS",
        help="replace by <KIND>: pii, secrets, or single kinds, for example --scrub pii,secrets --scrub phone=DE",
    )
    parser.add_argument(
        "--annotate",
        action="append",
        default=[],
        metavar="WHAT",
        help="add the corpus's license=SPDX, labels: language, words (Chinese), entities=SPACY_MODEL; for example "
        "--annotate license=GFDL-1.2-or-later,language",
    )
    copies = parser.add_mutually_exclusive_group()
    copies.add_argument("--keep-duplicates", action="store_true", help="keep documents that are exact copies")
    copies.add_argument(
        "--dedup",
        metavar="LIMITS",
        help="leave near duplicates out too: text=0.8 (least similarity), image=6 (most bits of 64), audio=0.2 (most "
        "of its bits, a share), by comma",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="encode again only the rows that failed in the finished build there, which alone may have changed",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the shards that are in the way")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    some = parser.add_argument_group("only with some sources")
    some.add_argument(
        "--language",
        metavar="CODES",
        help="keep only these languages, for example de,fr,pt_BR (tuxpaint), en,it (asterisk) or cs (fillets); "
        "the language of pages that do not tell theirs (html)",
    )
    some.add_argument("--media", metavar="DIR", type=Path, help="folder of the media (interleaved, chat)")
    some.add_argument("--no-speech", action="store_true", help="leave spoken captions out (tuxpaint, emoji)")
    some.add_argument("--no-effects", action="store_true", help="leave sound effects out (tuxpaint)")
    some.add_argument(
        "--svg", action="store_true", help="render pictures that exist as SVG alone (tuxpaint; extra `svg`)"
    )
    some.add_argument(
        "--columns", metavar="NAMES", help="columns that become parts, in order, each NAME or ROLE=NAME (hf_datasets)"
    )
    some.add_argument("--frame-every-ms", type=int, metavar="MS", help="distance of pictures, default 1000 (video)")
    some.add_argument("--max-frames", type=int, metavar="N", help="most pictures of a video, default 64 (video)")
    some.add_argument("--max-ms", type=int, metavar="MS", help="longest video, default 600000; others fail (video)")
    some.add_argument(
        "--part-order",
        choices=("mixed", "canonical"),
        help="order of the parts, default mixed (tuxpaint, asterisk, emoji)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build and print what was built."""
    source, options = source_and_options(arguments)
    start = time.monotonic()
    try:
        with _progress() as on_progress:
            manifest = build(source, arguments.out, options, on_progress)
    except KeyboardInterrupt:
        print("triweave build: what is encoded is kept; run the same command again to continue", file=sys.stderr)
        raise
    _print_result(manifest, time.monotonic() - start, as_json=arguments.json)
    return 0


def source_and_options(arguments: argparse.Namespace) -> tuple[Source, BuildOptions]:
    """Return what the arguments ask to build. Raises DataError for what cannot be."""
    require_local("--input", arguments.input, SourceError, "copy the corpus into a folder")
    if not math.isfinite(arguments.shard_size_mb):
        raise BuildError(f"--shard-size-mb {arguments.shard_size_mb}: must be a finite number above 0")
    near_duplicates = near_duplicate_finder(arguments.dedup)
    options = BuildOptions(
        media=MediaOptions(image_max_side_px=arguments.image_max_side, audio_rate_hz=arguments.audio_rate),
        filters=filter_options(arguments.filter, arguments.filters),
        steps=_steps(arguments, near_duplicates),
        shard_size_bytes=int(arguments.shard_size_mb * _BYTES_PER_MB),
        shuffle_seed=None if arguments.keep_order else arguments.shuffle_seed,
        deduplicate=not arguments.keep_duplicates,
        near_duplicates=near_duplicates,
        workers=arguments.workers,
        engine=arguments.engine,
        ray_address=arguments.ray_address,
        overwrite=arguments.overwrite,
        retry_failed=arguments.retry_failed,
    )
    return _source(arguments), options


def _steps(arguments: argparse.Namespace, near_duplicates: NearDuplicateFinder | None) -> tuple[DocumentStep, ...]:
    asked = (
        blocklist_step(arguments.blocklist),
        scrub_step(arguments.scrub),
        *annotation_steps(arguments.annotate),
        phash_step(near_duplicates),
    )
    return tuple(step for step in asked if step is not None)


def _source(arguments: argparse.Namespace) -> Source:
    """Return the source, refusing options that belong to another one."""
    given: dict[str, Any] = {}
    for option, name, value, sources in (
        ("--language", "languages", _by_comma(arguments.language), ("tuxpaint", "asterisk", "fillets", "html")),
        ("--media", "media", arguments.media, ("interleaved", "chat")),
        ("--no-speech", "speech", False if arguments.no_speech else None, ("tuxpaint", "emoji")),
        ("--no-effects", "effects", False if arguments.no_effects else None, ("tuxpaint",)),
        ("--svg", "svg", arguments.svg or None, ("tuxpaint",)),
        ("--part-order", "part_order", arguments.part_order, ("tuxpaint", "asterisk", "emoji")),
        ("--columns", "columns", _by_comma(arguments.columns), ("hf_datasets",)),
        ("--frame-every-ms", "frame_every_ms", arguments.frame_every_ms, ("video",)),
        ("--max-frames", "max_frames", arguments.max_frames, ("video",)),
        ("--max-ms", "max_ms", arguments.max_ms, ("video",)),
    ):
        if value in (None, ()):
            continue
        if arguments.source not in sources:
            raise SourceError(
                f"{option} belongs to --source {', '.join(sources)}, not to {arguments.source}: leave it out"
            )
        given[name] = value
    return SOURCES[arguments.source](root=arguments.input, **given)


def _by_comma(value: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (value or "").split(",")))


@contextmanager
def _progress() -> Iterator[Callable[[BuildProgress], None]]:
    with work_progress("building", "rows") as show:
        yield lambda state: show(state.rows_done, state.rows_total, f"{state.shards} shards")


def _print_result(manifest: Manifest, seconds: float, *, as_json: bool) -> None:
    reasons = reason_counts(read_ledger(manifest.ledger_path))
    if as_json:
        result = {
            "out": str(manifest.root),
            "hash": manifest.hash,
            "shards": len(manifest.shards),
            "samples": manifest.samples,
            "tar_bytes": sum(shard.tar_bytes for shard in manifest.shards),
            "rows": manifest.rows,
            "reasons": reasons,
            "seconds": round(seconds, 3),
            "throughput": read_throughput(manifest.root),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    megabytes = sum(shard.tar_bytes for shard in manifest.shards) / _BYTES_PER_MB
    counts = ", ".join(f"{number} {status}" for status, number in manifest.rows.items())
    print(f"{manifest.root}: {manifest.samples} samples in {len(manifest.shards)} shards, {megabytes:.1f} MiB")
    print(f"{sum(manifest.rows.values())} input rows: {counts}")
    for item in reasons[:_SHOWN_REASONS]:
        print(f"  {item['rows']} {item['status']}: {item['reason']}")
    if len(reasons) > _SHOWN_REASONS:
        print(f"  further reasons: {manifest.ledger_path}")
    if (speed := read_throughput(manifest.root)) is not None:
        stages = ", ".join(f"{stage} {figures['seconds']:.1f} s" for stage, figures in speed["stages"].items())
        print(f"{speed['rows_per_s']:.1f} rows/s over {speed['wall_s']:.1f} s; in all processes: {stages}")
