"""Images as teachers see them: upright, in RGB, within the recipe's pixels, encoded once."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from loopback_server import LoopbackServer
from rlcs.data import sent_images
from rlcs.data.images import image_from_bytes, image_from_path, open_image
from rlcs.data.rows import Row
from rlcs.data.sent_images import LOSSLESS_BYTES, SentImages, sent_image, shrunk
from rlcs.distill.run import run
from rlcs.recipe.schema import Images, Teacher
from rlcs.records import Problem

MAX = Images().max_pixels


def chart(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture whose corners differ: a red one at the upper left."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 4, height // 4), fill="red")
    draw.line((0, height, width, height // 2), fill="blue", width=3)
    return image.convert(mode)


def noise(width: int, height: int) -> Image.Image:
    """What no encoder shrinks, like a photograph with grain."""
    return Image.effect_noise((width, height), 90).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sent(data: bytes, max_pixels: int = MAX) -> tuple[bytes, Image.Image]:
    """The bytes that are sent for an image file, and what they show."""
    made = sent_image(image_from_bytes(data, limit=10**8, where="a"), max_pixels=max_pixels)
    return made, Image.open(io.BytesIO(made))


def turned() -> bytes:
    """A photo as telephones write it: lying on its side, with a note to turn it."""
    exif = Image.Exif()
    exif[274] = 6
    return encoded(chart(80, 40), "JPEG", exif=exif, quality=95)


def teaching(images: list[object], folder: Path, **changes: object) -> list[tuple[str, Image.Image]]:
    """Media types and pictures that a real server gets from a teacher's run about these images."""
    rows = [
        Row(problem=Problem(id=str(n), source="s", question="?", answer="4", images=(ref,)), response=None)
        for n, ref in enumerate(images)
    ]
    with LoopbackServer() as server:
        teacher = Teacher(base_url=server.url, model="m")
        run(rows, teacher, folder=folder, seed=1, images=Images(**changes))
        urls = [body["messages"][-1]["content"][0]["image_url"]["url"] for body in server.seen]
    parts = [url.partition(";base64,") for url in urls]
    return [(head, Image.open(io.BytesIO(base64.b64decode(data)))) for head, _, data in parts]


def test_a_teacher_sees_every_kind_of_file_upright_as_png_or_jpeg_within_the_bounds(tmp_path):
    files = {
        "a.jpg": turned(),
        "a.bmp": encoded(chart(60, 30), "BMP"),
        "a.tif": encoded(chart(60, 30), "TIFF"),
        "a.gif": encoded(chart(60, 30, "P"), "GIF"),
        "a.webp": encoded(chart(60, 30), "WEBP"),
        "large.png": encoded(noise(2000, 1500), "PNG"),
    }
    refs = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        refs.append(image_from_path(name, root=tmp_path, limit=10**8))
    pictures = teaching(refs, tmp_path / "run")
    assert len(pictures) == 6
    for head, picture in pictures:
        assert head in ("data:image/png", "data:image/jpeg") and picture.mode == "RGB"
        assert picture.width * picture.height <= MAX and 274 not in picture.getexif()
    sizes = sorted(picture.size for _, picture in pictures)
    assert sizes == sorted([(40, 80), *[(60, 30)] * 4, shrunk(2000, 1500, MAX)])
    upright = next(picture for _, picture in pictures if picture.size == (40, 80))
    red, green, _ = upright.getpixel((36, 4))  # the upper left corner went to the upper right
    assert red > 200 and green < 60


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(chart(60, 30), "PNG"), "PNG"),
        (encoded(chart(60, 30, "L"), "PNG"), "PNG"),
        (encoded(chart(60, 30), "JPEG", quality=60), "JPEG"),
        (encoded(chart(60, 30), "JPEG", progressive=True), "JPEG"),
    ],
)
def test_a_plain_image_within_the_bounds_is_sent_as_it_is(data, kind):
    assert sent(data)[0] == data and sent(data)[1].format == kind


