"""Images of strangers: refused by their structure, or decoded in a process that is killed."""

import io
import os
import signal
import threading
import time
import zlib

import pytest
from PIL import Image

from bench.bombs import BOMBS, bitmap_jumps, huge_headers, jpeg_scans
from bench.hostile import png
from conftest import draw
from rlcs.data import decoder as decoding
from rlcs.data.decoder import ImageDecoder
from rlcs.data.image_structure import MAX_SCANS, structural_fault
from rlcs.data.images import image_from_bytes, image_kind, measured, open_image
from rlcs.errors import ImageError, RlcsError

LIMIT = 25_000_000


def encoded(kind, size=(40, 24), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def decoder():
    with ImageDecoder() as made:
        yield made


# --- by structure -------------------------------------------------------------------------------


@pytest.mark.fault("images", "a file of absurd structure that is dear to decode", "refused with a sentence")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name):
    data, began = BOMBS[name](), time.process_time()
    with pytest.raises(ImageError) as caught:
        image_from_bytes(data, limit=LIMIT, where="x.png")
    assert time.process_time() - began < 3, "they took up to 200 seconds"
    assert str(caught.value).startswith("x.png: ") and caught.value.fix


@pytest.mark.fault("images", "a header that promises more pixels than allowed", "refused with a sentence")
@pytest.mark.parametrize("data", list(huge_headers()), ids=lambda data: image_kind(data))
def test_huge_headers_are_refused(data):
    with pytest.raises(ImageError, match=r"more than the limit|damaged"):
        image_from_bytes(data, limit=LIMIT, where="x")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}), ("JPEG", {"progressive": True}), ("GIF", {"comment": b"by hand" * 1000}), ("BMP", {}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw", "big_tiff": True}), ("WEBP", {}), ("AVIF", {}),
    ],
)  # fmt: skip
def test_ordinary_images_are_not_absurd(kind, options):
    exif = Image.Exif()
    exif[270], exif[274] = "a description " * 2000, 1
    options = options if kind in ("GIF", "BMP") else {**options, "exif": exif}
    data = encoded(kind, (400, 300), **options)
    assert not structural_fault(data, kind)
    assert measured(data, limit=LIMIT, where="x") == (400, 300)


def test_long_animations_and_many_scans_are_allowed_to_a_point():
    frames = [Image.new("L", (4, 4), each % 251) for each in range(500)]
    for kind in ("GIF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        assert not structural_fault(buffer.getvalue(), kind)
    assert not structural_fault(jpeg_scans(MAX_SCANS - 20, side=64), "JPEG")
    assert "100 scans" in structural_fault(jpeg_scans(MAX_SCANS, side=64), "JPEG")
    film = encoded("JPEG") + b"\xff\xda\0\2" * 1000
    assert not structural_fault(film, "JPEG"), "what follows an image is another matter"


# --- in a process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        ("PNG", "RGBA", {}), ("PNG", "I;16", {}), ("JPEG", "CMYK", {}), ("GIF", "P", {}), ("TIFF", "RGB", {}),
        ("WEBP", "RGBA", {}), ("BMP", "RGB", {}),
    ],
)  # fmt: skip
def test_the_process_decodes_as_we_do(decoder, kind, mode, options):
    data = encoded(kind, mode=mode, **options)
    ref = image_from_bytes(data, limit=LIMIT, where="x", measure=decoder.measured)
    assert ref == image_from_bytes(data, limit=LIMIT, where="x")
    assert decoder.open_image(ref).tobytes() == open_image(ref).tobytes()
    assert decoder.open_image(ref).size == (ref.width, ref.height)


def test_errors_are_the_same(decoder):
    damaged = [b"", b"no image", encoded("PNG")[:-30], encoded("GIF")[:-30], encoded("JPEG", (300, 1))]
    for data in (*damaged, BOMBS["tiff_tags"]()):
        with pytest.raises(ImageError) as ours:
            open_image(image_from_bytes(data, limit=LIMIT, where="a.png"))
        with pytest.raises(ImageError) as theirs:
            decoder.open_image(image_from_bytes(data, limit=LIMIT, where="a.png", measure=decoder.measured))
        assert str(theirs.value).partition("image ")[0] == str(ours.value).partition("image ")[0]


def tight(monkeypatch, setting):
    """Processes with another limit than the usual one."""
    program = f"from rlcs.data import decoder_process as process\nprocess.{setting}\nprocess.main()"
    monkeypatch.setattr(decoding, "PROGRAM", ("-c", program))


@pytest.mark.fault("images", "an image that takes seconds of CPU time to decode", "its process is killed")
def test_time_is_limited(monkeypatch, decoder):
    tight(monkeypatch, "_HEADER_S = 0.3")
    with pytest.raises(ImageError, match="x: it takes far longer"):
        decoder.measured(bitmap_jumps(1_000_000), limit=LIMIT, where="x")
    assert decoder.measured(encoded("PNG"), limit=LIMIT, where="x") == (40, 24), "by the next process"


@pytest.mark.fault("images", "an image that takes gigabytes to decode", "refused within the limit of memory")
def test_memory_is_limited(monkeypatch, decoder):
    tight(monkeypatch, "_MEMORY_BYTES, process._BYTES_PER_PIXEL = 200 << 20, 0")
    pixels = zlib.compress(bytes(6000 * 18_001), 1)
    ref = image_from_bytes(png(6000, 6000, pixels), limit=1 << 30, where="x")
    with pytest.raises(ImageError, match="too much memory"):
        decoder.open_image(ref)
    assert decoder.measured(encoded("PNG"), limit=LIMIT, where="x") == (40, 24)


@pytest.mark.fault("images", "the process that decodes is killed", "one image refused, the next by a new one")
def test_a_killed_process_is_replaced(decoder):
    assert decoder.measured(encoded("PNG"), limit=LIMIT, where="x") == (40, 24)
    os.kill(decoder._process.pid, signal.SIGKILL)
    with pytest.raises(ImageError, match="died"):
        decoder.measured(bytes(10_000_000), limit=LIMIT, where="x")
    assert decoder.open_image(draw(28, 28)).tobytes() == open_image(draw(28, 28)).tobytes()


@pytest.mark.fault("images", "the process that decodes stands still", "given up after a limit")
def test_a_stopped_process_is_given_up(monkeypatch, decoder):
    decoder.measured(encoded("PNG"), limit=LIMIT, where="x")
    monkeypatch.setattr(decoding, "PATIENCE_S", 0.3)
    os.kill(decoder._process.pid, signal.SIGSTOP)
    with pytest.raises(ImageError, match="SIGKILL"):
        decoder.measured(encoded("PNG"), limit=LIMIT, where="x")


def test_a_process_that_cannot_start_is_told(monkeypatch, decoder):
    monkeypatch.setattr(decoding, "PROGRAM", ("-c", "import nothing_of_this_name"))
    with pytest.raises(RlcsError, match=r"does not start: .*exit code 1"):
        decoder.measured(encoded("PNG"), limit=LIMIT, where="x")


def test_threads_share_a_decoder(decoder):
    refs, sizes = [draw(28 * (n + 1), 28) for n in range(8)], {}

    def read(ref):
        sizes[ref.sha256] = decoder.open_image(ref).size

    threads = [threading.Thread(target=read, args=(ref,)) for ref in refs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == {ref.sha256: (ref.width, ref.height) for ref in refs}
