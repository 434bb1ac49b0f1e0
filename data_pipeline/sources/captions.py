"""Captioned pictures as COCO and Flickr30k lay them out: one document per caption, the picture and then the text.

    coco:       ROOT/annotations/captions_train2017.json      {"images": [{"id", "file_name"}], "annotations":
                ROOT/train2017/000000000009.jpg                [{"id", "image_id", "caption"}]}
    flickr30k:  ROOT/results_20130124.token                    1000092795.jpg#0 <tab> Two young guys ...
                or ROOT/results.csv                            1000092795.jpg| 0| Two young guys ...
                ROOT/flickr30k-images/1000092795.jpg

Pictures of COCO lie in the folder named in the annotation file's name, or in `images`. A picture without its file
fails the rows of all its captions. Labels: `image`, and `group` and `split` by picture, so that captions of one picture
never part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder
from triweave.data_pipeline.sources.collected_parts import file_size
from triweave.data_pipeline.sources.concepts import own_group_labels

COCO_FILES = "captions_*.json"
FLICKR_FILES = ("results_20130124.token", "results.csv")
FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """COCO's captions below `root`, of all the annotation files that are there."""

    root: Path
    name: str = "coco"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per caption."""
        require_folder(self.root, "a folder with annotations/captions_*.json and the pictures' folders")
        files = sorted(self.root.glob(f"annotations/{COCO_FILES}"))
        if not files:
            raise SourceError(f"--input {self.root}: no annotations/{COCO_FILES} in it")
        for path in files:
            subset = path.stem.removeprefix("captions_")
            content = read_object(path, ("images", "annotations"))
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            for note in content["annotations"]:
                picture = names.get(note["image_id"])
                document_id = f"{subset}/{note['id']}"
                if picture is None:
                    yield Row(id=document_id, failed=f"image {note['image_id']} is not listed")
                else:
                    yield _caption_row(self.root, document_id, (subset, "images"), picture, str(note["caption"]))

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one caption."""
        return _captioned(row, encoder, self.root, {"corpus": "coco"})


@dataclass(frozen=True, kw_only=True)
class Flickr30kSource:
    """Flickr30k's captions below `root`."""

    root: Path
    name: str = "flickr30k"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per caption."""
        require_folder(self.root, f"a folder with {' or '.join(FLICKR_FILES)} and the pictures")
        path = next((self.root / name for name in FLICKR_FILES if (self.root / name).is_file()), None)
        if path is None:
            raise SourceError(f"--input {self.root}: neither {' nor '.join(FLICKR_FILES)} in it")
        pattern = _TOKEN_LINE if path.suffix == ".token" else _CSV_LINE
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                match = pattern.fullmatch(line.rstrip("\n"))
                if match and match["picture"] != "image_name":
                    document_id = f"{match['picture']}#{match['number']}"
                    yield _caption_row(self.root, document_id, FLICKR_FOLDERS, match["picture"], match["caption"])
                elif not match:
                    yield Row(
                        id=f"line:{number}", failed=f"line {number} is not a picture's name, a number and a caption"
                    )

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one caption."""
        return _captioned(row, encoder, self.root, {"corpus": "flickr30k"})


_TOKEN_LINE = re.compile(r"(?P<picture>[^\t#]+)#(?P<number>\d+)\t(?P<caption>.*)")
_CSV_LINE = re.compile(r"(?P<picture>[^|]+?)\s*\|\s*(?P<number>\d+|comment_number)\s*\|(?P<caption>.*)")


def read_object(path: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON object of an annotation file. Raises SourceError unless it has the lists `fields`."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON ({error})") from None
    missing = [name for name in fields if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise SourceError(f"{path}: must be an object with the list {missing[0]!r}")
    return dict(content)


def find_picture(root: Path, folders: tuple[str, ...], name: str) -> list[Any] | None:
    """Return [path below `root`, size] of a picture that lies in one of `folders`, None where it does not."""
    for folder in folders:
        path = f"{folder}/{name}"
        size = file_size(root, path)
        if size >= 0:
            return [path, size]
    return None


def _caption_row(root: Path, document_id: str, folders: tuple[str, ...], picture: str, caption: str) -> Row:
    caption = " ".join(caption.split())
    found = find_picture(root, folders, picture)
    if found is None:
        return Row(id=document_id, failed=f"{picture} is in none of the folders {', '.join(folders)}")
    if not caption:
        return Row(id=document_id, filtered="an empty caption")
    recipe = {"picture": found, "caption": caption, "image": picture}
    return Row(id=document_id, recipe=recipe, group=picture)


def _captioned(row: Row, encoder: MediaEncoder, root: Path, source: dict[str, Any]) -> Document:
    image = row.recipe["image"]
    return Document(
        id=row.id,
        parts=(encoder.encode_file(root / row.recipe["picture"][0], "image", shared=True),
               TextPart(text=row.recipe["caption"])),
        source=source,
        labels={"language": "en", "image": image, "kind": "caption", **own_group_labels(f"image:{image}")},
    )  # fmt: skip
