"""The only room that touches disk dangerously: atomic writes, manifests, confined paths, bounded images.

A file written here is either the old one or the new one, whatever moment a crash picks. A path that a
data set names may not leave its folder. An image is measured from its header before a pixel of it is
decoded, and a decode is checked against the size and checksum that were recorded.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcs.errors import CheckpointError, DataError, ImageError, RunFolderError
from rlcs.records import ImageRef

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MANIFEST = "manifest.json"
"""Written last: a folder that has a valid one is complete."""
MAX_ASPECT = 200
"""Longest side over shortest; Qwen's image processor refuses more."""
_BYTES_PER_PIXEL = 8
"""No sane file is larger than its pixels as 16-bit RGBA, so this bounds what is read into memory."""
_BOM = b"\xef\xbb\xbf"
_KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"))

# ---------------------------------------------------------------------------------- writing


def fsync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, size: int, error: Exception) -> RunFolderError:
    """Why `size` bytes did not get to `path`, and how much room there is."""
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    except OSError:
        free = "the folder cannot be read either"
    return RunFolderError(
        f"cannot write {size:,} bytes: {getattr(error, 'strerror', None) or error}",
        where=str(path),
        fix=f"make room or write elsewhere ({free}); the previous version is untouched",
    )


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8) in one step; missing folders are made.

    Written aside in the same folder, fsynced, renamed, and the folder fsynced. Raises
    RunFolderError, with the old file untouched, when the disk is full or not writable.
    """
    # A lone surrogate becomes \udXXX, which inside JSON is the very same character.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    aside = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise cannot_write(path, len(data), error) from error
    finally:
        if aside.exists():
            aside.unlink()


def open_to_readers(folder: Path) -> None:
    """Let others read the weights in a folder who may read the folder: a server, say.

    safetensors leaves what it writes to its owner alone.
    """
    for path in folder.rglob("*.safetensors"):
        open_as_its_folder(path)


def open_as_its_folder(path: Path) -> None:
    """Let those read and write a file who may read and write its folder."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_json(path: Path, obj: object) -> None:
    """Write `obj` as indented JSON, atomically. Raises ValueError on NaN: JSON has none."""
    atomic_write(path, json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append one JSON object a line and flush to disk; a torn tail of a crashed writer is cut off first.

    Raises RunFolderError when the disk is full: what was complete before stays readable.
    """
    lines = [json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    data = "".join(lines).encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _mend_tail(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, len(data), error) from error


def _mend_tail(file: Any) -> None:
    """End an open JSONL file on a line end: finish a whole last line, cut off a torn one."""
    end = file.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    rest = tail.rpartition(b"\n")[2]
    if not rest:
        return
    try:
        parse_object(rest)
    except ValueError:
        file.truncate(end - len(rest))
    else:
        file.write(b"\n")


# ---------------------------------------------------------------------------------- reading


def require_regular(path: Path) -> None:
    """Raise DataError unless `path` is a regular file; a pipe or device is never opened to find out."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), fix="check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="check the path") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise DataError(f"this is {kind}", where=str(path), fix="name a file")


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises DataError for anything else."""
    require_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="check its permissions") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file (UTF-8, with or without BOM). Raises DataError."""
    try:
        return json.loads(read_regular(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", where=str(path), fix="correct or delete it") from error


def parse_object(line: bytes) -> dict[str, Any]:
    """One JSON object from one line of a JSONL file. Raises ValueError saying what is wrong."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"torn or invalid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a line must hold a JSON object, not {type(value).__name__}")
    return value


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and lines of a JSONL file, blank ones left out; BOM and CRLF are fine.

    Lines end at line feeds alone, so that a U+2028 inside a text does not cut it. Raises DataError.
    """
    for number, line in enumerate(read_regular(path).removeprefix(_BOM).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every row of a JSONL file that rlcs wrote.

    A last line without a line end that does not parse is what a crash leaves, and is dropped; any
    other bad line raises DataError with its number.
    """
    content = read_regular(path).removeprefix(_BOM).split(b"\n")
    rows = []
    for number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_object(line))
        except ValueError as error:
            if number < len(content):
                raise DataError(
                    str(error), where=f"{path}:{number}", fix="correct or delete this line"
                ) from error
    return rows


# ---------------------------------------------------------------------------------- manifests


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Record name, size and SHA-256 of every file below `folder` in `manifest.json`, written last.

    The files are fsynced first, since a library may have written them; hidden files are left out.
    """
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() != MANIFEST and not any(p.startswith(".") for p in name.parts):
            entries[name.as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            fsync(path)
        elif path.is_dir():
            fsync(path)
    write_json(folder / MANIFEST, {"files": entries})


def verify_manifest(folder: Path) -> None:
    """Check that every file named in the manifest is there, whole and unchanged.

    Raises CheckpointError naming the first file that is not.
    """
    where = folder / MANIFEST
    try:
        files = read_json(where)["files"].items()
        wanted = [(confined(folder, name), int(e["size"]), str(e["sha256"])) for name, e in files]
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the manifest cannot be used: {getattr(error, 'what', error)}",
            where=str(where),
            fix="the folder is incomplete; go on from another checkpoint",
        ) from error
    for path, size, digest in wanted:
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            reason = "the file is missing"
        elif found != size:
            reason = f"the file has {found:,} bytes instead of {size:,}"
        elif _sha256(path) != digest:
            reason = "the content does not match its checksum"
        else:
            continue
        raise CheckpointError(reason, where=str(path), fix="it is damaged; go on from another checkpoint")


# ---------------------------------------------------------------------------------- paths


def confined(root: Path, path: str | Path) -> Path:
    """The real path of `path` below `root` (relative to it, or absolute inside it). Opens nothing.

    Raises DataError for a path that leaves `root` through `..`, a symbolic link or an absolute
    name, and for what only looks like a path: URLs, Windows paths, empty names.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise DataError("the path is empty or holds a NUL", where=repr(text), fix="name a file")
    if "\\" in text:
        raise DataError("the path has backslashes", where=text, fix="write it with / and relative")
    if "://" in text or text.startswith("data:"):
        raise DataError("this is a URL, not a path", where=text[:80], fix="download it beside the data file")
    try:
        base = Path(os.path.realpath(root))
        target = Path(os.path.realpath(base / text))
    except (OSError, ValueError) as error:
        raise DataError(
            f"this path cannot be used: {error}", where=repr(text), fix="rename the file"
        ) from error
    if not target.is_relative_to(base):
        raise DataError(f"the path leaves {base}", where=text, fix="move the file into that folder")
    return target


# ---------------------------------------------------------------------------------- images


def image_from_path(path: str, *, root: Path, limit: int) -> ImageRef:
    """A reference to the image file `path` below `root`, its header checked.

    `limit` is in pixels. Raises ImageError, or DataError for a path that leaves `root`.
    """
    target = confined(root, path)
    data = _read_image(target, where=path, limit=limit)
    width, height = _measured(data, limit=limit, where=path)
    return ImageRef(sha256=hashlib.sha256(data).hexdigest(), width=width, height=height, path=str(target))


def image_from_bytes(data: bytes, *, limit: int, where: str) -> ImageRef:
    """A reference that holds an encoded image, its header checked.

    `limit` is in pixels; `where` names the image in errors. Raises ImageError.
    """
    width, height = _measured(data, limit=limit, where=where)
    return ImageRef(sha256=hashlib.sha256(data).hexdigest(), width=width, height=height, data=data)


def _measured(data: bytes, *, limit: int, where: str) -> tuple[int, int]:
    """Width and height from the header; pixels are decoded only if the file looks cut short."""
    size = _shown_size(_opened(data, limit=limit, where=where))
    if _looks_cut(data):
        _decoded(data, limit=limit, where=where)
    return size


def open_image(ref: ImageRef, *, limit: int) -> "Image":
    """Decode an image fully, as RGB of `ref.width` x `ref.height` pixels.

    Turned as its EXIF asks, transparency on white, CMYK converted, 16-bit gray scaled to 8 bits, and
    of an animation the first frame. Raises ImageError if it is damaged, or not what `ref` describes.
    """
    where = ref.path or f"image {ref.sha256[:12]}"
    result = _decoded(encoded_image(ref, limit=limit), limit=limit, where=where)
    if result.size != (ref.width, ref.height):
        raise ImageError(f"decoded to {result.size}, not as its header says", where=where, fix="replace it")
    return result


def encoded_image(ref: ImageRef, *, limit: int) -> bytes:
    """The file's own bytes, the very ones that `ref` describes. `limit` is in pixels. Raises ImageError."""
    where = ref.path or f"image {ref.sha256[:12]}"
    data = ref.data
    if data is None:
        data = _read_image(Path(ref.path or ""), where=where, limit=limit)
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ImageError("the image changed after it was first read", where=where, fix="load the data again")
    return data


def image_kind(data: bytes) -> str:
    """The format of an encoded image by its first bytes, as in `image/png` and in file names."""
    return next((name for start, name in _KINDS if data.startswith(start)), "tiff")


def _decoded(data: bytes, *, limit: int, where: str) -> "Image":
    image = _opened(data, limit=limit, where=where)
    turn = _turn(image)
    try:
        image.load()
        result = _rgb(image)
        return result if turn is None else result.transpose(turn)
    except Exception as error:  # a decoder fed with hostile bytes may raise anything at all
        raise ImageError(f"damaged or truncated: {error}", where=where, fix="replace the image") from error


def _read_image(path: Path, *, where: str, limit: int) -> bytes:
    try:
        info = path.stat()
    except FileNotFoundError as error:
        raise ImageError("the image is missing", where=where, fix=f"expected at {path}") from error
    except OSError as error:
        raise ImageError(f"the image cannot be read: {error.strerror}", where=where) from error
    if not stat.S_ISREG(info.st_mode):
        raise ImageError("not a regular file", where=where, fix="name an image file")
    if info.st_size > limit * _BYTES_PER_PIXEL:
        raise ImageError(f"a file of {info.st_size:,} bytes is no image within the limit", where=where)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"the image cannot be read: {error.strerror}", where=where) from error


def _opened(data: bytes, *, limit: int, where: str) -> "ImageFile":
    """Parse an image's header and check what it promises, before any pixel is decoded."""
    if not data:
        raise ImageError("the image is empty (0 bytes)", where=where, fix="replace it")
    try:
        image = _parsed(data)
    except Exception as error:  # see open_image
        raise ImageError(f"the image header is damaged: {error}", where=where, fix="replace it") from error
    if image is None:
        known = "a PNG, JPEG, WebP, GIF, BMP or TIFF"
        raise ImageError(f"not {known} file", where=where, fix="convert the image, or correct the path")
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ImageError(f"{width} x {height} pixels", where=where, fix="replace it")
    if width * height > limit:
        raise ImageError(
            f"{width:,} x {height:,} pixels are more than the limit of {limit:,}",
            where=where,
            fix="shrink the image, or raise images.decode_limit",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{width:,} x {height:,} pixels: one side is more than {MAX_ASPECT} times the other",
            where=where,
            fix="crop the image",
        )
    if image.mode in ("I", "F"):
        raise ImageError("32-bit gray has no agreed white", where=where, fix="save it with 8 or 16 bits")
    return image


def _parsed(data: bytes) -> "ImageFile | None":
    """Pillow's reader for the file's first bytes, or None for a format that is not read.

    Readers are called by name: `Image.open` would try every format it knows (PostScript included)
    and has a size limit of its own, far from ours and global to the process.
    """
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    file = BytesIO(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(file)
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(file)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    if data.startswith(b"GIF8"):
        return GifImagePlugin.GifImageFile(file)
    if data.startswith((b"II*\0", b"MM\0*")):
        return TiffImagePlugin.TiffImageFile(file)
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(file)
    return None


def _looks_cut(data: bytes) -> bool:
    """Whether the end mark of a PNG, JPEG or WebP is absent; the rarer formats have none to trust."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"\xff\xd8"):  # an end of image after the last start of scan: not a thumbnail's
        return data.find(b"\xff\xd9", max(data.rfind(b"\xff\xda"), 0)) < 0
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return True


def _turn(image: "ImageFile") -> Any:
    """The transposition that brings an image upright (EXIF tag 274), or None if it is."""
    from PIL.Image import Transpose as T

    # Pillow turns a TIFF by itself, and would decode a PNG to look for EXIF behind the pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return None
    try:
        orientation = image.getexif().get(274, 1)
    except Exception:  # a broken EXIF block is no reason to refuse the picture
        return None
    turns = [None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM]
    turns += [T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90]
    return turns[orientation - 1] if orientation in range(1, 9) else None


def _shown_size(image: "ImageFile") -> tuple[int, int]:
    """Width and height in pixels after the turn that EXIF asks for."""
    from PIL.Image import Transpose

    turned = (Transpose.TRANSPOSE, Transpose.TRANSVERSE, Transpose.ROTATE_90, Transpose.ROTATE_270)
    width, height = image.size
    return (height, width) if _turn(image) in turned else (width, height)


def _rgb(image: "Image") -> "Image":
    from PIL import Image as pil

    if image.mode.startswith("I;16"):  # a plain convert would clip everything above 255 to white
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = pil.new("RGBA", layer.size, "white")
        return pil.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
