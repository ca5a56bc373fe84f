"""Images in files and in memory: reads their size from the header, decodes within limits, encodes.

No pixel is decoded before the header has been checked, and a decoded image is compared with the size and the
checksum of its reference.
"""

import base64
import hashlib
import stat
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from rlcs.data.image_structure import structural_fault
from rlcs.errors import ImageError
from rlcs.records import ImageRef
from rlcs.storage import confined

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MAX_ASPECT = 200
"""Longest side over shortest; Qwen's image processor refuses more."""
DECODE_LIMIT = 200_000_000
"""Default limit for the pixels of one image."""
_KEPT_PIXELS = 16_777_216
"""A JPEG of 4, 16 or 64 times as many pixels is decoded at a half, a quarter or an eighth of its size: more
than any recipe shows to a model, for a fraction of the time and memory."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_SHOWN = 200
_BYTES_PER_PIXEL = 8
"""Bounds the bytes read into memory: a valid file is no larger than its pixels as 16-bit RGBA."""


class Measure(Protocol):
    """Finds width and height of an encoded image: `measured`, or `ImageDecoder.measured`."""

    def __call__(self, data: bytes, *, limit: int, where: str) -> tuple[int, int]:
        """As `measured` does. Raises ImageError."""
        ...


class OpenImage(Protocol):
    """Decodes an image: `open_image`, or `ImageDecoder.open_image`."""

    def __call__(self, ref: ImageRef, *, limit: int | None = None) -> "Image":
        """As `open_image` does. Raises ImageError."""
        ...


def measured(data: bytes, *, limit: int, where: str) -> tuple[int, int]:
    """Read width and height as shown from the header; pixels are decoded only if it may be truncated.

    `limit` is in pixels; `where` names the image in errors. Raises ImageError.
    """
    image = _opened(data, limit=limit, where=where)
    if _may_be_truncated(data):
        _decoded(data, limit=limit, where=where)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def image_from_path(path: str, *, root: Path, limit: int, measure: Measure = measured) -> ImageRef:
    """Make a reference to the image file `path` below `root`; `measure` checks its header.

    `limit` is in pixels. Raises ImageError, or DataError for a path that leaves `root`.
    """
    target = confined(root, path)
    data = _read_image(target, where=path, limit=limit)
    width, height = measure(data, limit=limit, where=path)
    return ImageRef(sha256=hashlib.sha256(data).hexdigest(), width=width, height=height, path=str(target))


def image_from_bytes(data: bytes, *, limit: int, where: str, measure: Measure = measured) -> ImageRef:
    """Make a reference that holds an encoded image; `measure` checks its header.

    `limit` is in pixels; `where` names the image in errors. Raises ImageError.
    """
    width, height = measure(data, limit=limit, where=where)
    return ImageRef(sha256=hashlib.sha256(data).hexdigest(), width=width, height=height, data=data)


def pixels_in_header(data: bytes, *, limit: int, where: str) -> int:
    """The number of pixels of an encoded image, none of which is decoded. Raises ImageError."""
    width, height = _opened(data, limit=limit, where=where).size
    return width * height


def open_image(ref: ImageRef, *, limit: int | None = None) -> "Image":
    """Decode an image fully, as RGB of `ref.width` x `ref.height` pixels (less for JPEGs of 67 megapixels).

    It is turned by its EXIF orientation, transparency becomes white, CMYK is converted, 16-bit gray scaled to
    8 bits, and an animation gives its first frame. `limit` is as in `encoded_image`. Raises ImageError if the
    image is damaged or differs from `ref`.
    """
    limit, where = _bounds(ref, limit)
    result = _decoded(encoded_image(ref, limit=limit), limit=limit, where=where)
    scale = _draft_scale(ref.width, ref.height)
    if result.size not in ((ref.width, ref.height), (-(-ref.width // scale), -(-ref.height // scale))):
        raise ImageError(f"decoded to {result.size}, not as its header says", where=where, fix="replace it")
    return result


def encoded_image(ref: ImageRef, *, limit: int | None = None) -> bytes:
    """Read the encoded bytes of an image, unchanged since `ref` was made. Raises ImageError.

    `limit` is in pixels; the default accepts any image that was within the limit when `ref` was made.
    """
    limit, where = _bounds(ref, limit)
    data = ref.data
    if data is None:
        if ref.path is None:
            raise ImageError("the image was not kept with its problem", where=where)
        data = _read_image(Path(ref.path), where=where, limit=limit)
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ImageError("the image changed after it was first read", where=where, fix="load the data again")
    return data


def portable_image(ref: ImageRef) -> bytes:
    """The encoded bytes of an image, as PNG if browsers and other tools do not read its own format."""
    data = encoded_image(ref)
    return encode(open_image(ref)) if _format_of(data) in ("HEIC", "TIFF") else data


def _bounds(ref: ImageRef, limit: int | None) -> tuple[int, str]:
    """The limit in pixels for an image, and its name in errors."""
    return limit or max(DECODE_LIMIT, ref.width * ref.height), ref.path or f"image {ref.sha256[:12]}"


def image_kind(data: bytes) -> str:
    """The format of an encoded image, as in `image/png` and in file names; empty if it is no image."""
    return (_format_of(data) or "").lower()


def encode(image: "Image", kind: str = "PNG", **options: object) -> bytes:
    """Encode an image as file content; `options` are those of Pillow's `save`."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    """Make a `data:` URI of an encoded image."""
    return f"data:image/{image_kind(data)};base64,{base64.b64encode(data).decode('ascii')}"