@pytest.mark.parametrize(
    "data",
    [
        encoded(chart(60, 30, "P"), "PNG"),
        encoded(chart(60, 30, "RGBA"), "PNG"),
        encoded(chart(60, 30, "1"), "PNG"),
        encoded(Image.new("I;16", (60, 30), 40_000), "PNG"),
        encoded(chart(60, 30, "P"), "PNG", transparency=0),
        encoded(chart(60, 30, "CMYK"), "JPEG"),
        encoded(chart(60, 30), "PNG", save_all=True, append_images=[noise(60, 30)]),
        encoded(chart(60, 30), "GIF", save_all=True, append_images=[noise(60, 30)]),
        turned(),
    ],
)
def test_other_images_are_sent_as_the_student_sees_them(data):
    made, picture = sent(data)
    seen = open_image(image_from_bytes(data, limit=10**8, where="a"))
    assert made != data and picture.mode == "RGB" and picture.size == seen.size
    assert getattr(picture, "n_frames", 1) == 1
    worst = max(abs(a - b) for a, b in zip(picture.tobytes(), seen.tobytes(), strict=True))
    assert worst == 0 if picture.format == "PNG" else worst < 60


def test_small_results_have_no_loss_and_large_ones_become_jpeg():
    made, picture = sent(encoded(chart(4000, 3000), "PNG"))
    assert picture.format == "PNG" and len(made) < 30_000
    made, picture = sent(encoded(noise(1600, 1200), "PNG"))
    assert picture.format == "JPEG" and len(made) < LOSSLESS_BYTES
    made, picture = sent(encoded(chart(4000, 3000), "JPEG"))
    assert picture.format == "JPEG", "a second encoding without loss would only be larger"


@pytest.mark.parametrize(
    "size", [(4000, 3000), (1099, 1099), (5000, 500), (3000, 7001), (10_000, 60), (40, 7000)]
)
@pytest.mark.parametrize("max_pixels", [MAX, 100_352, 3136])
def test_a_shrunk_image_is_within_the_bounds_and_keeps_its_proportion(size, max_pixels):
    width, height = shrunk(*size, max_pixels)
    assert 0 < width * height <= max_pixels
    assert all(side % 28 == 0 for side in (width, height) if side > 28)
    if min(width, height) > 280:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.1)


def test_it_is_shrunk_to_what_the_students_processor_makes():
    """The same size, and the same pixels but for rounding, as Qwen2.5-VL's processor gives."""
    import numpy as np
    from torchvision.transforms.v2 import functional as torchvision
    from transformers.models.qwen2_vl import image_processing_qwen2_vl as qwen

    image = chart(3000, 2000)
    height, width = qwen.smart_resize(2000, 3000, factor=28, min_pixels=3136, max_pixels=MAX)
    assert shrunk(3000, 2000, MAX) == (width, height)
    _, picture = sent(encoded(image, "PNG"))
    theirs = torchvision.resize(
        torchvision.pil_to_tensor(image),
        [height, width],
        torchvision.InterpolationMode.BICUBIC,
        antialias=True,
    )
    difference = np.abs(np.asarray(picture, dtype=int) - theirs.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= 2


def test_the_samples_of_a_problem_encode_its_image_once(monkeypatch, tmp_path):
    made = []
    plain = sent_images.sent_image
    monkeypatch.setattr(
        sent_images, "sent_image", lambda ref, **more: (made.append(ref), plain(ref, **more))[1]
    )
    ref = image_from_bytes(encoded(chart(60, 30), "BMP"), limit=10**6, where="a")
    with LoopbackServer() as server:
        teacher = Teacher(base_url=server.url, model="m", max_samples=12, enough_kept=0)
        problem = Problem(id="a", source="s", question="?", answer="4", images=(ref,))
        run([Row(problem=problem, response=None)], teacher, folder=tmp_path, seed=1)
        assert len(server.seen) == 12 and len(made) == 1


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(sent_images, "_CACHE_BYTES", 1000)
    cache = SentImages(max_pixels=MAX)
    refs = [image_from_bytes(encoded(chart(20 + n, 20), "PNG"), limit=10**6, where="a") for n in range(20)]
    assert len({cache.url(ref) for ref in refs}) == 20
    assert len(cache._cache) < 10 and cache._used == sum(map(len, cache._cache.values()))
    assert cache.url(refs[0]) == SentImages(max_pixels=MAX).url(refs[0])


def test_the_recipes_bound_decides(tmp_path):
    ref = image_from_bytes(encoded(chart(600, 300), "PNG"), limit=10**6, where="a")
    ((_, wide),) = teaching([ref], tmp_path / "a")
    ((_, small),) = teaching([ref], tmp_path / "b", max_pixels=50_176)
    assert wide.size == (600, 300) and small.size == shrunk(600, 300, 50_176)
