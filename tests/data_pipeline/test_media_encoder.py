"""What goes into shards as it is has been decoded once; what is re-encoded has been anyway."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions

KEPT = MediaOptions()
FITTING = MediaOptions(image_max_side_px=4096, audio_rate_hz=8000)
"""A JPEG that fits is kept even where pictures are re-encoded."""


@pytest.mark.parametrize("options", [KEPT, FITTING])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_cut_picture_is_no_part(picture: Callable[..., bytes], options: MediaOptions, form: str) -> None:
    data = picture(1, form=form, width=64, height=48)
    assert MediaEncoder(options).encode("image", data).info.width == 64
    with pytest.raises(MediaError):
        MediaEncoder(options).encode("image", data[: len(data) * 2 // 3])


@pytest.mark.parametrize("options", [KEPT, FITTING])
def test_a_cut_clip_is_no_part(clip: Callable[..., bytes], options: MediaOptions) -> None:
    data = clip(1)
    assert MediaEncoder(options).encode("audio", data).info.samples > 0
    with pytest.raises(MediaError):
        MediaEncoder(options).encode("audio", data[: len(data) * 2 // 3])
