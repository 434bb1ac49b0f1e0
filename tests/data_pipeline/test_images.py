"""Pictures: what the probe says is what the decode gives, for every mode, orientation and kind of damage."""

import base64
import contextlib
import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media import images

GENERATOR = np.random.default_rng(0)


def smooth(height, width):
    """A picture that survives JPEG: colour ramps."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "extension", "mime"),
    [
        ("JPEG", "jpg", "image/jpeg"),
        ("PNG", "png", "image/png"),
        ("WEBP", "webp", "image/webp"),
        ("GIF", "gif", "image/gif"),
        ("BMP", "bmp", "image/bmp"),
    ],
)
def test_probe_and_decode_agree_for_every_codec(form, extension, mime):
    pixels = smooth(30, 50)
    data = encoded(Image.fromarray(pixels), form)
    info, real_extension, real_mime = images.probe(data)
    assert (info.width, info.height, real_extension, real_mime) == (50, 30, extension, mime)
    assert extension in images.EXTENSIONS
    decoded = images.decode_rgb(data)
    assert decoded.shape == (30, 50, 3)
    assert np.abs(decoded.astype(int) - pixels).mean() < (10 if form == "GIF" else 4)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_in_probe_and_decode(form, orientation):
    stored = Image.fromarray(smooth(24, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, form, exif=exif, **({} if form == "PNG" else {"quality": 95}))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    info, _, _ = images.probe(data)
    assert (info.height, info.width) == upright.shape[:2]
    assert np.abs(images.decode_rgb(data).astype(int) - upright).max() <= 2
    resized = images.decode_resized(data, info, 2 * info.height, info.width)
    expected = np.asarray(Image.fromarray(upright).resize((info.width, 2 * info.height), Image.Resampling.BICUBIC))
    assert np.abs(resized.astype(int) - expected).max() <= 3


def test_a_damaged_exif_block_means_upright():
    data = encoded(Image.fromarray(smooth(24, 40)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert images.probe(data)[0].width == 40
    assert images.decode_rgb(data).shape == (24, 40, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_is_white(mode):
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, :4] = 0
    rgba = np.dstack([np.full((8, 8), 40, np.uint8)] * 3 + [alpha])
    image = Image.fromarray(rgba)
    if mode in ("P", "L", "RGB"):  # transparency by a key colour
        image = Image.fromarray(np.where(alpha[:, :, None] == 0, 7, 40).astype(np.uint8).repeat(3, axis=2))
        image = image.quantize(2) if mode == "P" else image.convert(mode)
        first = image.getpixel((0, 0))
        data = encoded(image, "PNG", transparency=first)
    else:
        data = encoded(image.convert("LA" if mode == "PA" else mode), "PNG")
    decoded = images.decode_rgb(data)
    assert (decoded[:, :4] == 255).all()
    assert (decoded[:, 4:] == 40).all()


def test_half_transparency_is_blended_with_white():
    data = encoded(Image.new("RGBA", (4, 4), (100, 0, 200, 128)), "PNG")
    assert np.abs(images.decode_rgb(data)[0, 0].astype(int) - [177, 127, 227]).max() <= 1


def test_grey_of_16_bits_keeps_its_high_byte():
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    decoded = images.decode_rgb(encoded(Image.fromarray(values), "PNG"))
    assert (decoded == (values >> 8)[:, :, None]).all()


@pytest.mark.parametrize("mode", ["CMYK", "L", "YCbCr"])
def test_jpeg_colour_spaces(mode):
    pixels = smooth(32, 32)
    data = encoded(Image.fromarray(pixels).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.fromarray(pixels).convert(mode).convert("RGB"))
    assert np.abs(images.decode_rgb(data).astype(int) - expected).mean() < 4


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert images.decode_rgb(data)[8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(400, 300), (90, 70), (33, 500)])
def test_decode_resized_is_close_to_resizing_the_full_picture(size):
    pixels = smooth(size[1], size[0])
    data = encoded(Image.fromarray(pixels), "JPEG", quality=95)
    resized = images.decode_resized(data, images.probe(data)[0], 64, 96)
    expected = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC))
    assert resized.shape == (64, 96, 3)
    assert np.abs(resized.astype(int) - expected).mean() < 3


def test_a_picture_of_another_size_than_the_index_says_is_refused():
    data = encoded(Image.fromarray(smooth(20, 30)), "PNG")
    other = images.probe(encoded(Image.fromarray(smooth(30, 20)), "PNG"))[0]
    with pytest.raises(MediaError, match="30 x 20 px: the index says 20 x 30"):
        images.decode_resized(data, other, 32, 32)


def png_header_claiming(width, height):
    """A valid PNG whose header alone is changed: a decompression bomb in the making."""
    import zlib

    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def jpeg_header_claiming(width, height):
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "data", [png_header_claiming(60_000, 60_000), png_header_claiming(100_000, 1), jpeg_header_claiming(60_000, 60_000)]
)
@pytest.mark.parametrize("action", [images.probe, images.decode_rgb])
def test_bombs_are_refused_before_decoding(data, action, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(MediaError, match=r"the area at most|exceeds limit"):
        action(data)


def assert_only_media_errors(data):
    for action in (images.probe, images.decode_rgb, lambda raw: images.reencode(raw, 32)):
        with contextlib.suppress(MediaError):
            action(data)


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF"]),
)
@settings(max_examples=150, deadline=None)
def test_random_bytes_give_media_errors(tail, head):
    assert_only_media_errors(head + tail)


SAMPLES = {form: encoded(Image.fromarray(smooth(40, 56)), form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP")}


@pytest.mark.parametrize("form", SAMPLES)
def test_a_truncated_file_is_a_media_error(form):
    data = SAMPLES[form]
    for cut in (0, 1, 3, 10, 30, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(MediaError, match=r"^image of \d+ bytes: .+; replace it or leave it out$"):
            images.decode_rgb(data[:cut])


@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_flipped_bytes_give_a_picture_or_a_media_error(form, flips):
    data = bytearray(SAMPLES[form])
    for position, value in flips:
        data[position % len(data)] = value
    assert_only_media_errors(bytes(data))


def test_reencode_bounds_the_longer_side_and_keeps_the_shape():
    data = encoded(Image.fromarray(smooth(300, 600)), "PNG")
    smaller, extension, mime = images.reencode(data, 100)
    info, real_extension, _ = images.probe(smaller)
    assert (info.width, info.height) == (100, 50)
    assert (extension, mime, real_extension) == ("jpg", "image/jpeg", "jpg")
    expected = images.decode_resized(data, None, 50, 100).astype(int)
    assert np.abs(images.decode_rgb(smaller) - expected).mean() < 3


def test_reencode_leaves_a_fitting_upright_jpeg_alone_but_turns_a_rotated_one():
    picture = Image.fromarray(smooth(30, 60))
    upright = encoded(picture, "JPEG")
    assert images.reencode(upright, 60)[0] == upright
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, _, _ = images.reencode(encoded(picture, "JPEG", exif=exif), 60)
    assert np.asarray(Image.open(io.BytesIO(turned))).shape == (60, 30, 3)
    assert images.decode_rgb(turned).shape == (60, 30, 3)


def test_reencode_gives_the_same_bytes_in_another_process(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(GENERATOR.integers(0, 255, (90, 70, 4), np.uint8)), "PNG"))
    program = (
        "import sys, hashlib; from triweave.data_pipeline.media.images import reencode;"
        "print(hashlib.sha256(reencode(open(sys.argv[1], 'rb').read(), 40)[0]).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    here = images.reencode(path.read_bytes(), 40)[0]
    assert other.stdout.strip() == hashlib.sha256(here).hexdigest()


class TestSvg:
    SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size}>{body}</svg>'

    @pytest.fixture(autouse=True)
    def _renderer(self):
        pytest.importorskip("resvg_py")

    def drawn(self, body, size='width="10mm" height="20mm"'):
        return images.render_svg(self.SVG.format(size=size, body=body).encode(), 64)

    def test_the_longer_side_is_as_asked_and_what_is_not_drawn_is_white(self):
        pixels = images.decode_rgb(self.drawn('<rect width="100%" height="50%" fill="#f00"/>'))
        assert pixels.shape == (64, 32, 3)
        assert pixels[10, 16].tolist() == [255, 0, 0]
        assert pixels[50, 16].tolist() == [255, 255, 255]

    @pytest.mark.parametrize("element", ["image", "feImage"])
    def test_pointing_to_a_file_is_refused(self, element, tmp_path):
        secret = tmp_path / "secret.png"
        secret.write_bytes(encoded(Image.new("RGB", (8, 8), "red"), "PNG"))
        with pytest.raises(MediaError, match="points to the file"):
            self.drawn(f'<{element} width="8" height="8" xlink:href="{secret}"/>')

    def test_deep_nesting_is_refused_instead_of_killing_the_process(self):
        with pytest.raises(MediaError, match="nested deeper"):
            self.drawn("<g>" * 50_000 + "</g>" * 50_000)

    @pytest.mark.parametrize("mime", ["image/svg+xml", "text/plain", ""])
    def test_a_drawing_within_the_drawing_is_refused_since_its_depth_is_hidden(self, mime):
        inner = base64.b64encode(self.SVG.format(size="", body="<g/>").encode()).decode()
        with pytest.raises(MediaError, match="no PNG, JPEG, GIF or WebP"):
            self.drawn(f'<image width="8" height="8" xlink:href="data:{mime};base64,{inner}"/>')

    def test_an_embedded_picture_is_drawn(self):
        red = base64.b64encode(encoded(Image.new("RGB", (8, 8), "red"), "PNG")).decode()
        body = f'<image width="100%" height="100%" xlink:href="data:image/png;base64,{red}"/>'
        pixels = images.decode_rgb(self.drawn(body, size='width="8" height="8"'))
        assert pixels[32, 32].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("data", [b"", b"junk", b"<svg/>" * 2, b"\xff" * 40])
    def test_junk_is_a_media_error(self, data):
        with pytest.raises(MediaError, match="SVG"):
            images.render_svg(data, 64)


def test_without_the_extra_svg_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DataError, match=r"pip install 'triweave\[svg\]'"):
        images.render_svg(b"<svg/>", 64)
