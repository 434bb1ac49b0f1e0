"""Pictures: probe from the header, decode to upright RGB on white, resize, re-encode, render SVG.

JPEG goes through simplejpeg (twice Pillow's speed, and it can decode at 1/2, 1/4, 1/8 scale); PNG, WebP, GIF, BMP and
the JPEGs that simplejpeg refuses (CMYK, odd files) through Pillow. The rules are the same for all:

- size is bounded by MAX_IMAGE_PIXELS and MAX_IMAGE_SIDE_PX before a pixel is decoded;
- width and height are those after the EXIF orientation, which every decode applies;
- transparency is pasted on white; 16-bit grey keeps its high byte; of an animation the first frame counts;
- whatever is wrong with the bytes is a MediaError.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media.geometry import MediaInfo

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_IMAGE_PIXELS = 178_956_970
"""Largest width * height that is decoded: 512 MiB of RGB, the point where Pillow's own bomb guard refuses."""
MAX_IMAGE_SIDE_PX = 65_500
"""Largest side, JPEG's own limit."""
JPEG_QUALITY = 90
MAX_SVG_DEPTH = 100
_EMBEDDED = tuple(f"data:image/{kind}" for kind in ("png", "jpeg", "jpg", "gif", "webp"))

Pixels = npt.NDArray[np.uint8]
"""uint8 [height, width, 3], RGB."""

_FORMATS = {
    "JPEG": ("jpg", "image/jpeg"),
    "PNG": ("png", "image/png"),
    "WEBP": ("webp", "image/webp"),
    "GIF": ("gif", "image/gif"),
    "BMP": ("bmp", "image/bmp"),
}
_EXIF_ORIENTATION = 0x0112
_RESAMPLER = Image.Resampling.BICUBIC  # antialiased by Pillow; LANCZOS costs half as much again, more than the decode
_REDUCING_GAP = 2.0  # box-reduce by whole factors down to twice the target first: several times faster, no visible loss


def probe(data: bytes) -> tuple[MediaInfo, str, str]:
    """Return (info, extension, mime) of a picture from its header; the extension is the real codec's.

    Raises MediaError where the header is damaged, of another kind, or above the size bounds.
    """
    with _one_media_error(data):
        if _is_jpeg(data):
            width, height, _, _ = _jpeg_header(data)
            return MediaInfo(width=width, height=height), *_FORMATS["JPEG"]
        with _open(data) as image:
            width, height = _upright_size(image.size, _orientation(image.info.get("exif")))
            return MediaInfo(width=width, height=height), *_FORMATS[str(image.format)]


def decode_rgb(data: bytes) -> Pixels:
    """Return a picture in full size, upright, on white: uint8 [height, width, 3].

    Raises MediaError where the bytes are damaged, of another kind, or above the size bounds.
    """
    with _one_media_error(data):
        pixels, orientation = _decode_stored(data, None, 0, 0)
        return np.ascontiguousarray(_apply_orientation(pixels, orientation))


def decode_resized(data: bytes, info: MediaInfo | None, height: int, width: int) -> Pixels:
    """Return a picture resized to exactly [height, width, 3] uint8, upright, on white.

    A JPEG is decoded at the smallest DCT scale that is not below the target, then resized with Pillow's antialiased
    BICUBIC, which is deterministic. `info` is what the index promises; None skips the comparison.

    Raises MediaError where the bytes are damaged or have another size than `info`.
    """
    with _one_media_error(data):
        pixels, orientation = _decode_stored(data, info, height, width)
        stored_size = (height, width) if orientation >= 5 else (width, height)
        if pixels.shape[1::-1] != stored_size:
            image = Image.fromarray(pixels).resize(stored_size, _RESAMPLER, reducing_gap=_REDUCING_GAP)
            pixels = np.asarray(image)
        return np.ascontiguousarray(_apply_orientation(pixels, orientation))


def reencode(data: bytes, max_side_px: int) -> tuple[bytes, str, str]:
    """Return (bytes, extension, mime) of the picture as an upright JPEG whose longer side is at most `max_side_px`.

    A JPEG that already is all that comes back unchanged. Quality 90, 4:4:4; the same bytes give the same bytes in every
    process.

    Raises MediaError as decode_rgb does.
    """
    info, extension, mime = probe(data)
    longer = max(info.width, info.height)
    with _one_media_error(data):
        if extension == "jpg" and longer <= max_side_px and _orientation(_jpeg_exif(data)) == 1:
            return data, extension, mime
    scale = min(1.0, max_side_px / longer)
    width, height = (max(1, int(side * scale + 0.5)) for side in (info.width, info.height))
    pixels = decode_resized(data, info, height, width)
    return simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="444"), *_FORMATS["JPEG"]


def encode_jpeg(pixels: Pixels, max_side_px: int | None = None) -> bytes:
    """Return decoded RGB as JPEG, scaled down to a longer side of at most `max_side_px`; quality 90, 4:4:4."""
    height, width = pixels.shape[:2]
    scale = min(1.0, (max_side_px or width + height) / max(width, height))
    size = (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))
    if size != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, _RESAMPLER, reducing_gap=_REDUCING_GAP))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=JPEG_QUALITY, colorsubsampling="444")


