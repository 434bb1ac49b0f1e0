"""The page of a shard folder: what became of the input, what the documents are like, how evenly, how fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.shards.ledger import STATUSES
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.quality import UNKNOWN, ShardQuality, effective_number, shard_quality
from triweave.data_pipeline.shards.stats import ShardStats, shard_stats
from triweave.data_pipeline.shards.throughput import read_throughput
from triweave.data_pipeline.storage.location import shown
from triweave.launch.report.content import Section, render, write_page
from triweave.launch.report.figures import Plot
from triweave.launch.report.histograms import histogram_plot
from triweave.launch.report.plots import Bar, BarGroup, interval_plot
from triweave.launch.report.sections import Fact, Table
from triweave.launch.report.wording import count, duration, number, percent, readable

TEMPLATE_NAME = "shards.html.j2"
SHOWN_VALUES = 12
_MIB = 1 << 20
_MS_PER_HOUR = 3_600_000
_STATUS_WORDS = {
    "kept": "Kept",
    "filtered": "Filtered, on purpose",
    "failed": "Failed, cannot be read",
    "duplicate": "Duplicates",
}
_FIGURES = {
    "min_words": ("Length of the texts", "words of a document"),
    "min_words_per_image": ("Words for each picture", "words, documents with pictures"),
    "width_px": ("Width of the pictures", "px"),
    "height_px": ("Height of the pictures", "px"),
    "image_min_side_px": ("Shorter side of the pictures", "px"),
    "image_max_aspect": ("Aspect of the pictures", "longer side over shorter side"),
    "image_min_sharpness": ("Sharpness of the pictures", "variance of the Laplacian; blurred is low"),
    "audio_min_ms": ("Length of the clips", "ms"),
    "level_db": ("Level of the clips", "dB of full scale, root mean square"),
    "audio_max_silence_share": ("Silence in the clips", "share of 20 ms frames below -50 dB"),
    "audio_max_clipped_share": ("Clipping in the clips", "share of samples at full scale"),
    "min_mean_word_letters": ("Mean length of a word", "characters"),
    "min_letter_word_share": ("Words that hold a letter", "share"),
    "max_symbols_per_word": ("Symbols for each word", "`#` and ellipses"),
    "max_bullet_line_share": ("Lines that begin with a bullet", "share"),
    "max_ellipsis_line_share": ("Lines that end in an ellipsis", "share"),
    "min_terminal_line_share": ("Lines that end as sentences do", "share"),
    "min_stop_words": ("English stop words", "different ones in a document"),
    "max_duplicate_line_share": ("Repeated lines", "share"),
    "max_repeated_words_share": ("Repeated words", "share"),
}
"""Figure -> (title, unit), in the order of the page."""


def write_shard_page(folder: Path, out: Path, *, documents: int, media_documents: int) -> dict[str, Any]:
    """Write the page of a finished shard folder and return {"out", "bytes"}.

    documents, media_documents: about how many documents are read, and have their media decoded. Equal shards give equal
    pages but for the throughput. Raises DataError, and ReportError where the page cannot be written.
    """
    manifest = Manifest.load(folder)
    stats = shard_stats(folder)
    quality = shard_quality(folder, documents=documents, media_documents=media_documents)
    throughput = read_throughput(folder)
    page = render(
        TEMPLATE_NAME,
        title=readable(PurePosixPath(shown(folder)).name, 120),
        kind="shard report",
        facts=_facts(stats, throughput),
        sections=[
            _input_section(stats),
            *_throughput_sections(throughput),
            _quality_section(stats, quality),
            _representation_section(stats, quality),
            _build_section(manifest),
        ],
    ).encode()
    write_page(out, page)
    return {"out": str(out), "bytes": len(page)}


def _facts(stats: ShardStats, throughput: dict[str, Any] | None) -> list[Fact]:
    rows = sum(stats.rows.values())
    facts = [
        Fact(name="Input rows", value=count(rows), note=f"{percent(stats.rows['kept'] / rows)} kept"),
        Fact(name="Samples", value=count(stats.samples), note=f"in {_counted(stats.shards, 'shard')}"),
        Fact(name="Size", value=f"{stats.tar_bytes / _MIB:,.1f} MiB", note="of tars"),
    ]
    for name, modality in stats.modalities.items():
        hours = f", {modality.ms / _MS_PER_HOUR:,.2f} h" if modality.ms else ""
        facts.append(Fact(name=f"Parts: {readable(name, 20)}", value=count(modality.parts),
                          note=f"in {modality.documents:,} documents{hours}"))  # fmt: skip
    if throughput is not None:
        facts.append(Fact(name="Speed", value=f"{throughput['rows_per_s']:,.1f}", note="rows per second"))
    return facts


def _input_section(stats: ShardStats) -> Section:
    rows = sum(stats.rows.values())
    outcome = [[_STATUS_WORDS[name], f"{stats.rows[name]:,}", percent(stats.rows[name] / rows)] for name in STATUSES]
    reasons = [
        [readable(item["status"], 20), f"{item['rows']:,}", percent(item["rows"] / rows), readable(item["reason"], 200)]
        for item in stats.reasons
    ]
    total = " + ".join(f"{stats.rows[name]:,} {name}" for name in STATUSES)
    tables = [Table(caption=f"{rows:,} input rows = {total}.", columns=("Outcome", "Rows", "Share"), rows=outcome)]
    if reasons:
        tables.append(
            Table(
                caption="Why rows were left out, the most frequent reasons. `ledger.parquet` has every row.".replace(
                    "`", ""
                ),
                columns=("Status", "Rows", "Share", "Reason"),
                rows=reasons,
                words=True,
                figures=2,
            )
        )
    return Section(id="input", title="What became of the input", tables=tables)


def _throughput_sections(throughput: dict[str, Any] | None) -> list[Section]:
    if throughput is None:
        return []
    total = sum(stage["seconds"] for stage in throughput["stages"].values()) or 1.0
    rows = [
        [
            readable(name, 40),
            f"{stage['seconds']:,.2f}",
            percent(stage["seconds"] / total),
            f"{stage['rows_per_s']:,.0f}",
        ]
        for name, stage in sorted(throughput["stages"].items(), key=lambda item: -item[1]["seconds"])
    ]
    megabytes = throughput["tar_bytes_per_s"] / _MIB
    speed = f"{throughput['rows_per_s']:,.1f} rows and {megabytes:,.2f} MiB of shards per second"
    engine = f"{_counted(throughput['workers'], 'worker')} of the engine {readable(throughput['engine'], 20)}"
    words = f"{throughput['rows']:,} rows in {duration(throughput['wall_s'])} on the clock: {speed}, by {engine}."
    caption = "Time inside each stage, summed over all processes, and what one process does of that stage alone."
    table = Table(caption=caption, columns=("Stage", "Seconds", "Share", "Rows/s"), rows=rows)
    return [Section(id="throughput", title="Throughput", paragraphs=(words,), tables=(table,))]


def _quality_section(stats: ShardStats, quality: ShardQuality) -> Section:
    drawn = (
        "all" if quality.documents == stats.samples else f"{quality.documents:,} of {stats.samples:,}, drawn by hash"
    )
    words = [
        f"Of the documents that were kept: {drawn}. Sharpness, level, silence and clipping are of the media of "
        f"{quality.decoded:,} of them. Lines: the thresholds that the build asked for; beyond them nothing is left."
    ]
    if quality.damaged:
        words.append(f"{quality.damaged:,} samples or media are damaged and left out: run `triweave verify`.")
    plots = []
    for name, (title, unit) in _FIGURES.items():
        if values := quality.figures.get(name):
            limits = quality.limits(name)
            svg = histogram_plot(f"plot-{name.replace('_', '-')}", values, title=title, unit=unit, limits=limits)
            plots.append(Plot(title=title, note=f"{len(values):,}", svg=_markup(svg)))
    return Section(id="quality", title="Texts, pictures and sounds", paragraphs=words, plots=plots)


def _representation_section(stats: ShardStats, quality: ShardQuality) -> Section:
    fields: dict[str, Mapping[str, int]] = {"corpus": stats.corpora, "documents by modalities": stats.combinations}
    fields |= {f"label {name}": values for name, values in stats.labels.items() if values}
    fields |= {name: values for name, values in quality.origins.items() if set(values) != {UNKNOWN}}
    rows: list[list[str]] = []
    plots: list[Plot] = []
    for name, values in fields.items():
        total = sum(values.values())
        top = max(values, key=lambda value: values[value])
        shares = [f"{len(values):,}", number(effective_number(values), 2), percent(values[top] / total)]
        rows.append([readable(name, 40), f"{total:,}", *shares, readable(top, 60)])
        if len(values) > 1:
            plots.append(_share_plot(f"plot-share-{len(plots)}", readable(name, 40), values))
    missing = [name for name in ("licence", "site") if set(quality.origins.get(name, ())) <= {UNKNOWN}]
    words = [
        "The effective number is exp(entropy): how many equally frequent values would be spread as evenly. Near 1, one "
        "value has almost everything."
    ]
    if missing:
        words.append(f"No document states its {' or '.join(missing)}.")
    many = [
        f"{readable(name, 40)} ({stats.label_values[name]:,})" for name, values in stats.labels.items() if not values
    ]
    if many:
        words.append(f"Labels with too many values to list: {', '.join(many)}.")
    columns = ("Field", "Documents", "Values", "Effective number", "Largest share", "Largest")
    table = Table(caption="How evenly the documents are spread.", columns=columns, rows=rows)
    return Section(id="spread", title="Who and what is represented", paragraphs=words, tables=(table,), plots=plots)


def _share_plot(name: str, title: str, values: Mapping[str, int]) -> Plot:
    total = sum(values.values())
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    shown_values, rest = ordered[:SHOWN_VALUES], ordered[SHOWN_VALUES:]
    if rest:
        shown_values.append((f"{len(rest):,} others", sum(documents for _, documents in rest)))
    groups = [
        BarGroup(
            label=f"{readable(value, 40)} · {documents:,}", bars=[Bar(value=documents / total, interval=None, colour=0)]
        )
        for value, documents in shown_values
    ]
    svg = interval_plot(name, groups, title=title, unit="% of documents", scale=100)
    return Plot(title=title, note=f"effective number {number(effective_number(values), 2)}", svg=_markup(svg))


def _build_section(manifest: Manifest) -> Section:
    rows = [[readable(str(name), 40), readable(_plain(value), 400)] for name, value in manifest.build.items()]
    hashes = [["manifest hash", manifest.hash], ["ledger_xxh3", manifest.ledger_xxh3]]
    caption = "Input and options of the build; the same ones give the same bytes."
    table = Table(caption=caption, columns=("Option", "Value"), rows=[*rows, *hashes], words=True)
    return Section(id="build", title="How it was built", tables=(table,))


def _counted(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"


def _plain(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)
