"""A video through the encoders: its frames as pictures and its sound on one clock, from the file to the gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.sources.video import VideoSource
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import train_tokenizer
from triweave.pretrain.batch import ENCODER_TILES, kernel_tables, to_device
from triweave.pretrain.encoders.config import EncoderConfig, check_encoders
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

pytest.importorskip("av")
VIDEOS = Path(__file__).parents[1] / "data_pipeline" / "test_video.py"
GEOMETRY = MediaGeometry(image_patch_px=16)
ATTENTION = {"width": 32, "layers": 1, "heads": 2, "merge": 2, "connector": "pixel_shuffle"}


@pytest.mark.slow
def test_frames_and_sound_of_a_video_reach_their_encoders(rank_pool, tmp_path: Path) -> None:
    videos = rank_pool.load(VIDEOS)
    (tmp_path / "videos").mkdir()
    for number in range(4):
        videos.write_video(tmp_path / "videos" / f"{number}.mkv")
        (tmp_path / "videos" / f"{number}.txt").write_text(f"a tone in the second second of video {number}")
    source = VideoSource(root=tmp_path / "videos", sound_ms=1000)
    manifest = build(source, tmp_path / "shards", BuildOptions())
    train_tokenizer([manifest], 300, tmp_path / "tokenizer.model")
    write_token_counts(manifest, tmp_path / "tokenizer.model")
    encoders = {
        "image": EncoderConfig(kind="vit", **ATTENTION),
        "audio": EncoderConfig(kind="transformer", **ATTENTION),
    }
    check_encoders(encoders, GEOMETRY)
    config = ModelConfig(d_model=32, layers=1, heads=2, kv_heads=2, head_width=16, encoders=encoders)
    data = DataConfig(
        sources=[SourceConfig(name="videos", shards=str(tmp_path / "shards"))],
        tokenizer=str(tmp_path / "tokenizer.model"),
        sequence_length=512,
        geometry=GEOMETRY,
        workers=0,
    )
    maker = kernel_tables(config, torch.device("cpu"), torch.float32)
    loader = StepLoader(data, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1, post_pack=maker)
    (batch,) = next(iter(loader)).micro_batches
    first = batch.document_ids[0] == 0
    spans, kinds = batch.span_ids[0][first], batch.modality_ids[0][first]
    order = [int(kinds[spans == span][0]) for span in range(spans.max() + 1)]
    assert order == [1, 2] * 3  # a frame and its second of sound, three times
    assert batch.payloads["image"].grids[0].tolist() == [1, 3, 4]
    assert set(batch.extra[ENCODER_TILES]) == {"image", "audio"}
    model = MultimodalTransformer(
        config, vocab_size=loader.tokenizer.vocab_size, media_features=loader.media_features, seed=0
    )
    model(to_device(batch, "cpu")).total.backward()
    for name, parameter in model.towers.named_parameters():
        assert parameter.grad is not None, name
        assert np.isfinite(parameter.grad.numpy()).all(), name
        assert torch.count_nonzero(parameter.grad), name
