"""Patches of images: sizes without reading a file, the processor's own values, memory, worker threads."""

import io
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from conftest import draw, make_problem
from rlcs.data.images import image_from_bytes, image_from_path, open_image
from rlcs.errors import ImageError, ModelError
from rlcs.model.images import ImagePipeline
from rlcs.model.patches import FlatPatches
from rlcs.records import ImageRef, Prompt

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FAMILIES = {
    "qwen2_vl": {"patch_size": 14},
    "qwen2_5_vl": {"patch_size": 14},
    "qwen3_vl": {"patch_size": 16, **HALF},
}
"""The values of the published preprocessor_config.json that patches depend on."""
BOUNDS = {"recipe": (3136, 1_204_224), "paper's RL": (262_144, 1_204_224), "narrow": (200_000, 210_000)}


def processor(family="qwen2_5_vl", low=3136, high=1_204_224):
    return Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high}, **FAMILIES[family])


def pipeline(**options):
    return ImagePipeline(FlatPatches(processor()), decode_limit=10**9, **options)


def of_size(width, height):
    return ImageRef(sha256="0" * 64, width=width, height=height)


def plain(made, ref):
    """Patches and grid by transformers alone."""
    features = made(images=[open_image(ref)], return_tensors="pt")
    return features["pixel_values"], tuple(features["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_the_grid_is_the_processors_for_every_size(family, bounds):
    """Its own resize is called for each on an image that has a size and no pixels."""
    made = processor(family, *bounds)
    side = made.patch_size * made.merge_size
    random.seed(1)
    sizes = [(random.randint(1, 6000), random.randint(1, 6000)) for _ in range(300)]
    sizes += [(random.randint(1, 300), random.randint(1, 9000)) for _ in range(100)]
    near = (-1, 0, 1, side // 2)
    sizes += [(side * n + d, side * m + e) for n in (1, 7, 40) for m in (1, 41) for d in near for e in near]
    sizes += [(1, 1), (1, 200), (200, 1), (10, 2000), (41, 8200), (40_000, 300), (65_535, 65_535)]
    images = ImagePipeline(FlatPatches(made), decode_limit=10**9)
    checked = 0
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ImageError, match="refuses it"):
                images.grid(of_size(width, height))
            continue
        empty = torch.empty(1, 3, height, width, device="meta")
        resized = made.resize(empty, size=made.size, resample=made.resample, factor=side).shape
        expected = (1, resized[2] // made.patch_size, resized[3] // made.patch_size)
        assert images.grid(of_size(width, height)) == expected, (width, height)
        checked += 1
    assert checked > 400


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (57, 1400), (1100, 900), (1300, 1700)])
def test_patches_are_the_processors_bit_by_bit(family, size):
    made = processor(family)
    ref = draw(*size) if size != (1300, 1700) else photo(*size)
    images = ImagePipeline(FlatPatches(made), decode_limit=10**9)
    expected, grid = plain(made, ref)
    assert images.grid(ref) == grid
    assert images.patches(ref).dtype == torch.float32
    assert torch.equal(images.patches(ref), expected)


def photo(width, height, *, exif=None):
    small = torch.randint(0, 256, (height // 8, width // 8, 3), generator=torch.Generator().manual_seed(1))
    image = Image.fromarray(small.to(torch.uint8).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **({"exif": exif} if exif else {}))
    return image_from_bytes(buffer.getvalue(), limit=10**9, where="photo")


def test_a_photo_lying_on_its_side_has_the_grid_of_its_upright_form():
    exif = Image.Exif()
    exif[274] = 6
    ref = photo(800, 600, exif=exif)
    assert (ref.width, ref.height) == (600, 800)
    expected, grid = plain(processor(), ref)
    images = pipeline()
    assert images.grid(ref) == grid and torch.equal(images.patches(ref), expected)


def test_a_jpeg_that_is_decoded_at_a_half_has_the_grid_of_its_whole_size(monkeypatch):
    monkeypatch.setattr("rlcs.data.images._KEPT_PIXELS", 100_000)
    ref = photo(801, 599)
    assert open_image(ref).size == (401, 300)
    images = pipeline()
    _, height, width = images.grid(ref)
    assert (1, height, width) == pipeline().grid(of_size(801, 599))
    assert images.patches(ref).shape == (height * width, 1176)


def test_no_file_is_read_for_a_prompt(chat, tmp_path):
    problem = make_problem("p")
    path = tmp_path / "a.png"
    path.write_bytes(problem.images[0].data)
    there = image_from_path("a.png", root=tmp_path, limit=10**6)
    path.unlink()
    prompt = chat.prompt(replace(problem, images=(there,)))
    assert prompt.ids == chat.prompt(problem).ids
    [error] = chat.prompts([replace(problem, images=(there,))])
    assert isinstance(error, ImageError) and "missing" in str(error)


def test_a_file_that_changed_is_an_error_where_its_pixels_are_used(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(draw(64, 48).data)
    ref = image_from_path("a.png", root=tmp_path, limit=10**6)
    images = pipeline()
    path.write_bytes(draw(640, 48).data)
    images.prepare([ref])
    assert images.grid(ref) == pipeline().grid(draw(64, 48))
    with pytest.raises(ImageError, match="the image changed after it was first read"):
        images.patches(ref)
    with pytest.raises(ImageError, match="not as its header says"):
        images.patches(replace(draw(64, 48), width=128))


def test_an_image_takes_an_eighth_of_its_patches_and_the_cache_keeps_within_its_bytes():
    first, second, third = (draw(112, 112, seed) for seed in range(3))
    one = 64 * 588
    assert pipeline().patches(first).nbytes == 8 * one
    images = pipeline(cache_bytes=2 * one)
    for ref in (first, second, first, third):
        images.patches(ref)
    assert set(images._cache) == {first.sha256, third.sha256} and images._used == 2 * one
    assert images._cache[first.sha256].dtype == torch.uint8


def test_workers_decode_ahead_in_order_each_image_once():
    refs = [draw(112, 112, seed) for seed in range(6)]
    decoded = []

    def counting(ref, **options):
        decoded.append((ref.sha256, threading.current_thread().name))
        return open_image(ref, **options)

    images = pipeline(workers=1, decode=counting)
    images.prepare(refs)
    images.prepare(refs)
    wait_until(lambda: len(images._cache) == 6)
    assert [sha for sha, _ in decoded] == [ref.sha256 for ref in refs]
    assert {name for _, name in decoded} == {"rlcs-images"}
    for ref in refs:
        images.patches(ref)
    assert len(decoded) == 6
    wait_until(lambda: not workers())


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "rlcs-images"]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_used_now_is_not_left_to_a_busy_worker():
    first, second = draw(112, 112, 0), draw(112, 112, 1)
    release, begun = threading.Event(), threading.Event()

    def slow(ref, **options):
        if ref == first:
            begun.set()
            assert release.wait(20)
        return open_image(ref, **options)

    images = pipeline(workers=1, decode=slow)
    images.prepare([first, second])
    assert begun.wait(20)
    images.patches(second)  # the only worker is at the first
    threading.Timer(0.05, release.set).start()
    assert torch.equal(images.patches(first), pipeline().patches(first))


def test_ahead_of_use_at_most_half_of_the_cache_is_filled():
    refs = [draw(112, 112, seed) for seed in range(8)]
    images = pipeline(cache_bytes=8 * 64 * 588)
    images.prepare(refs)
    wait_until(lambda: not workers())
    assert set(images._cache) == {ref.sha256 for ref in refs[:4]}
    nothing = pipeline(workers=0)
    nothing.prepare(refs)
    assert not workers() and not nothing._waiting


def test_an_error_in_a_worker_arrives_where_the_image_is_used():
    whole, damaged = draw(112, 112), replace(draw(300, 200), width=301)
    images = pipeline(workers=2)
    images.prepare([damaged, whole])
    wait_until(lambda: not workers())
    assert list(images._cache) == [whole.sha256]
    with pytest.raises(ImageError):
        images.patches(damaged)


def test_workers_end_with_their_pipeline_and_with_the_process():
    images = pipeline(workers=1, decode=lambda ref, **o: (time.sleep(0.05), open_image(ref, **o))[1])
    images.prepare(draw(112, 112, seed) for seed in range(100))
    del images
    wait_until(lambda: not workers())
    program = """
import sys, time
sys.path[:0] = ["tests", "src"]
from conftest import draw
import rlcs.model.images as m
from test_model_images import pipeline
images = pipeline(workers=1, decode=lambda ref, **o: (time.sleep(0.2), m.open_image(ref, **o))[1])
images.prepare(draw(56, 56, seed) for seed in range(100))
print("ended", flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ended\n"
    assert child.wait(timeout=10) == 0  # 100 images would take 20 s


def test_vllm_gets_an_image_that_its_processor_leaves_as_it_is():
    for family in FAMILIES:
        made = processor(family)
        images = ImagePipeline(FlatPatches(made), decode_limit=10**9)
        for ref in (photo(1600, 1200), draw(64, 48), draw(57, 1400)):
            resized = images.resized(ref)
            _, height, width = images.grid(ref)
            assert resized.size == (width * made.patch_size, height * made.patch_size)
            features = made(images=[resized], return_tensors="pt")
            assert torch.equal(features["pixel_values"], images.patches(ref))


@pytest.mark.parametrize(
    ("size", "bounds"), [((41, 8200), (3136, 1_204_224)), ((500, 400), (200_000, 201_000))]
)
def test_shapes_that_would_be_resized_twice_are_passed_on_in_full_size(size, bounds):
    """A grid can be longer than 200 times its width, or too large where the bounds lie close together."""
    made = processor("qwen2_5_vl", *bounds)
    ref = draw(*size)
    images = ImagePipeline(FlatPatches(made), decode_limit=10**9)
    assert images.resized(ref).size == size
    features = made(images=[images.resized(ref)], return_tensors="pt")
    assert torch.equal(features["pixel_values"], images.patches(ref))


def test_a_processor_with_other_arithmetic_is_refused():
    made = processor()
    made.do_normalize = False
    with pytest.raises(ModelError, match="computes other patches"):
        ImagePipeline(FlatPatches(made), decode_limit=10**9)


def test_problems_with_damaged_images_are_found_with_their_prompts(chat):
    good, bad = make_problem("good"), make_problem("bad")
    bad = replace(bad, images=(replace(bad.images[0], width=57),))
    first, error, last = chat.prompts([good, bad, good])
    assert isinstance(first, Prompt) and first == last
    assert isinstance(error, ImageError)
