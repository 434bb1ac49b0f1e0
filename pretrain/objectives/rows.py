"""What each objective learns from in one micro-batch: tables that a loader worker makes behind the packing.

    matching        last state of a document -> 1 where its media are its own, 0 where they were exchanged
    masked_tokens   state of a hidden token of a text segment -> the token
    masked_media    state of a hidden token of a media segment -> its payload row, to mean 0 and variance 1
    classification  last state of a document, or mean state of a segment -> number of the class
    regression      the same -> (label - centre) / scale

Everything follows from the batch, the seed and the plan rows, whichever rank reads them, and rows are never cut; so the
tables of a step are the same however its rows are dealt to ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.batch import TEXT_ID, PackedBatch, Payload
from triweave.data_pipeline.errors import LabelError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.loader import MicroBatch
from triweave.pretrain.batch import MASKED_INDEX, OBJECTIVE_ROWS, as_read
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.objectives.config import ClassificationConfig, RegressionConfig

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ObjectiveRows:
    """C rows of one objective.

    index: int64 [L] flat positions, in the batch as the model reads it, whose states are averaged, row after row.
    lengths: int64 [C] positions of each row; they sum to L.
    targets: [C] int64 or float32, or float32 [C, features]. weights: float32 [C].
    parts: int64 [P, 2] row and modality id of each part, over items only: a row is several parts, and lengths are [P].
    """

    index: Int
    lengths: Int
    targets: npt.NDArray[Any]
    weights: npt.NDArray[np.float32]
    parts: Int = field(default_factory=lambda: np.empty((0, 2), np.int64))

    @classmethod
    def of(
        cls, spans: list[tuple[int, int]], targets: npt.NDArray[Any], parts: list[tuple[int, int]] | None = None
    ) -> ObjectiveRows:
        """Return rows over spans (first, length) of positions, each of weight 1."""
        ranges = [np.arange(first, first + length) for first, length in spans]
        return cls(
            index=np.concatenate([np.empty(0, np.int64), *ranges]),
            lengths=np.asarray([length for _, length in spans], np.int64),
            targets=targets,
            weights=np.ones(len(targets), np.float32),
            parts=np.asarray(parts or [], np.int64).reshape(-1, 2),
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveStage:
    """A stage of `StepLoader` that adds the tables of the model's objectives to every micro-batch; picklable."""

    model: ModelConfig
    seed: int

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield each micro-batch with its tables."""
        for micro_batch in micro_batches:
            assert micro_batch.batch is not None
            micro_batch.batch = self.prepare(micro_batch.batch)
            yield micro_batch

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with its tables, its exchanged media, and the weights that follow from both.

        Raises LabelError for a class that the config does not name, and for a regression label that is no number.
        """
        wanted = self.model.objectives
        tables: dict[str, ObjectiveRows] = {}
        if "matching" in wanted:
            batch, tables["matching"] = exchange_media(batch, self.model.matching.exchanged, self.seed)
        hidden = np.empty(0, np.int64)
        if "masked_tokens" in wanted or "masked_media" in wanted:
            batch, masked, hidden = mask_segments(batch, self.model, self.seed)
            tables |= masked
        if "classification" in wanted:
            tables["classification"] = classification_rows(batch, self.model.classification)
        if "regression" in wanted:
            tables["regression"] = regression_rows(batch, self.model.regression)
        return replace(batch, extra={**batch.extra, OBJECTIVE_ROWS: tables, MASKED_INDEX: hidden}) if tables else batch


def objective_stages(model: ModelConfig, *, seed: int) -> tuple[ObjectiveStage, ...]:
    """Return the stages that a loader needs for a model's objectives: none for language modelling and contrastive."""
    plain = {"language_model", "contrastive"}
    return (ObjectiveStage(model=model, seed=seed),) if set(model.objectives) - plain else ()


def objective_rows(batch: PackedBatch, objective: str) -> list[ObjectiveRows]:
    """Return the tables of an objective in a batch, none where the batch has none."""
    tables: dict[str, ObjectiveRows] = batch.extra.get(OBJECTIVE_ROWS, {})
    return [rows for name, rows in tables.items() if name.split("/")[0] == objective]