def render_svg(data: bytes, max_side_px: int) -> bytes:
    """Return an SVG drawing rendered to PNG, scaled so that its longer side is `max_side_px`; transparency stays.

    The same bytes give the same picture everywhere: no system fonts are used, and text without an embedded font is not
    drawn. A drawing that points to files is refused, since a foreign SVG could carry off a picture of this machine.

    Raises DataError where the `svg` extra is not installed, MediaError where the drawing cannot be rendered.
    """
    try:
        import resvg_py
    except ImportError:
        raise DataError("SVG needs the package resvg-py: install it with `pip install 'triweave[svg]'`") from None
    try:
        drawing = ElementTree.fromstring(data)
        _check_drawing(drawing, len(data))
        return bytes(
            resvg_py.svg_to_bytes(
                # Written anew, so that what was checked above is what is rendered, whatever the encoding and entities.
                svg_string=ElementTree.tostring(drawing, encoding="unicode"),
                width=max_side_px,
                height=max_side_px,
                dpi=96.0,
                skip_system_fonts=True,
            )
        )
    except DataError:
        raise
    except BaseException as error:
        # A panic of the renderer derives from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MediaError(
            f"SVG of {len(data)} bytes: cannot be rendered ({reason}); replace it or leave it out"
        ) from error


def _check_drawing(drawing: ElementTree.Element, size_bytes: int) -> None:
    """Refuse an SVG that points to files, or is nested so deep that the recursive renderer would kill the process."""
    level, depth = [drawing], 0
    while level:
        depth += 1
        if depth > MAX_SVG_DEPTH:
            raise MediaError(f"SVG of {size_bytes} bytes: nested deeper than {MAX_SVG_DEPTH} elements; leave it out")
        for element in level:
            if element.tag.rpartition("}")[2] not in ("image", "feImage"):
                continue
            for name, target in element.attrib.items():
                if name.rpartition("}")[2] != "href" or target.strip().startswith(("#", *_EMBEDDED)):
                    continue
                if target.strip().startswith("data:"):  # a drawing in the drawing would hide its depth from this check
                    raise MediaError(f"SVG of {size_bytes} bytes: embeds {target[:30]!r}, no PNG, JPEG, GIF or WebP")
                raise MediaError(f"SVG of {size_bytes} bytes: points to the file {target[:60]!r}; embed it")
        level = [child for element in level for child in element]


def _decode_stored(data: bytes, info: MediaInfo | None, height: int, width: int) -> tuple[Pixels, int]:
    """Return (pixels as stored, EXIF orientation); a JPEG may come scaled down, not below upright (height, width)."""
    if _is_jpeg(data):
        upright_width, upright_height, orientation, colorspace = _jpeg_header(data)
        _check_size(info, upright_width, upright_height)
        if colorspace not in ("CMYK", "YCCK"):
            min_width, min_height = (height, width) if orientation >= 5 else (width, height)
            try:
                return simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width), orientation
            except ValueError:
                # Strict libjpeg also refuses files that are merely odd; Pillow tells those from truncated ones.
                pass
        with _open(data) as image:
            return _to_rgb_on_white(image), orientation
    with _open(data) as image:
        orientation = _orientation(image.info.get("exif"))
        _check_size(info, *_upright_size(image.size, orientation))
        return _to_rgb_on_white(image), orientation


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _jpeg_header(data: bytes) -> tuple[int, int, int, str]:
    """Return (upright width, upright height, EXIF orientation, colour space) of a JPEG."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        with _open(data) as image:
            width, height = image.size
            colorspace = "CMYK" if image.mode == "CMYK" else "odd"
    _check_bounds(width, height)
    orientation = _orientation(_jpeg_exif(data))
    return *_upright_size((width, height), orientation), orientation, colorspace


def _jpeg_exif(data: bytes) -> bytes | None:
    """Return the EXIF block of a JPEG by walking its segments up to the first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (0xD9, 0xDA):  # end of image, start of scan
            return None
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # markers without a length
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return data[position + 4 : position + 2 + length]
        position += 2 + length
    return None


def _orientation(exif_block: bytes | None) -> int:
    """Return the EXIF orientation 1..8; 1 where there is no block or it is damaged, as viewers do."""
    if not exif_block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(exif_block)
        orientation = exif.get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


def _apply_orientation(pixels: Pixels, orientation: int) -> Pixels:
    """Return a view of `pixels` turned upright (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _open(data: bytes) -> Image.Image:
    """Open with Pillow, only the formats named here, and check the bounds before any pixel is decoded."""
    image = Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
    _check_bounds(*image.size)
    return image


def _check_bounds(width: int, height: int) -> None:
    if width < 1 or height < 1 or max(width, height) > MAX_IMAGE_SIDE_PX or width * height > MAX_IMAGE_PIXELS:
        raise MediaError(
            f"image of {width} x {height} px: the sides must be 1 to {MAX_IMAGE_SIDE_PX} and the area at most "
            f"{MAX_IMAGE_PIXELS} px; scale it down before building"
        )


def _check_size(info: MediaInfo | None, width: int, height: int) -> None:
    if info is not None and (info.width, info.height) != (width, height):
        raise MediaError(
            f"image of {width} x {height} px: the index says {info.width} x {info.height}; rebuild the shard"
        )


def _to_rgb_on_white(image: Image.Image) -> Pixels:
    """Return the first frame as uint8 [height, width, 3]."""
    if image.mode.startswith("I"):  # 16-bit grey
        grey = (np.clip(np.asarray(image, np.int64), 0, 0xFFFF) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(layer, mask=layer.getchannel("A"))
        return np.asarray(canvas)
    return np.asarray(image.convert("RGB"))


@contextmanager
def _one_media_error(data: bytes) -> Iterator[None]:
    """Turn whatever a codec raises into one MediaError, and keep its warnings to ourselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Pillow's own text names an address in memory
            reason = "its first bytes are of none of them"
        raise MediaError(
            f"image of {len(data)} bytes: not a readable {', '.join(_FORMATS)} file ({reason}); "
            f"replace it or leave it out"
        ) from error
