"""Reading problems with images from a file, against `datasets`: question, answer, size of the image.

The file is Parquet with the images' bytes in it, as on the hub. Both sides read it for the first time, to the
end: rlcs as a run reads it (every row checked, image headers read), `datasets` by `load_dataset` and one pass
over the rows, images opened (their headers are read) and, in the second phase, decoded. Its cache is empty.
"""

import io
import random
import shutil
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
from PIL import Image

from bench.pairs import Options, in_turns, row
from bench.shapes import DECODE_LIMIT, drawn_image
from bench.table import Row
from rlcs.data.loading import load
from rlcs.recipe.schema import Data

ROWS = (1_000, 10_000, 100_000)
MOST_DECODED = 1_000
"""Rows up to which images are decoded too."""
IMAGES = 64
"""Different images."""


def rows(options: Options) -> list[Row]:
    """A row for each number of rows and phase."""
    return [found for count in ROWS for found in measured(options, count)]


def measured(options: Options, count: int) -> list[Row]:
    """One file of so many rows: headers alone, and whole images if they are few."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = write(Path(folder) / "rows.parquet", count)
        return [
            row(
                work="loading",
                shape=f"{count:,} rows",
                phase="images decoded" if decode else "image headers",
                peer=f"datasets {version('datasets')}",
                pair=in_turns(
                    partial(ours, path, decode=decode),
                    partial(theirs, path, decode=decode),
                    rounds=options.rounds,
                    clock=options.clock,
                ),
            )
            for decode in ((False, True) if count <= MOST_DECODED else (False,))
        ]


def write(path: Path, count: int) -> Path:
    """A file of problems, with images of 112 pixels a side."""
    rng = random.Random("loading")
    images = [drawn_image(112, rng).data for _ in range(IMAGES)]
    columns = {
        "question": [f"How many of the {index} shapes are red?" for index in range(count)],
        "answer": [str(index % 97) for index in range(count)],
        "image": [{"bytes": images[index % IMAGES], "path": None} for index in range(count)],
    }
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(str(path))
    return path


def ours(path: Path, *, decode: bool) -> int:
    """Pixels of all images."""
    loaded = load(str(path), Data(), decode_limit=DECODE_LIMIT, role="rl", decode=decode)
    assert not loaded.bad, "every row can be used"
    return sum(image.width * image.height for each in loaded.rows for image in each.problem.images)


def theirs(path: Path, *, decode: bool) -> int:
    """Pixels of all images."""
    cache = tempfile.mkdtemp(prefix="bench-")
    try:
        data = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache)
        if not decode:
            data = data.cast_column("image", datasets.Image(decode=False))
        pixels = 0
        for each in data:
            assert each["question"] and each["answer"], "every row is read"
            image = each["image"] if decode else Image.open(io.BytesIO(each["image"]["bytes"]))
            pixels += image.width * image.height
        return pixels
    finally:
        shutil.rmtree(cache, ignore_errors=True)
