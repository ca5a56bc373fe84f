"""Image files that are small to send and dear to read, one of each kind that is known."""

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO

from PIL import Image


def _encoded(kind: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: object) -> bytes:
    """An ordinary image of one colour."""
    buffer = BytesIO()
    Image.new(mode, size, 90).save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(before: bytes = b"", after: bytes = b"", side: int = 64) -> bytes:
    """A PNG with chunks before and behind its pixels."""
    plain = _encoded("PNG", (side, side))
    pixels, end = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
    return plain[:33] + before + plain[pixels:end] + after + plain[end:]


def png_chunks(count: int = 1_000_000) -> bytes:
    """Empty chunks before the pixels."""
    return _png(before=_chunk(b"tEXt", b"a\0") * count)


def png_chunks_behind(count: int = 1_000_000) -> bytes:
    """Empty chunks behind the pixels."""
    return _png(after=_chunk(b"tEXt", b"a\0") * count)


def png_empty_pixels(count: int = 1_000_000) -> bytes:
    """Empty chunks of pixels."""
    return _png(before=_chunk(b"IDAT") * count)


def png_texts(count: int = 1_000, size: int = 1_000_000) -> bytes:
    """Compressed texts of a megabyte each."""
    return _png(before=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(size), 9)) * count)


def png_profile(size: int = 60_000_000) -> bytes:
    """A compressed colour profile of many megabytes."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    return _png(before=_chunk(b"iCCP", b"a\0\0" + packed))


def png_frames(count: int = 100_000) -> bytes:
    """An animation of many frames."""
    control = struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 10, 0, 0)
    behind = (_chunk(b"fcTL", control) + _chunk(b"fdAT", bytes(5))) * count
    return _png(before=_chunk(b"acTL", struct.pack(">II", count, 0)) + _chunk(b"fcTL", control), after=behind)


def png_exif(count: int = 10_000) -> bytes:
    """Tags in EXIF that all claim the same bytes."""
    return _png(before=_chunk(b"eXIf", tags(count)))


def _head(count: int, *, wide: bool) -> bytes:
    """The beginning of a TIFF file, up to the first of `count` tags; `wide`: as BigTIFF has it."""
    if wide:
        return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, count)
    return struct.pack("<2sHIH", b"II", 42, 8, count)


def tags(count: int, size: int = 300_000) -> bytes:
    """A directory of TIFF of about `size` bytes whose `count` tags all claim the same ones."""
    least = 14 + 12 * count
    size = max(1, size - least)
    entries = (struct.pack("<HHII", 700 + number, 7, size, least) for number in range(count))
    return _head(count, wide=False) + b"".join(entries) + bytes(4 + size)


def tiff_tags(count: int = 10_000, *, wide: bool = False) -> bytes:
    """A small picture whose tags all claim the same bytes."""
    size = 300_000
    own = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    own += [(278, 3, 1, 8), (279, 4, 1, 64)]
    odd = [(1000 + number, 7, size, 16) for number in range(count - len(own))]
    entry = "<HHQQ" if wide else "<HHII"
    rows = b"".join(struct.pack(entry, *row) for row in own + odd)
    return _head(count, wide=wide) + rows + bytes(8) + bytes(size)


def jpeg_scans(count: int = 4_000, side: int = 2_000) -> bytes:
    """A progressive JPEG with its last scan again and again."""
    plain = _encoded("JPEG", (side, side), progressive=True)
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * count + plain[-2:]


def jpeg_segments(count: int = 1_000_000) -> bytes:
    """Empty segments before the pixels."""
    plain = _encoded("JPEG")
    return plain[:2] + b"\xff\xed\0\2" * count + plain[2:]


def jpeg_filling(size: int = 20_000_000) -> bytes:
    """Filling bytes between two segments."""
    plain = _encoded("JPEG")
    return plain[:2] + b"\xff" * size + plain[2:]


def jpeg_exif(count: int = 5_000, segments: int = 100) -> bytes:
    """EXIF in many segments, whose tags all claim the same bytes."""
    plain, exif = _encoded("JPEG"), tags(count, 64_000 * segments)
    parts = (exif[at : at + 65_000] for at in range(0, len(exif), 65_000))
    held = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)
    return plain[:2] + held + plain[20:]


def jpeg_pictures(count: int = 5_000) -> bytes:
    """The directory of a file of several pictures, whose tags all claim the same bytes."""
    plain, held = _encoded("JPEG"), b"MPF\0" + tags(count, 65_000)
    return plain[:2] + b"\xff\xe2" + struct.pack(">H", len(held) + 2) + held + plain[2:]


_FIRST_FRAME = b"\x2c\0\0\0\0"


def gif_comment(size: int = 12_000_000) -> bytes:
    """A comment of megabytes."""
    plain = _encoded("GIF", mode="L")
    at = plain.index(_FIRST_FRAME)
    return plain[:at] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * (size // 255) + b"\0" + plain[at:]


def gif_extensions(count: int = 1_000_000) -> bytes:
    """Empty extensions before the picture."""
    plain = _encoded("GIF", mode="L")
    at = plain.index(_FIRST_FRAME)
    return plain[:at] + b"\x21\xff\0" * count + plain[at:]


def gif_frames(count: int = 100_000) -> bytes:
    """An animation of many frames."""
    plain = _encoded("GIF", (8, 8), mode="L")
    at = plain.index(_FIRST_FRAME)
    return plain[:at] + plain[at:-1] * count + b";"


def webp_exif(count: int = 10_000) -> bytes:
    """Tags in EXIF that all claim the same bytes."""
    return _encoded("WEBP", exif=b"Exif\0\0" + tags(count))


def avif_exif(count: int = 5_000) -> bytes:
    """Tags in EXIF that all claim the same bytes."""
    return _encoded("AVIF", exif=tags(count, 300_000))


def avif_boxes(count: int = 2_000_000) -> bytes:
    """Empty boxes behind the picture."""
    return _encoded("AVIF") + b"\0\0\0\x08free" * count


def huge_headers() -> Iterator[bytes]:
    """Headers of 16,383 x 16,383 pixels and more, without any."""
    yield _png()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + _png()[24:]
    webp = _encoded("WEBP", lossless=True)
    yield webp[:21] + struct.pack("<I", 0x0FFFFFFF) + webp[25:]
    yield struct.pack("<2sIIIIiiHHIIiiII", b"BM", 1000, 0, 54, 40, 2**20, 2**20, 1, 24, 0, 0, 0, 0, 0, 0)
    yield _encoded("GIF", mode="L").replace(struct.pack("<HHHH", 0, 0, 64, 64), b"\0\0\0\0" + b"\xff" * 4)


def bitmap_jumps(count: int = 1_000_000) -> bytes:
    """A bitmap with jumps that lead nowhere, which Pillow takes one by one; its structure is ordinary."""
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54 + 1024)
    head += struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, 0, 0, 0, 0, 0)
    return head + bytes(1024) + b"\0\2\0\0" * count


BOMBS: dict[str, Callable[..., bytes]] = {
    make.__name__: make
    for make in (
        png_chunks, png_chunks_behind, png_empty_pixels, png_texts, png_profile, png_frames, png_exif,
        tiff_tags, jpeg_scans, jpeg_segments, jpeg_filling, jpeg_exif, jpeg_pictures,
        gif_comment, gif_extensions, gif_frames, webp_exif, avif_exif, avif_boxes,
    )
}  # fmt: skip
BOMBS["big_tiff_tags"] = lambda: tiff_tags(wide=True)


@cache
def small_bombs() -> list[bytes]:
    """Of every kind one that is quick to send, and ordinary structures that take long."""
    few = {"png_profile": 5_000_000, "jpeg_filling": 500_000, "gif_comment": 500_000, "png_texts": 100}
    kept = (
        "tiff_tags",
        "big_tiff_tags",
        "jpeg_scans",
        "jpeg_exif",
        "jpeg_pictures",
        "webp_exif",
        "avif_exif",
        "png_exif",
    )
    made = [make() if name in kept else make(few.get(name, 30_000)) for name, make in BOMBS.items()]
    return [*made, *huge_headers(), bitmap_jumps(100_000)]