def objective_weight(batch: PackedBatch, objective: str) -> float:
    """Return the sum of the weights of an objective's rows, this batch's share of the global normaliser."""
    return float(sum(rows.weights.astype(np.float64).sum() for rows in objective_rows(batch, objective)))


def draw(*key: object) -> float:
    """Return the number in [0, 1) that a key selects."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, key)).encode()) / 2**64


def draw_places(count: int, share: float, *key: object) -> Int:
    """Return which of `count` places a key draws: round(share * count), at least one; int64, ascending."""
    digest = xxhash.xxh3_128_intdigest("\x1f".join(map(str, key)).encode())
    order = np.argsort(np.random.Philox(key=digest).random_raw(count), kind="stable")
    return np.sort(order[: max(1, round(share * count))])


class _Part(NamedTuple):
    """Positions whose states are averaged, and the modality id of what stands there."""

    first: int
    length: int
    modality: int


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A document's piece: where it is, and what of it matters to `exchange_media`."""

    row: int
    number: int
    first: int
    length: int
    items: list[tuple[str, int]]
    text: bytes

    def shape(self, payloads: dict[str, Payload]) -> tuple[Any, ...]:
        """Return what two documents must have alike to exchange their media."""
        return tuple((name, *payloads[name].grids[item].tolist()) for name, item in self.items)

    def content(self, payloads: dict[str, Payload]) -> bytes:
        """Return the bytes of the media."""
        return b"".join(
            payloads[name].values[slice(*_payload_rows(payloads[name], item))].tobytes() for name, item in self.items
        )


def exchange_media(batch: PackedBatch, share: float, seed: int) -> tuple[PackedBatch, ObjectiveRows]:
    """Return the batch with the media of drawn documents exchanged, and whose media are their own.

    A drawn document takes the media of the next one of its plan row, in a circle, that has media of the same grids with
    other bytes and another text (and another label `group`, where data.labels names it); without one it stays. Its
    targets get weight 0, and it loses its labels. The other document keeps its own.
    """
    documents = [document for row in range(len(batch.tokens)) for document in _documents(batch, row)]
    values = {name: payload.values for name, payload in batch.payloads.items()}
    taken: list[_Document] = []
    for document in documents:
        plan_row = int(batch.plan_rows[document.row])
        if draw(seed, "matching", plan_row, document.number) >= share:
            continue
        partner = _partner(document, [other for other in documents if other.row == document.row], batch)
        if partner is None:
            continue
        taken.append(document)
        for (name, item), (_, other) in zip(document.items, partner.items, strict=True):
            if values[name] is batch.payloads[name].values:
                values[name] = values[name].copy()
            source, target = (slice(*_payload_rows(batch.payloads[name], number)) for number in (other, item))
            values[name][target] = batch.payloads[name].values[source]
    exchanged = {(document.row, document.number) for document in taken}
    read = as_read(batch)
    rows = ObjectiveRows.of(
        [(_last(read, document.row, document.number), 1) for document in documents],
        np.asarray([(document.row, document.number) not in exchanged for document in documents], np.float32),
    )
    if not taken:
        return batch, rows
    owners = np.zeros(batch.tokens.size, bool)
    for document in taken:
        owners[document.first : document.first + document.length] = True
    labels = [
        [{} if (row, number) in exchanged else label for number, label in enumerate(found)]
        for row, found in enumerate(batch.labels)
    ]
    return replace(
        batch,
        payloads={name: replace(payload, values=values[name]) for name, payload in batch.payloads.items()},
        row_weight=np.where(owners[batch.row_index], np.float32(0), batch.row_weight),
        labels=labels,
    ), rows


