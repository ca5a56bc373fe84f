"""Opens the images of rows: paths, embedded bytes, Base64 texts and data URLs; each is held once."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rlcs.data.decoder import ImageDecoder
from rlcs.data.images import image_from_bytes, image_from_path, image_kind, measured
from rlcs.data.values import IMAGE_KEYS, decoded_base64, image_in, shown, structured
from rlcs.errors import DataError
from rlcs.records import ImageRef
from rlcs.storage import atomic_write

_DATA_URL = re.compile(r"(data:[^,]{0,200}?;|image/[\w.+-]{1,20};|)base64,", re.IGNORECASE)
_QUOTED = re.compile(r"b?[\"']([A-Za-z0-9+/_\s=-]{64,})[\"']")
"""Base64 as Python prints it."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
_MIN_BASE64 = 64
"""Characters; a shorter text is a path."""
_MAX_PATH = 1024
FEW = 1000
"""Files of images that are known where memory may not grow with the rows."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")


class RowImages:
    """The images of one source; relative paths start at one of `folders`, absolute ones lie below `roots`."""

    def __init__(
        self,
        *,
        folders: tuple[Path, ...],
        roots: tuple[Path, ...],
        limit: int,
        decode: bool,
        store: Path | None = None,
    ) -> None:
        """`limit` is in pixels an image; `decode`: by an `ImageDecoder`, each in full.

        Images that are embedded in rows are written into the folder `store`, if there is one, and not held.
        """
        self._folders = folders
        self._roots = roots
        self._limit = limit
        self._decoder = ImageDecoder() if decode else None
        self._measure = self._decoder.measured if self._decoder else measured
        self._store = store
        self._holds_bytes = True
        self._most: int | None = None
        self.failed = ""
        """The file of the image that could not be used last, if it is one."""
        self._paths: dict[str, ImageRef] = {}
        self._bytes: dict[str, ImageRef] = {}

    def hold_no_bytes(self) -> None:
        """From now on keep only checksum and size of an image that is embedded in a row."""
        self._holds_bytes = False

    def hold_few(self) -> None:
        """From now on know the last FEW files, and one embedded image: memory does not grow with the rows."""
        self._most = FEW

    def read(self, value: object) -> tuple[ImageRef, ...]:
        """Open the images of a column. Raises DataError or ValueError."""
        items = image_items(value)
        return tuple(self._image(item, f"image {number}") for number, item in enumerate(items))

    def _image(self, item: object, where: str) -> ImageRef:
        if isinstance(item, Mapping):
            keys, item = shown(", ".join(map(str, item))), image_in(item)
            if item is None:
                raise ValueError(f"an image must have a value in one of {', '.join(IMAGE_KEYS)}, not {keys}")
        if isinstance(item, list) and item and all(type(each) is int for each in item):
            raise ValueError(
                f"{where} is a list of {len(item):,} numbers: write its bytes as Base64 or a file"
            )
        if isinstance(item, str):
            item = encoded_in(item, where) or item
        if isinstance(item, bytes):
            key = hashlib.sha256(item).hexdigest()
            if key not in self._bytes:
                ref = self._checked(
                    image_from_bytes(item, limit=self._limit, where=where, measure=self._measure)
                )
                self._keep(self._bytes, key, self._stored(ref, item), self._most and 1)
            return self._bytes[key]
        if not isinstance(item, str):
            raise ValueError(f"an image must be a path or embedded bytes, not {shown(item)}")
        if item not in self._paths:
            path = item.removeprefix("file://")
            root = self._root(path)
            self.failed = str(root / path)
            ref = image_from_path(path, root=root, limit=self._limit, measure=self._measure)
            self._keep(self._paths, item, self._checked(ref), self._most)
            self.failed = ""
        return self._paths[item]

    def _keep(self, known: dict[str, ImageRef], key: str, ref: ImageRef, most: int | None) -> None:
        known[key] = ref
        while most is not None and len(known) > most:
            del known[next(iter(known))]

    def _stored(self, ref: ImageRef, data: bytes) -> ImageRef:
        if self._store is None:
            return ref if self._holds_bytes else replace(ref, data=None)
        path = self._store / f"{ref.sha256}.{image_kind(data)}"
        if not path.exists():  # the ranks of a run read the same rows, and write the same files
            atomic_write(path, data, sync=False)
        return replace(ref, data=None, path=str(path.absolute()))

    def _checked(self, ref: ImageRef) -> ImageRef:
        if self._decoder:
            self._decoder.open_image(ref, limit=self._limit)
        return ref

    def _root(self, path: str) -> Path:
        """The folder in which the image of this path must lie."""
        if _is_url(path):
            fix = "images must be files: download it, and name the file"
            raise DataError("this is a URL, not a path", where=path[:80], fix=fix)
        if not path.startswith("/"):
            folders = (*self._folders, *self._roots)
            if not folders:
                raise DataError("a relative image path in a hub data set", where=path)
            return next((folder for folder in folders if _exists(folder / path)), folders[0])
        if not self._roots:
            fix = "make it relative to the data file, or set data.image_root"
            raise DataError("absolute image path", where=path, fix=fix)
        real = Path(path).resolve()
        inside = (root for root in self._roots if real.is_relative_to(root.resolve()))
        return next(inside, self._roots[-1])


def image_items(value: object) -> list[object]:
    """The images of a column as a list: the value itself if it is a single one."""
    if value is None or value == "":
        return []
    value = structured(value)
    single = not isinstance(value, list) or (len(value) > 1 and all(type(each) is int for each in value))
    return [value] if single else list(value)  # type: ignore[call-overload]


def looks_like_image(value: object) -> bool:
    """Whether a value of a column with an unknown name is an image, or the path of one."""
    if isinstance(value, str):
        return len(value) <= _MAX_PATH and value.lower().endswith(_SUFFIXES)
    if isinstance(value, list):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, bytes):
        return bool(image_kind(value))
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


def encoded_in(text: str, where: str) -> bytes | None:
    """The bytes of a data URL, or of an image as Base64; None for a path. Raises ValueError."""
    text = text.strip()
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[1]
    if text[:5].lower() == "data:" or _DATA_URL.match(text):
        head = _DATA_URL.match(text)
        data = _decoded(text[head.end() :]) if head else None
        if data is None:
            raise ValueError(f"{where} is a data URL that is not valid Base64")
        return data
    if len(text) < _MIN_BASE64 or _is_url(text):
        return None
    data = _decoded(text) if _BASE64.fullmatch(text) else None
    if data is not None and image_kind(data):
        return data
    if len(text) > _MAX_PATH:
        raise ValueError(f"{where} is a text of {len(text):,} characters: neither a path nor a Base64 image")
    return None


def _decoded(text: str) -> bytes | None:
    """The bytes of a text in Base64; None if it is not valid."""
    try:
        return decoded_base64(text)
    except ValueError:
        return None


def _is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
