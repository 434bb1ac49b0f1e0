"""Statistics agree with what the corpus was made of."""

from __future__ import annotations

import json

from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.stats import shard_stats


def test_counts_of_the_tiny_corpus(tiny_shards: Manifest) -> None:
    stats = shard_stats(tiny_shards.root)
    assert (stats.shards, stats.samples) == (len(tiny_shards.shards), 24)
    assert stats.tar_bytes == sum(tiny_shards.tar_path(n).stat().st_size for n in range(stats.shards))
    assert stats.combinations == {"image+audio+text": 6, "image+text": 6, "audio+text": 6, "text": 6}
    assert {name: (m.parts, m.documents) for name, m in stats.modalities.items()} == {
        "audio": (12, 12), "image": (12, 12), "text": (24, 24),
    }  # fmt: skip
    assert stats.modalities["audio"].ms == sum(200 + 100 * (n % 6) for n in range(24) if n % 4 in (1, 2))
    assert stats.modalities["image"].pixels == sum(
        (40 + 8 * (n % 7)) * (32 + 8 * (n % 5)) for n in range(24) if n % 4 in (0, 1)
    )
    assert stats.label_values == {"language": 3, "number": 12}
    assert stats.labels["language"] == {"ar": 4, "de": 4, "ru": 4}
    assert stats.rows["kept"] == 24


def test_json_is_json(tiny_shards: Manifest) -> None:
    content = json.loads(json.dumps(shard_stats(tiny_shards.root).to_json()))
    assert content["modalities"]["text"]["parts"] == 24
    assert content["reasons"] == []
