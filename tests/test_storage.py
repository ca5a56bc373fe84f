"""Files: what a crash, a full disk, a hostile path or a broken image may do, and what it may not."""

import hashlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlcs import storage
from rlcs.errors import CheckpointError, DataError, ImageError, RunFolderError
from rlcs.records import ImageRef

LIMIT = 50_000_000


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decoded(data):
    ref = storage.image_from_bytes(data, limit=LIMIT, where="test")
    return storage.open_image(ref, limit=LIMIT)


def noise(width=64, height=48):
    return Image.frombytes("RGB", (width, height), hashlib.shake_256(b"noise").digest(width * height * 3))


def png_of_size(width, height):
    """A PNG that promises a size in its header and holds almost nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------ writing


def test_atomic_write_replaces_makes_folders_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new folder" / "ünï.txt"
    storage.atomic_write(path, "old")
    storage.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_works_for_the_longest_name_a_folder_takes(tmp_path):
    path = tmp_path / ("x" * 255)
    storage.atomic_write(path, "content")
    assert path.read_text() == "content"


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "weights.bin"
    storage.atomic_write(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunFolderError, match=r"cannot write 5,000 bytes.*\n.*bytes are free") as caught:
            storage.atomic_write(path, b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match="taken"):
        storage.atomic_write(tmp_path / "taken" / "x.json", "{}")


KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from rlcs import storage
path, point = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def kill_at(event, args):
    global seen
    if event in ("open", "os.rename", "os.remove") and str(path.parent) in str(args[0]):
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
sys.addaudithook(kill_at)
storage.atomic_write(path, b"new" * 100)
"""


def test_a_kill_at_any_point_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "state.json"
    outcomes = []
    for point in range(10):
        path.write_bytes(b"old" * 100)
        run = subprocess.run([sys.executable, "-c", KILLED_WRITE, str(path), str(point)], check=False)
        outcomes.append(path.read_bytes())
        if run.returncode == 0:
            break
    assert run.returncode == 0
    assert set(outcomes) == {b"old" * 100, b"new" * 100}


def test_json_goes_out_and_comes_back(tmp_path):
    content = {"a": [1, 2.5, None, True], "b": "\u2028 ü \ud800"}
    storage.write_json(tmp_path / "x.json", content)
    assert storage.read_json(tmp_path / "x.json") == content


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "x.json", {"loss": float("nan")})


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"", b"[" * 100_000])
def test_broken_json_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
        storage.read_json(tmp_path / "x.json")


def test_reading_opens_no_pipe_and_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="not a regular file"):
        storage.read_json(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="a folder"):
        storage.read_json(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        storage.read_json(tmp_path / "absent.json")


# ------------------------------------------------------------------------------ JSONL

json_rows = st.lists(
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(-(10**9), 10**9), st.none()))
)


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(json_rows, max_size=4))
def test_jsonl_goes_out_and_comes_back(tmp_path_factory, batches):
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    storage.append_jsonl(path, [])
    for rows in batches:
        storage.append_jsonl(path, rows)
    assert storage.read_jsonl(path) == [row for rows in batches for row in rows]


def test_jsonl_cut_at_any_byte_loses_only_its_last_row_and_can_be_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "text": "ä\n" * i} for i in range(3)]
    storage.append_jsonl(path, rows)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        whole = storage.read_jsonl(path)
        assert whole == rows[: len(whole)]
        assert len(whole) >= content[:cut].count(b"\n")
        storage.append_jsonl(path, [{"step": "next"}])
        assert storage.read_jsonl(path) == [*whole, {"step": "next"}]


def test_a_long_torn_tail_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 200_000)
    storage.append_jsonl(path, [{"c": 2}])
    assert path.read_bytes() == b'{"a": 1}\n{"c": 2}\n'


def test_a_bad_line_that_is_not_the_torn_last_one_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for content in (b'{"a": 1}\n{"b"\n{"c": 1}\n', b'{"a": 1}\n{"b"\n'):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl:2: torn or invalid JSON"):
            storage.read_jsonl(path)


