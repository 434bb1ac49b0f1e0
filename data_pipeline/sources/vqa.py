"""Questions about pictures as VQA v2 lays them out: the picture, the question (user) and its answer (assistant).

    ROOT/v2_OpenEnded_mscoco_train2014_questions.json     {"questions": [{"question_id", "image_id", "question"}]}
    ROOT/v2_mscoco_train2014_annotations.json             {"annotations": [{"question_id", "multiple_choice_answer",
                                                            "answers": [{"answer"}], "question_type", "answer_type"}]}
    ROOT/train2014/COCO_train2014_000000000009.jpg        or ROOT/images/...

Questions without an answer, as those of the test sets, are filtered. Labels: `image`, `question_type`, `answer_type`,
`answers` (what people said, in their order, for the accuracy of Antol et al. 2015), and `group` and `split` by picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder
from triweave.data_pipeline.sources.captions import find_picture, read_object
from triweave.data_pipeline.sources.concepts import own_group_labels

_QUESTIONS = re.compile(r"v2_OpenEnded_mscoco_(?P<subset>[\w-]+)_questions\.json")


@dataclass(frozen=True, kw_only=True)
class VqaSource:
    """The questions of VQA v2 below `root`, of all the question files that are there."""

    root: Path
    name: str = "vqa"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per question."""
        require_folder(self.root, "a folder with v2_OpenEnded_mscoco_*_questions.json and the pictures' folders")
        files = [(path, match) for path in sorted(self.root.iterdir()) if (match := _QUESTIONS.fullmatch(path.name))]
        if not files:
            raise SourceError(f"--input {self.root}: no v2_OpenEnded_mscoco_*_questions.json in it")
        for path, match in files:
            yield from self._subset_rows(path, match["subset"])

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one question."""
        recipe = row.recipe
        group = own_group_labels(f"image:{recipe['picture'][0]}")
        return Document(
            id=row.id,
            parts=(
                encoder.encode_file(self.root / recipe["picture"][0], "image", shared=True),
                TextPart(text=recipe["question"], role="user"),
                TextPart(text=recipe["answer"], role="assistant"),
            ),
            source={"corpus": "vqa-v2"},
            labels={"language": "en", "kind": "question", **recipe["labels"], **group},
        )

    def _subset_rows(self, path: Path, subset: str) -> Iterator[Row]:
        notes = self.root / f"v2_mscoco_{subset}_annotations.json"
        answers = {}
        if notes.is_file():
            answers = {note["question_id"]: note for note in read_object(notes, ("annotations",))["annotations"]}
        folder = re.sub(r"^test-dev", "test", subset)
        for question in read_object(path, ("questions",))["questions"]:
            document_id = f"{subset}/{question['question_id']}"
            image = int(question["image_id"])
            name = f"COCO_{folder}_{image:012d}.jpg"
            picture = find_picture(self.root, (folder, "images"), name)
            note = answers.get(question["question_id"])
            if note is None:
                yield Row(id=document_id, filtered="no answer")
            elif picture is None:
                yield Row(id=document_id, failed=f"{name} is in neither {folder} nor images")
            else:
                recipe = {
                    "picture": picture,
                    "question": " ".join(str(question["question"]).split()),
                    "answer": str(note["multiple_choice_answer"]),
                    "labels": {
                        "image": image,
                        "answers": [str(answer["answer"]) for answer in note.get("answers", ())],
                        **{kind: note[kind] for kind in ("question_type", "answer_type") if kind in note},
                    },
                }
                yield Row(id=document_id, recipe=recipe, group=name)