def _decoded(data: bytes, *, limit: int, where: str) -> "Image":
    image = _opened(data, limit=limit, where=where)
    orientation = _orientation(image)
    try:
        if image.format == "JPEG" and (scale := _draft_scale(*image.size)) > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        return _upright(_rgb(image), orientation)
    except Exception as error:  # a decoder may raise any exception on hostile bytes
        raise ImageError(
            f"damaged or truncated: {_reason(error)}", where=where, fix="replace the image"
        ) from error


def _read_image(path: Path, *, where: str, limit: int) -> bytes:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ImageError("not a regular file", where=where, fix="name an image file")
        if info.st_size > limit * _BYTES_PER_PIXEL:
            raise ImageError(f"a file of {info.st_size:,} bytes is no image within the limit", where=where)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            "the image is missing",
            where=where,
            fix=f"expected at {path}; data.image_root names another folder",
        ) from error
    except OSError as error:
        raise ImageError(f"the image cannot be read: {error.strerror}", where=where) from error


def _draft_scale(width: int, height: int) -> int:
    """By what a JPEG of this size is divided when it is decoded: 1, 2, 4 or 8."""
    return next((scale for scale in (8, 4, 2) if width * height >= scale**2 * _KEPT_PIXELS), 1)


def _format_of(data: bytes) -> str | None:
    """The supported format that these bytes begin with, by the marks that Pillow knows."""
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401 - these two register themselves

    if data[4:8] == b"ftyp":  # an ISO media file: its brands say what its pictures are
        size = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, size, 4))}
        return "HEIC" if brands & _HEIC_BRANDS else "AVIF" if brands & _AVIF_BRANDS else None
    Image.preinit()
    accepting = (name for name in _FORMATS if (accepts := Image.OPEN[name][1]) and accepts(data[:16]))
    return next(accepting, None)