def mask_segments(
    batch: PackedBatch, model: ModelConfig, seed: int
) -> tuple[PackedBatch, dict[str, ObjectiveRows], Int]:
    """Return the batch without its masked items' contrastive weights, the tables, and all hidden positions.

    Whole items are drawn, by plan row and item; of each segment's tokens between bos and eos, start markers apart, a
    share is hidden. Fillers are not drawn.
    """
    read, weights = as_read(batch), batch.segments.weights.copy()
    segments, tokens = read.segments, read.tokens.reshape(-1)
    places: dict[int, list[Int]] = {TEXT_ID: [], **{modality.id: [] for modality in MODALITIES.values()}}
    objective = {TEXT_ID: "masked_tokens"} | {modality.id: "masked_media" for modality in MODALITIES.values()}
    for number in np.flatnonzero(weights > 0).tolist():
        key = (int(batch.plan_rows[segments.rows[number]]), int(segments.items[number]))
        kind = int(segments.modality[number])
        if draw(seed, "masked", *key) >= model.masked.items:
            continue
        weights[number] = 0
        if objective[kind] not in model.objectives:
            continue
        first, length = int(segments.first[number]), int(segments.lengths[number])
        start = first + (1 if kind == TEXT_ID else 2)
        count = first + length - 1 - start
        share = model.masked.tokens if kind == TEXT_ID else model.masked.media
        places[kind].append(start + draw_places(count, share, seed, "places", *key, kind))
    hidden = {kind: np.concatenate([np.empty(0, np.int64), *found]) for kind, found in places.items()}
    tables: dict[str, ObjectiveRows] = {}
    if "masked_tokens" in model.objectives:
        chosen = hidden[TEXT_ID]
        tables["masked_tokens"] = _single(chosen, tokens[chosen].astype(np.int64))
    for name, payload in batch.payloads.items():
        if "masked_media" in model.objectives:
            chosen = hidden[MODALITIES[name].id]
            rows = np.searchsorted(payload.token_index, chosen)
            tables[f"masked_media/{name}"] = _single(chosen, _standardised(payload.values[rows]))
    together = np.concatenate(list(hidden.values()))
    return replace(batch, segments=replace(batch.segments, weights=weights)), tables, together


def classification_rows(batch: PackedBatch, config: ClassificationConfig) -> ObjectiveRows:
    """Return the rows of the objective `classification`; raises LabelError for an unknown class."""
    numbers = {name: number for number, name in enumerate(config.classes)}
    found = list(_labelled(batch, config))
    targets = []
    for _, label, where in found:
        if str(label) not in numbers:
            raise LabelError(
                f"sample {where} has {config.label}={label!r}, which model.classification.classes does not name; add "
                "it there, or leave such samples out of the data"
            )
        targets.append(numbers[str(label)])
    return _rows(found, np.asarray(targets, np.int64), config)


def regression_rows(batch: PackedBatch, config: RegressionConfig) -> ObjectiveRows:
    """Return the rows of the objective `regression`; raises LabelError for a label that is no finite number."""
    found = list(_labelled(batch, config))
    targets = []
    for _, label, where in found:
        if isinstance(label, str) or not np.isfinite(label):
            raise LabelError(
                f"sample {where} has {config.label}={label!r}, which model.regression cannot learn: it is no finite "
                "number; choose another label, or leave such samples out of the data"
            )
        targets.append((float(label) - config.centre) / config.scale)
    return _rows(found, np.asarray(targets, np.float32), config)


def _rows(
    found: list[tuple[list[_Part], Any, str]],
    targets: npt.NDArray[Any],
    config: ClassificationConfig | RegressionConfig,
) -> ObjectiveRows:
    spans = [(part.first, part.length) for parts, _, _ in found for part in parts]
    numbered = [(row, part.modality) for row, (parts, _, _) in enumerate(found) for part in parts]
    return ObjectiveRows.of(spans, targets, numbered if config.over == "items" else None)


