"""What makes two rows of a corpus the same concept: an equal text or an equal file. See `data_pipeline.splits`."""

from __future__ import annotations

from pathlib import Path

import xxhash

from triweave.data_pipeline.splits import group_rows, normalise_text, split_of


def text_keys(*texts: str) -> list[str]:
    """Return one key per text that has a letter or digit left after `normalise_text`."""
    return [f"text:{normal}" for text in texts if (normal := normalise_text(text))]


def file_key(path: Path) -> str:
    """Return the key of a file's bytes, by xxh3_64; of its path where they cannot be read, as the build will report."""
    try:
        return f"bytes:{xxhash.xxh3_64_hexdigest(path.read_bytes())}"
    except OSError:
        return f"unreadable:{path.as_posix()}"


def group_labels(group: str) -> dict[str, str]:
    """Return the labels of a concept's documents: `group`, and the `split` that follows from it."""
    return {"group": group, "split": split_of(group)}


def own_group_labels(key: str) -> dict[str, str]:
    """Return the labels of a concept that has one key and joins no other: a picture, a speaker."""
    (group,) = group_rows([[key]])
    return group_labels(group)
