"""Refuses image files with absurd structures, by walking over their bytes before a decoder sees them.

A file of a few kilobytes may hold thousands of scans, tags that all claim the same bytes, or a comment that
takes minutes to put together. Decoders handle each of them one by one; nobody's photo or drawing has them.
"""

import re
from collections.abc import Callable, Iterator
from typing import Literal

MAX_PARTS = 4_096
"""Most chunks, segments, extensions or boxes of a file beside its pixels, and most tags of a directory."""
MAX_FRAMES = 10_000
MAX_SCANS = 100
"""Most scans of a JPEG; progressive ones have about ten, and every scan passes over all pixels."""
MAX_COMMENT_BYTES = 1 << 18
MAX_JUNK_BYTES = 1 << 16
_MEAN_BYTES = 64
"""Pieces of pixels have at least so many bytes on average, beyond the first `MAX_PARTS`."""
_CLAIMED = 4
"""How often all bytes of a directory may be claimed by its tags; once is right, a broken tag claims more."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_EXIF = re.compile(rb"II(\*\0..\0\0|\+\0\x08\0\0\0)|MM\0(\*\0\0..|\+\0\x08\0\0)", re.DOTALL)
"""How a block of EXIF begins, whose directory is within its first 64 KiB; eight bytes, so that pixels hardly
ever look like it."""
_VALUE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
"""Bytes of a value, by the number of its type."""


def structural_fault(data: bytes, kind: str) -> str:
    """What is absurd about a file of a format (`PNG`, `JPEG`, ...), or "". Damaged files may pass."""
    walk = _WALKS.get(kind)
    return next(walk(data), "") if walk else ""


def _tags(tiff: bytes) -> Iterator[str]:
    """The first directory of a TIFF file, or of an EXIF block, which is one."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    is_big = number(2, 2) == 43
    word, width, tag = (8, 8, 20) if is_big else (4, 2, 12)  # bytes of an offset, of the count, of a tag
    start = number(word, word)
    count, claimed = number(start, width), 0
    yield from _too_many(count, MAX_PARTS, "tags")
    for at in range(start + width, start + width + count * tag, tag):
        kind, offset = number(at + 2, 2), number(at + 4 + word, word)
        size = number(at + 4, word) * (_VALUE_BYTES[kind] if kind < len(_VALUE_BYTES) else 0)
        claimed += min(size, max(0, len(tiff) - offset)) if size > word else 0
    if claimed > _CLAIMED * len(tiff) + MAX_JUNK_BYTES:
        yield f"its tags claim {claimed:,} bytes of {len(tiff):,}"


def _too_many(count: int, most: int, what: str) -> Iterator[str]:
    if count > most:
        yield f"it has more than {most:,} {what}"


def _png(data: bytes) -> Iterator[str]:
    at, parts, frames, pieces = 8, 0, 0, 0
    while at + 12 <= len(data):
        kind, size = data[at + 4 : at + 8], int.from_bytes(data[at : at + 4], "big")
        frames += kind == b"fcTL"
        pieces += kind in (b"IDAT", b"fdAT")
        parts += kind not in (b"IDAT", b"fdAT", b"fcTL")
        yield from _too_many(frames, MAX_FRAMES, "frames")
        yield from _too_many(parts, MAX_PARTS, "chunks beside its pixels")
        yield from _too_many(pieces, MAX_PARTS + len(data) // _MEAN_BYTES, "chunks of pixels")
        if kind == b"eXIf":
            yield from _tags(data[at + 8 : at + 8 + size])
        if kind == b"IEND":
            break
        at += 12 + size


def _jpeg(data: bytes) -> Iterator[str]:
    """Until the end of the image: what follows may be a film, or further pictures."""
    at, parts, scans, junk = 2, 0, 0, 0
    joined = {b"Exif\0\0": bytearray(), b"MPF\0": bytearray()}
    while found := _MARKER.search(data, at):
        marker, size = found[0][1], int.from_bytes(data[found.end() : found.end() + 2], "big")
        junk += found.start() - at if not scans else 0
        if marker in (0xD8, 0x01):
            at = found.end()
        elif marker == 0xD9:
            break
        else:
            at = found.end() + max(size, 2)
        parts, scans = parts + 1, scans + (marker == 0xDA)
        held = data[found.end() + 2 : at] if marker in (0xE1, 0xE2) else b""
        for mark, block in joined.items():
            block.extend(held[len(mark) :] if held.startswith(mark) else b"")
        yield from _too_many(scans, MAX_SCANS, "scans")
        yield from _too_many(parts, MAX_PARTS, "segments")
        yield from _too_many(junk, MAX_JUNK_BYTES, "bytes between its segments")
    else:
        yield from _too_many(len(data) - at if not scans else 0, MAX_JUNK_BYTES, "bytes between its segments")
    for block in joined.values():
        yield from _tags(bytes(block))


def _gif(data: bytes) -> Iterator[str]:
    at, parts, frames, pieces, words = 13 + _palette(data, 10), 0, 0, 0, 0
    while at < len(data) and data[at] in b"\x21\x2c":
        is_comment = data[at : at + 2] == b"\x21\xfe"
        if data[at] == 0x2C:
            at, frames = at + 11 + _palette(data, at + 9), frames + 1
        else:
            at, parts = at + 2, parts + 1
        begun = at
        while at < len(data) and (size := data[at]):
            at, pieces = at + 1 + size, pieces + 1
            yield from _too_many(pieces, MAX_PARTS + len(data) // _MEAN_BYTES, "blocks")
        at += 1
        words += at - begun if is_comment else 0
        yield from _too_many(frames, MAX_FRAMES, "frames")
        yield from _too_many(parts - frames, MAX_PARTS, "extensions beside its frames")
        yield from _too_many(words, MAX_COMMENT_BYTES, "bytes of comments")


def _palette(data: bytes, at: int) -> int:
    """Bytes of the palette that the flags at a place announce."""
    flags = data[at] if at < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(data: bytes) -> Iterator[str]:
    at, parts, frames = 12, 0, 0
    while at + 8 <= len(data):
        frames += data[at : at + 4] == b"ANMF"
        parts += data[at : at + 4] != b"ANMF"
        yield from _too_many(frames, MAX_FRAMES, "frames")
        yield from _too_many(parts, MAX_PARTS, "chunks beside its frames")
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            yield from _tags(data[at + 8 : at + 8 + size].removeprefix(b"Exif\0\0"))
        at += 8 + size + size % 2


def _boxes(data: bytes) -> Iterator[str]:
    at, parts = 0, 0
    while at + 8 <= len(data):
        parts += 1
        yield from _too_many(parts, MAX_PARTS, "boxes")
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        at += max(size, 8) if size else len(data)
    for found in _EXIF.finditer(data):
        yield from _tags(data[found.start() :])


_WALKS: dict[str, Callable[[bytes], Iterator[str]]] = {
    "PNG": _png, "JPEG": _jpeg, "GIF": _gif, "TIFF": _tags, "WEBP": _webp, "AVIF": _boxes, "HEIC": _boxes,
}  # fmt: skip