def _labelled(
    batch: PackedBatch, config: ClassificationConfig | RegressionConfig
) -> Iterator[tuple[list[_Part], Any, str]]:
    """Yield the parts, the label and the sample id of everything that has the label; only items have several parts."""
    read = as_read(batch)
    if config.over == "documents":
        for row, labels in enumerate(batch.labels):
            for number, label in enumerate(labels):
                name = batch.sample_ids[row][number]
                if config.label in label and not name.endswith(":alone"):
                    yield [_Part(_last(read, row, number), 1, TEXT_ID)], label[config.label], name
        return
    items: dict[tuple[int, int], tuple[list[_Part], Any, str]] = {}
    segments = read.segments
    wanted = None if config.modality is None else _modality_id(config.modality)
    for number in np.flatnonzero(batch.segments.weights > 0).tolist():
        row, first = int(segments.rows[number]), int(segments.first[number])
        piece = int(read.document_ids.reshape(-1)[first])
        label = batch.labels[row][piece] if batch.labels else {}
        if config.label not in label or wanted not in (None, int(segments.modality[number])):
            continue
        part = _Part(first, int(segments.lengths[number]), int(segments.modality[number]))
        key = (row, int(segments.items[number])) if config.over == "items" else (number, -1)
        items.setdefault(key, ([], label[config.label], batch.sample_ids[row][piece]))[0].append(part)
    yield from items.values()


def _modality_id(name: str) -> int:
    return TEXT_ID if name == "text" else MODALITIES[name].id


def _documents(batch: PackedBatch, row: int) -> Iterator[_Document]:
    """Yield the documents of a row that have text of their own and media, and are neither fillers nor segments."""
    width = batch.tokens.shape[1]
    item_first = {name: _first_tokens(payload) for name, payload in batch.payloads.items()}
    for number, name in enumerate(batch.sample_ids[row]):
        if name.endswith((":alone", ":filler")):
            continue
        first, end = _extent(batch, row, number)
        span = slice(row * width + first, row * width + end)
        items = sorted(
            (int(starts[item]), kind, item)
            for kind, starts in item_first.items()
            for item in np.flatnonzero((starts >= span.start) & (starts < span.stop)).tolist()
        )
        text = batch.tokens.reshape(-1)[span][batch.modality_ids.reshape(-1)[span] == TEXT_ID]
        if items and len(text) > 2 + len(items):  # bos, eos and a start marker each are no text
            yield _Document(
                row=row, number=number, first=span.start, length=end - first,
                items=[(kind, item) for _, kind, item in items], text=text.tobytes(),
            )  # fmt: skip


def _partner(document: _Document, row: list[_Document], batch: PackedBatch) -> _Document | None:
    here = row.index(document)
    content, shape = document.content(batch.payloads), document.shape(batch.payloads)
    for other in row[here + 1 :] + row[:here]:
        if other.shape(batch.payloads) != shape or other.text == document.text:
            continue
        if _group(batch, other) is not None and _group(batch, other) == _group(batch, document):
            continue
        if other.content(batch.payloads) != content:
            return other
    return None


def _group(batch: PackedBatch, document: _Document) -> Any:
    return batch.labels[document.row][document.number].get("group") if batch.labels else None


def _extent(batch: PackedBatch, row: int, number: int) -> tuple[int, int]:
    """Return the first and the end position of a piece in its row."""
    where = np.flatnonzero(batch.document_ids[row] == number)
    return int(where[0]), int(where[-1]) + 1


def _last(batch: PackedBatch, row: int, number: int) -> int:
    """Return the flat position of a piece's last token."""
    return row * batch.tokens.shape[1] + _extent(batch, row, number)[1] - 1


def _payload_rows(payload: Payload, item: int) -> tuple[int, int]:
    """Return where the payload rows of an item begin and end."""
    first = int(payload.lengths[:item].sum())
    return first, first + int(payload.lengths[item])


def _first_tokens(payload: Payload) -> Int:
    """Return the flat position of the first token of each item, int64 [M]."""
    lengths = payload.lengths.astype(np.int64)
    return payload.token_index[np.cumsum(lengths) - lengths]


def _single(index: Int, targets: npt.NDArray[Any]) -> ObjectiveRows:
    count = len(index)
    return ObjectiveRows(
        index=index, lengths=np.ones(count, np.int64), targets=targets, weights=np.ones(count, np.float32)
    )


def _standardised(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return payload rows [M, features] to mean 0 and variance 1 each, fp32."""
    rows = values.astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.sqrt(rows.var(axis=1, keepdims=True) + 1e-6)