def _opened(data: bytes, *, limit: int, where: str) -> "ImageFile":
    """Parse an image's header and check size and mode, before any pixel is decoded."""
    if not data:
        raise ImageError("the image is empty (0 bytes)", where=where, fix="replace it")
    name = _format_of(data)
    if name is None:
        what = "not a PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC file"
        raise ImageError(what, where=where, fix="convert the image, or correct the path")
    if fault := structural_fault(data, name):
        fix = "open it in an image editor and save it again"
        raise ImageError(f"no ordinary image: {fault}", where=where, fix=fix)
    parse = _parser(name, where)
    try:
        image = parse(BytesIO(data))
    except Exception as error:  # a parser may raise any exception on hostile bytes
        raise ImageError(
            f"the image header is damaged: {_reason(error)}", where=where, fix="replace it"
        ) from error
    width, height = image.size
    size = f"{width:,} x {height:,} pixels"
    if width <= 0 or height <= 0:
        raise ImageError(size, where=where, fix="replace it")
    if width * height > limit:
        fix = "shrink the image, or raise images.decode_limit"
        raise ImageError(f"{size} are more than the limit of {limit:,}", where=where, fix=fix)
    if max(width, height) > MAX_ASPECT * min(width, height):
        what = f"{size}: one side is more than {MAX_ASPECT} times the other"
        raise ImageError(what, where=where, fix="crop the image")
    if image.mode in ("I", "F"):
        raise ImageError("32-bit gray has no agreed white", where=where, fix="save it with 8 or 16 bits")
    return image


def _reason(error: Exception) -> str:
    return "it needs too much memory" if isinstance(error, MemoryError) else str(error)[:_SHOWN]


def _parser(name: str, where: str) -> "Callable[[BytesIO], ImageFile]":
    """What parses the header of a format. Raises ImageError for one that this installation cannot read.

    `Image.open` is avoided: it has another size limit, which is global to the process.
    """
    from PIL import Image, features

    if name == "HEIC":
        try:
            from pillow_heif import HeifImageFile
        except ImportError as error:
            fix = "pip install pillow-heif, or convert it to JPEG"
            raise ImageError("a HEIC photo needs another package", where=where, fix=fix) from error
        return cast("Callable[[BytesIO], ImageFile]", HeifImageFile)
    if name == "AVIF":
        if not features.check("avif"):
            fix = "install Pillow's own wheel (pip install --force-reinstall pillow), or convert it to PNG"
            raise ImageError("this build of Pillow reads no AVIF", where=where, fix=fix)
        from PIL import AvifImagePlugin

        return AvifImagePlugin.AvifImageFile
    opener = Image.OPEN[name][0]
    return lambda file: opener(file, "")


def _may_be_truncated(data: bytes) -> bool:
    """Whether the end mark of a PNG, JPEG or WebP is missing; always true for formats without one."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"\xff\xd8"):  # an end of image after the last start of scan: not a thumbnail's
        return data.find(b"\xff\xd9", max(data.rfind(b"\xff\xda"), 0)) < 0
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return data[4:8] != b"ftyp" or _boxes_end(data) != len(data)


def _boxes_end(data: bytes) -> int:
    """Where the last of the boxes of an ISO media file ends, by the sizes that they state."""
    end = 0
    while end < len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        if size == 1:
            size = int.from_bytes(data[end + 8 : end + 16], "big")
        if size == 0:  # the last box, to the end of the file
            return len(data)
        end += max(size, 8)
    return end


def _orientation(image: "ImageFile") -> int:
    """The orientation of an image as in EXIF tag 274: 1 (upright) to 8; from 5 on it lies on its side."""
    # Pillow turns a TIFF and pillow-heif a HEIC by itself; a PNG would be decoded to look for EXIF behind it.
    if image.format in ("TIFF", "HEIF") or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = int(image.getexif().get(274, 1))
    except Exception:  # an image with a broken EXIF block is still usable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: "Image", orientation: int) -> "Image":
    from PIL.Image import Transpose as T

    turns = [None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM]
    turn = [*turns, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90][orientation - 1]
    return image if turn is None else image.transpose(turn)


def _rgb(image: "Image") -> "Image":
    from PIL import Image as pil

    if image.mode.startswith("I;16"):  # a plain convert would clip everything above 255 to white
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = pil.new("RGBA", layer.size, "white")
        return pil.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def is_plain(data: bytes) -> bool:
    """Whether any program shows an image alike, which was measured before.

    It is an upright PNG or JPEG in 8-bit RGB or gray, without transparency or further frames.
    """
    image = _opened(data, limit=1 << 62, where="image")
    plain = image.format in ("PNG", "JPEG") and image.mode in ("RGB", "L") and not image.has_transparency_data
    return plain and _orientation(image) == 1 and getattr(image, "n_frames", 1) == 1
