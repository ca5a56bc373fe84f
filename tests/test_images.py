"""Images: what a broken, hostile or unusual file may do, and what it may not."""

import hashlib
import io
import os
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from rlcs.data import images
from rlcs.errors import DataError, ImageError
from rlcs.recipe.schema import Images
from rlcs.records import ImageRef

LIMIT = 50_000_000


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decoded(data):
    ref = images.image_from_bytes(data, limit=LIMIT, where="test")
    return images.open_image(ref, limit=LIMIT)


def noise(width=64, height=48):
    return Image.frombytes("RGB", (width, height), hashlib.shake_256(b"noise").digest(width * height * 3))


def png_of_size(width, height):
    """A PNG that promises a size in its header and holds almost nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.fault("images", "paths that leave the folder of the images", "refused before anything is opened")
def test_paths_that_leave_the_root_are_refused_before_anything_is_opened(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(noise()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "data-next-door").mkdir()
    opened = []
    watching = [True]
    sys.addaudithook(lambda event, args: opened.append(args[0]) if watching and event == "open" else None)
    hostile = [
        "../secret.png",
        "a/../../secret.png",
        str(tmp_path / "secret.png"),
        "/etc/passwd",
        "link.png",
        "../data-next-door",
        "\\\\host\\share",
        "a\0b",
        "",
        "\ud800",
        "http://127.0.0.1/x.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
    ]
    for path in hostile:
        with pytest.raises(DataError):
            images.image_from_path(path, root=root, limit=LIMIT)
    watching.clear()
    assert opened == []


@pytest.mark.fault("images", "devices, pipes, folders, missing files", "refused with a sentence")
def test_devices_pipes_folders_and_missing_files_are_not_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("pipe.png", "not a regular file"),
        ("folder.png", "not a regular file"),
        ("absent.png", "missing"),
        ("n" * 300, "File name too long"),
    ):
        with pytest.raises(ImageError, match=reason):
            images.image_from_path(name, root=tmp_path, limit=LIMIT)
    with pytest.raises(ImageError, match="not a regular file"):
        images.image_from_path("null", root=Path("/dev"), limit=LIMIT)


def test_a_reference_holds_size_and_checksum_of_the_file(tmp_path):
    data = encoded(noise(), "JPEG")
    (tmp_path / "x.jpg").write_bytes(data)
    ref = images.image_from_path("x.jpg", root=tmp_path, limit=LIMIT)
    assert (ref.width, ref.height) == (64, 48)
    assert ref.sha256 == hashlib.sha256(data).hexdigest()
    assert ref.data is None
    assert ref.path == str(tmp_path / "x.jpg")
    image = images.open_image(ref, limit=LIMIT)
    assert (image.mode, image.size) == ("RGB", (64, 48))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_six_formats_are_read(kind):
    image = decoded(encoded(noise(), kind))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert images.image_kind(encoded(noise(), kind)) == kind.lower()


def test_a_bomb_is_refused_from_its_header():
    for width, height in ((20_000, 10_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1)):
        bomb = png_of_size(width, height)
        assert len(bomb) < 200
        with pytest.raises(ImageError, match=r"more than the limit of 50,000,000.*\n.*images\.decode_limit"):
            images.image_from_bytes(bomb, limit=LIMIT, where="bomb.png")


def test_the_limit_is_the_recipes_and_not_pillows():
    ref = images.image_from_bytes(png_of_size(20_000, 10_000), limit=200_000_000, where="large.png")
    assert (ref.width, ref.height) == (20_000, 10_000)
    with pytest.raises(ImageError, match="limit of 10"):
        images.open_image(ref, limit=10)


def test_a_file_larger_than_its_pixels_could_ever_be_is_not_read(tmp_path):
    (tmp_path / "huge.png").write_bytes(encoded(noise()) + b"\0" * 100_000)
    with pytest.raises(ImageError, match="no image within the limit"):
        images.image_from_path("huge.png", root=tmp_path, limit=64 * 48)


@pytest.mark.fault("images", "absurd shapes", "refused")
def test_absurd_shapes_are_refused_and_the_smallest_image_is_not():
    with pytest.raises(ImageError, match="200 times"):
        images.image_from_bytes(encoded(Image.new("L", (1, 10_000))), limit=LIMIT, where="x")
    assert decoded(encoded(Image.new("L", (1, 200)))).size == (1, 200)
    assert decoded(encoded(Image.new("L", (1, 1)))).size == (1, 1)


@pytest.mark.fault("images", "an image that is cut off", "found without decoding it")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_found_without_decoding_whole_ones(kind, share):
    data = encoded(noise(), kind)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        images.image_from_bytes(data[: int(len(data) * share)], limit=LIMIT, where="x")


def test_a_truncated_jpeg_is_not_saved_by_its_thumbnail():
    thumbnail = encoded(noise(16, 16), "JPEG")
    data = encoded(noise(), "JPEG", comment=thumbnail)
    assert decoded(data).size == (64, 48)
    with pytest.raises(ImageError, match="truncated"):
        images.image_from_bytes(data[: len(data) - 500], limit=LIMIT, where="x")


def test_a_damaged_middle_is_found_when_the_image_is_decoded():
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 0xFF
    ref = images.image_from_bytes(bytes(data), limit=LIMIT, where="x")
    with pytest.raises(ImageError, match="damaged"):
        images.open_image(ref, limit=LIMIT)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just a text named .png", "not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "header is damaged"),
        (b"\xff\xd8\xff\xe0", "header is damaged"),
        (b"\0\0\0\x20ftypavif" + b"\0" * 20, "header is damaged"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 20, "header is damaged|another package"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 20, "not a PNG"),
        (b"GIF89a\x00\x00\x00\x00\x00\x00\x00", "damaged|0 x 0"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "header is damaged"),
        (b"II*\x00\xff\xff\xff\x7f", "header is damaged"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(data, reason):
    with pytest.raises(ImageError, match=reason):
        images.image_from_bytes(data, limit=LIMIT, where="x.png")


@pytest.mark.fault("images", "random bytes behind an image's beginning", "a sentence, nothing else")
@pytest.mark.filterwarnings("ignore:::PIL")
@settings(deadline=None)
@given(data=st.binary(max_size=60), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
def test_hostile_bytes_raise_image_errors_and_nothing_else(data, kind):
    whole = encoded(Image.new("RGB", (8, 8), "red"), kind)
    for hostile in (whole[:12] + data, whole[:-20] + data, whole[:30] + data + whole[30:]):
        try:
            decoded(hostile)
        except ImageError:
            continue


def test_cmyk_palette_and_gray_become_rgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert decoded(encoded(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    cmyk = decoded(encoded(red.convert("CMYK"), "JPEG", quality=95)).getpixel((0, 0))
    assert all(abs(a - b) < 12 for a, b in zip(cmyk, (255, 0, 0), strict=True))
    assert decoded(encoded(red.convert("P"))).getpixel((0, 0)) == (255, 0, 0)
    assert decoded(encoded(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_gray_keeps_its_shades():
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 0x8000, 0xFFFF)):
        image.putpixel((x, 0), value)
    shown = decoded(encoded(image))
    assert [shown.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_thirty_two_bit_gray_is_refused():
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match="32-bit gray"):
            images.image_from_bytes(encoded(Image.new(mode, (8, 8)), "TIFF"), limit=LIMIT, where="x")


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert decoded(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(encoded(clear.convert("LA"))).getpixel((0, 0)) == (255, 255, 255)
    half = decoded(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))).getpixel((0, 0))
    assert half == (127, 127, 127)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    assert decoded(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(encoded(palette, transparency=b"\x00\xff")).getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_photograph_with_several_pictures_is_its_first():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert images.image_kind(data) == "jpeg"
    assert decoded(data).getpixel((0, 0))[0] > 240


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_and_its_recorded_size(kind, orientation):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("red", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, exif=exif, **options)
    ref = images.image_from_bytes(data, limit=LIMIT, where="x")
    assert (ref.width, ref.height) == ((16, 8) if orientation < 5 else (8, 16))
    shown = images.open_image(ref, limit=LIMIT)
    right, bottom = ref.width - 1, ref.height - 1
    corners = {(0, 0): (1, 5), (right, 0): (2, 6), (right, bottom): (3, 7), (0, bottom): (4, 8)}
    red_at = [corner for corner in corners if shown.getpixel(corner)[1] < 100]
    assert [orientation in corners[corner] for corner in red_at] == [True]


def test_an_odd_orientation_is_ignored():
    exif = Image.Exif()
    exif[274] = 77
    assert decoded(encoded(noise(), "JPEG", exif=exif)).size == (64, 48)
    assert decoded(encoded(noise(), "JPEG", exif=b"Exif\0\0rubbish")).size == (64, 48)


@pytest.mark.fault("images", "an image changed since it was read", "noticed")
def test_an_image_that_changed_since_it_was_read_is_noticed(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(noise()))
    ref = images.image_from_path("x.png", root=tmp_path, limit=LIMIT)
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", (64, 48))))
    with pytest.raises(ImageError, match="changed"):
        images.open_image(ref, limit=LIMIT)


def test_a_reference_with_a_wrong_size_is_noticed():
    data = encoded(noise())
    ref = ImageRef(sha256=hashlib.sha256(data).hexdigest(), width=48, height=64, data=data)
    with pytest.raises(ImageError, match="not as its header says"):
        images.open_image(ref, limit=LIMIT)


def test_an_image_that_was_not_kept_says_so():
    with pytest.raises(ImageError, match="not kept"):
        images.open_image(ImageRef(sha256="0" * 64, width=1, height=1))


def test_what_was_admitted_within_a_limit_opens_without_naming_it(tmp_path):
    (tmp_path / "padded.png").write_bytes(encoded(noise(64, 48)) + b"\0" * 100_000)
    ref = images.image_from_path("padded.png", root=tmp_path, limit=LIMIT)
    assert images.open_image(ref).size == (64, 48)
    wide = encoded(Image.new("1", (8000, 7000)))
    large = images.image_from_bytes(wide, limit=8000 * 7000, where="x")
    assert images.open_image(large).size == (8000, 7000)


# ------------------------------------------------------------------------------ what cameras and tools write


def heif(image, **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, **options)
    return buffer.getvalue()


def needs_avif():
    if not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")


def test_photos_of_phones_are_read():
    needs_avif()
    for data, kind in ((heif(noise()), "heic"), (encoded(noise(), "AVIF"), "avif")):
        image = decoded(data)
        assert (image.mode, image.size) == ("RGB", (64, 48))
        assert images.image_kind(data) == kind
        with pytest.raises(ImageError, match="truncated"):
            images.image_from_bytes(data[: len(data) * 9 // 10], limit=LIMIT, where="x")


def test_whole_photos_of_phones_are_not_decoded_to_be_measured(monkeypatch):
    needs_avif()
    data = [heif(noise()), encoded(noise(), "AVIF")]
    monkeypatch.setattr(images, "_decoded", None)
    assert [images.image_from_bytes(each, limit=LIMIT, where="x").width for each in data] == [64, 64]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_photos_of_phones_too(orientation):
    needs_avif()
    image = Image.new("RGB", (64, 32), "white")
    image.paste("red", (0, 0, 32, 16))
    tags = Image.Exif()
    tags[274] = orientation
    exif = tags.tobytes()
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    photo = pillow_heif.from_pillow(image)
    photo.info["exif"] = exif
    photo.save(buffer, quality=95)
    for data in (encoded(image, "AVIF", exif=exif), encoded(image, "JPEG", exif=exif), buffer.getvalue()):
        ref = images.image_from_bytes(data, limit=LIMIT, where="x")
        shown = images.open_image(ref)
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, "JPEG", exif=exif))))
        assert (ref.width, ref.height) == shown.size == turned.size, images.image_kind(data)
        spots = [(x, y) for x in (5, ref.width - 6) for y in (5, ref.height - 6)]
        red = [[picture.getpixel(spot)[1] < 100 for spot in spots] for picture in (shown, turned)]
        assert red[0] == red[1], images.image_kind(data)


def test_a_photo_that_needs_another_package_names_it(monkeypatch):
    data = heif(noise())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC.*\n  -> pip install pillow-heif"):
        images.image_from_bytes(data, limit=LIMIT, where="x.heic")
    monkeypatch.setattr(features, "check", lambda name: False)
    if Image.registered_extensions().get(".avif"):
        with pytest.raises(ImageError, match="reads no AVIF"):
            images.image_from_bytes(encoded(noise(), "AVIF"), limit=LIMIT, where="x.avif")


def test_an_image_that_other_tools_do_not_read_is_passed_on_as_png():
    for data, kind in (
        (heif(noise()), "png"),
        (encoded(noise(), "TIFF"), "png"),
        (encoded(noise(), "JPEG"), "jpeg"),
    ):
        ref = images.image_from_bytes(data, limit=LIMIT, where="x")
        portable = images.portable_image(ref)
        assert images.image_kind(portable) == kind and decoded(portable).tobytes() == decoded(data).tobytes()
        assert portable == data or kind == "png"


def test_a_photo_of_a_hundred_megapixels_is_read_at_a_reduced_scale():
    whole = Image.linear_gradient("L").resize((10_240, 9_001)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(whole, "JPEG", exif=exif, quality=80)
    ref = images.image_from_bytes(data, limit=images.DECODE_LIMIT, where="x.jpg")
    assert (ref.width, ref.height) == (9_001, 10_240)
    shown = images.open_image(ref)
    assert shown.size == (4_501, 5_120) and shown.width * shown.height > 16_777_216
    left, right = (shown.getpixel((x, 2_000))[0] for x in (4_400, 100))
    assert left < 30 and right > 225


def test_an_ordinary_photo_is_decoded_in_full_and_within_the_limit():
    ref = images.image_from_bytes(
        encoded(Image.new("L", (6_000, 4_000)), "JPEG"), limit=200_000_000, where="x"
    )
    assert images.open_image(ref).size == (6_000, 4_000)
    assert Images().decode_limit == images.DECODE_LIMIT == 200_000_000


def test_animations_are_their_first_frame_in_every_format():
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    kinds = ["GIF", "WEBP", "PNG", "TIFF", *(["AVIF"] if features.check("avif") else [])]
    for kind in kinds:
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = decoded(data).getpixel((5, 5))
        assert red > 240 and green < 20 and blue < 20, kind