def test_bom_crlf_blank_lines_and_line_separators_inside_texts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "1\xe2\x80\xa82"}\r\n\r\n{"a": 2}\r\n')
    assert storage.read_jsonl(path) == [{"a": "1\u20282"}, {"a": 2}]
    assert [number for number, _ in storage.jsonl_lines(path)] == [1, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "not list"),
        (b'{"a": 1', "column 8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_line_that_is_no_object_says_why(line, reason):
    with pytest.raises(ValueError, match=reason):
        storage.parse_object(line)


# ------------------------------------------------------------------------------ manifests


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step-000001"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "state.json").write_text("{}")
    storage.write_manifest(folder)
    return folder


def test_a_whole_folder_verifies_and_extra_files_do_not_matter(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    storage.verify_manifest(checkpoint)
    storage.write_manifest(checkpoint)
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(listed) == {"model/weights.safetensors", "state.json", "notes.txt"}


@pytest.mark.parametrize("name", ["model/weights.safetensors", "state.json"])
def test_every_damage_to_a_file_is_found_and_named(checkpoint, name):
    path = checkpoint / name
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    for damage in (b"", content[: len(content) // 2], content[:-1], content + b"x", flipped):
        path.write_bytes(damage)
        reason = "does not match its checksum" if damage == flipped else f"bytes instead of {len(content):,}"
        with pytest.raises(CheckpointError, match=f"{path.name}: the .*{reason}"):
            storage.verify_manifest(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: the file is missing"):
        storage.verify_manifest(checkpoint)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": {"state.json": 3}}',
        b'{"files": {"../outside": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"state.json": {"size": "x", "sha256": "0"}}}',
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(checkpoint, manifest):
    (checkpoint / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError, match="manifest"):
        storage.verify_manifest(checkpoint)


def test_a_folder_without_manifest_is_incomplete(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        storage.verify_manifest(checkpoint)


# ------------------------------------------------------------------------------ paths


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
            storage.image_from_path(path, root=root, limit=LIMIT)
    watching.clear()
    assert opened == []


def test_paths_inside_the_root_are_fine_however_they_are_written(tmp_path):
    root = tmp_path / "with space ü"
    (root / "a").mkdir(parents=True)
    (root / "real.png").write_bytes(b"")
    (root / "a" / "link.png").symlink_to("../real.png")
    for path in ("real.png", "a/../real.png", "./real.png", "a/link.png", str(root / "real.png")):
        assert storage.confined(root, path) == root / "real.png"


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
            storage.image_from_path(name, root=tmp_path, limit=LIMIT)
    with pytest.raises(ImageError, match="not a regular file"):
        storage.image_from_path("null", root=Path("/dev"), limit=LIMIT)


# ------------------------------------------------------------------------------ images


def test_a_reference_holds_size_and_checksum_of_the_file(tmp_path):
    data = encoded(noise(), "JPEG")
    (tmp_path / "x.jpg").write_bytes(data)
    ref = storage.image_from_path("x.jpg", root=tmp_path, limit=LIMIT)
    assert (ref.width, ref.height) == (64, 48)
    assert ref.sha256 == hashlib.sha256(data).hexdigest()
    assert ref.data is None
    assert ref.path == str(tmp_path / "x.jpg")
    image = storage.open_image(ref, limit=LIMIT)
    assert (image.mode, image.size) == ("RGB", (64, 48))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_six_formats_are_read(kind):
    image = decoded(encoded(noise(), kind))
    assert (image.mode, image.size) == ("RGB", (64, 48))


def test_a_bomb_is_refused_from_its_header():
    for width, height in ((20_000, 10_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1)):
        bomb = png_of_size(width, height)
        assert len(bomb) < 200
        with pytest.raises(ImageError, match=r"more than the limit of 50,000,000.*\n.*images\.decode_limit"):
            storage.image_from_bytes(bomb, limit=LIMIT, where="bomb.png")


def test_the_limit_is_the_recipes_and_not_pillows():
    ref = storage.image_from_bytes(png_of_size(20_000, 10_000), limit=200_000_000, where="large.png")
    assert (ref.width, ref.height) == (20_000, 10_000)
    with pytest.raises(ImageError, match="limit of 10"):
        storage.open_image(ref, limit=10)


def test_a_file_larger_than_its_pixels_could_ever_be_is_not_read(tmp_path):
    (tmp_path / "huge.png").write_bytes(encoded(noise()) + b"\0" * 100_000)
    with pytest.raises(ImageError, match="no image within the limit"):
        storage.image_from_path("huge.png", root=tmp_path, limit=64 * 48)


def test_absurd_shapes_are_refused_and_the_smallest_image_is_not():
    with pytest.raises(ImageError, match="200 times"):
        storage.image_from_bytes(encoded(Image.new("L", (1, 10_000))), limit=LIMIT, where="x")
    assert decoded(encoded(Image.new("L", (1, 200)))).size == (1, 200)
    assert decoded(encoded(Image.new("L", (1, 1)))).size == (1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_found_without_decoding_whole_ones(kind, share):
    data = encoded(noise(), kind)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        storage.image_from_bytes(data[: int(len(data) * share)], limit=LIMIT, where="x")


def test_a_truncated_jpeg_is_not_saved_by_its_thumbnail():
    thumbnail = encoded(noise(16, 16), "JPEG")
    data = encoded(noise(), "JPEG", comment=thumbnail)
    assert decoded(data).size == (64, 48)
    with pytest.raises(ImageError, match="truncated"):
        storage.image_from_bytes(data[: len(data) - 500], limit=LIMIT, where="x")


def test_a_damaged_middle_is_found_when_the_image_is_decoded():
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 0xFF
    ref = storage.image_from_bytes(bytes(data), limit=LIMIT, where="x")
    with pytest.raises(ImageError, match="damaged"):
        storage.open_image(ref, limit=LIMIT)


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
        (b"GIF89a\x00\x00\x00\x00\x00\x00\x00", "damaged|0 x 0"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "header is damaged"),
        (b"II*\x00\xff\xff\xff\x7f", "header is damaged"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(data, reason):
    with pytest.raises(ImageError, match=reason):
        storage.image_from_bytes(data, limit=LIMIT, where="x.png")


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
            storage.image_from_bytes(encoded(Image.new(mode, (8, 8)), "TIFF"), limit=LIMIT, where="x")


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_and_its_recorded_size(kind, orientation):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("red", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, exif=exif, **options)
    ref = storage.image_from_bytes(data, limit=LIMIT, where="x")
    assert (ref.width, ref.height) == ((16, 8) if orientation < 5 else (8, 16))
    shown = storage.open_image(ref, limit=LIMIT)
    right, bottom = ref.width - 1, ref.height - 1
    corners = {(0, 0): (1, 5), (right, 0): (2, 6), (right, bottom): (3, 7), (0, bottom): (4, 8)}
    red_at = [corner for corner in corners if shown.getpixel(corner)[1] < 100]
    assert [orientation in corners[corner] for corner in red_at] == [True]


def test_an_odd_orientation_is_ignored():
    exif = Image.Exif()
    exif[274] = 77
    assert decoded(encoded(noise(), "JPEG", exif=exif)).size == (64, 48)
    assert decoded(encoded(noise(), "JPEG", exif=b"Exif\0\0rubbish")).size == (64, 48)


def test_an_image_that_changed_since_it_was_read_is_noticed(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(noise()))
    ref = storage.image_from_path("x.png", root=tmp_path, limit=LIMIT)
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", (64, 48))))
    with pytest.raises(ImageError, match="changed"):
        storage.open_image(ref, limit=LIMIT)


def test_a_reference_with_a_wrong_size_is_noticed():
    data = encoded(noise())
    ref = ImageRef(sha256=hashlib.sha256(data).hexdigest(), width=48, height=64, data=data)
    with pytest.raises(ImageError, match="not as its header says"):
        storage.open_image(ref, limit=LIMIT)
