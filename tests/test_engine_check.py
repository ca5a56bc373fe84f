"""The comparison of engine and trainer: healthy engines pass, and each kind of fault is named.

Faults are put into real engines of the built-in model, between the trainer and what it is compared with.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import family_models
from conftest import SMALL_STUDY, LengthGrader, make_problem
from model_server import ModelServer, serving
from rlcs.data.images import encode, image_from_bytes
from rlcs.data.run_data import load_run_data
from rlcs.data.sources import open_builtin
from rlcs.engines import decoding
from rlcs.engines.base import Engine
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.server import Launch
from rlcs.engines.vllm.weights import WeightsFolder
from rlcs.errors import TrainingError
from rlcs.model import loading, packing
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.pipeline.study import Output, Study
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Images, Model
from rlcs.recipe.stages import Grpo
from rlcs.records import ImageRef, Problem, Prompt
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl
from rlcs.train import engine_faults
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.engine_check import EngineCheck, cases
from rlcs.train.engine_verdict import IMAGE, SWAPPED, TEXT
from test_distributed import group_of_one, run_on  # noqa: F401 - a fixture

CPU = torch.device("cpu")
PUZZLES = list(open_builtin("builtin:puzzles?count=40&seed=1", "rl"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(request) -> tuple[Vlm, Chat]:
    vlm = loading.load(Model(name="builtin", dtype=request.param), device=CPU)
    return vlm, loading.make_chat(vlm)


@pytest.fixture
def plain() -> tuple[Vlm, Chat]:
    """The built-in model in float32, for a test that changes it."""
    vlm = loading.load(Model(name="builtin"), device=CPU)
    return vlm, loading.make_chat(vlm)


def check_of(
    vlm: Vlm, chat: Chat, engine: Engine, *, problems: Sequence[Problem] = PUZZLES, lines: list | None = None
) -> EngineCheck:
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=engine, grader=LengthGrader(), checks=3)
    return EngineCheck(context, problems, Grpo(), say=(lines if lines is not None else []).append)


def copied(vlm: Vlm) -> Vlm:
    return replace(vlm, model=copy.deepcopy(vlm.model))


def perturb(vlm: Vlm, scale: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (scale * parameter.float().std().nan_to_num() * noise).to(parameter.dtype)


class Faulty:
    """An engine that gets other prompts than it was given, or reports other ids."""

    def __init__(
        self,
        engine: LocalEngine,
        *,
        prompt: Callable[[Prompt], Prompt] = lambda prompt: prompt,
        ids: Callable[[Prompt], tuple[int, ...]] = lambda prompt: prompt.ids,
    ) -> None:
        self._engine, self._prompt, self._ids = engine, prompt, ids

    def inspect(self, prompts, sampling, *, candidates):
        [view] = self._engine.inspect(
            [self._prompt(prompt) for prompt in prompts], sampling, candidates=candidates
        )
        seen = [replace(s, prompt_ids=self._ids(p)) for s, p in zip(view.prompts, prompts, strict=True)]
        return [replace(view, prompts=tuple(seen))]

    def rest(self) -> None:
        pass


def caught(check: EngineCheck, version: int = 0) -> str:
    """The layer that is blamed."""
    with pytest.raises(TrainingError, match="the rollout engine does not compute what the trainer does") as e:
        check(version, Clock())
    assert "rollout.checks=0" in e.value.fix and e.value.where
    return e.value.what.partition("wrong first: ")[2].partition(".")[0]


def test_a_healthy_engine_passes_with_room_to_spare(trained):
    lines: list[str] = []
    check = check_of(*trained, LocalEngine(*trained, max_rows=16), lines=lines)
    before = torch.get_rng_state()
    for version in (0, 0, 1, 2, 3, 4):
        check(version, Clock())
    assert torch.equal(before, torch.get_rng_state())
    assert check.worst is not None and 0 < check.worst.share < 0.25
    assert (
        len(lines) == 3
        and "3 with images, the same with other images" in lines[0]
        and "2 without" in lines[0]
    )


OTHER_IDS = {
    "ids": lambda prompt: (*prompt.ids[:5], 7, *prompt.ids[5:]),
    "grid": lambda prompt: tuple(i for n, i in enumerate(prompt.ids) if n not in dict(prompt.spans)),
}


@pytest.mark.parametrize("layer", OTHER_IDS)
def test_other_ids_and_other_sizes_of_images(trained, layer):
    engine = Faulty(LocalEngine(*trained, max_rows=16), ids=OTHER_IDS[layer])
    assert caught(check_of(*trained, engine)) == layer


def of_images(change) -> Callable[[Prompt, Chat], Prompt]:
    return lambda prompt, chat: engine_faults.with_images(prompt, chat, change)


PIXELS = {
    "black": of_images(engine_faults._blank(0.0)),
    "white, which no hypothesis is": of_images(engine_faults._blank(1.0)),
    "channels": of_images(engine_faults._channels_reversed),
    "upside down, which no hypothesis is": of_images(lambda image: image.rotate(180)),
    "faint, which no hypothesis is": of_images(engine_faults._not_normalised(None)),
}


@pytest.mark.parametrize("name", PIXELS)
def test_other_pixels(trained, name):
    change, chat = PIXELS[name], trained[1]
    engine = Faulty(LocalEngine(*trained, max_rows=16), prompt=lambda prompt: change(prompt, chat))
    assert caught(check_of(*trained, engine)) == "pixels"


def test_a_cache_that_knows_a_prompt_by_its_ids_alone(trained):
    """The second image of the same size is answered with the first."""
    first: dict[tuple[int, ...], Prompt] = {}
    engine = Faulty(
        LocalEngine(*trained, max_rows=16), prompt=lambda prompt: first.setdefault(prompt.ids, prompt)
    )
    assert caught(check_of(*trained, engine)) == "pixels"


def test_images_in_another_order(trained):
    problems = [make_problem(f"p{n}", "<image> or <image>?", sizes=((56, 84),) * 2) for n in range(4)]
    engine = Faulty(
        LocalEngine(*trained, max_rows=16),
        prompt=lambda prompt: replace(prompt, images=prompt.images[::-1]),
    )
    assert caught(check_of(*trained, engine, problems=problems)) == "pixels"


def test_images_do_not_reach_the_model(trained, monkeypatch):
    monkeypatch.setattr(decoding, "image_inputs", lambda vlm, pack: {})
    assert caught(check_of(*trained, LocalEngine(*trained, max_rows=16))) == "pixels"


def test_rows_and_columns_change_places(trained):
    engine = Faulty(LocalEngine(*trained, max_rows=16), prompt=engine_faults._turned)
    assert caught(check_of(*trained, engine)) == "grid"


def shifted_after_images(batch, request, *, start):
    """No hypothesis is this."""
    true_open(batch, request, start=start + 9 * len(request.prompt.images))


def counted(batch, request, *, start):
    true_open(batch, request, start=len(request.prompt.ids))


true_open, true_pack = decoding.DecodingBatch._open, packing.pack
POSITIONS = {
    "as text": (decoding, "pack", lambda *a: engine_faults._as_text(true_pack(*a))),
    "one axis": (decoding, "pack", lambda *a: engine_faults._one_axis(true_pack(*a))),
    "answers go on by number": (decoding.DecodingBatch, "_open", counted),
    "answers go on too late": (decoding.DecodingBatch, "_open", shifted_after_images),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_other_positions(trained, monkeypatch, name):
    if trained[0].model.dtype == torch.bfloat16 and name == "one axis":
        pytest.skip("it moves this model by 0.004 nats, and rounding by as much")
    place, attribute, fault = POSITIONS[name]
    monkeypatch.setattr(place, attribute, fault)
    assert caught(check_of(*trained, LocalEngine(*trained, max_rows=16))) == "positions"


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_weights_that_are_not_the_trainers(trained, scale):
    vlm, chat = trained
    if vlm.model.dtype == torch.bfloat16 and scale < 0.1:
        pytest.skip("rounding does as much")
    other = copied(vlm)
    perturb(other, scale)
    assert caught(check_of(vlm, chat, LocalEngine(other, chat, max_rows=16))) == "weights"


def test_weights_of_before_the_last_update(trained):
    """A small update, which without the comparison before it could be anything."""
    vlm, chat = copied(trained[0]), trained[1]
    check = check_of(vlm, chat, LocalEngine(copied(vlm), chat, max_rows=16))
    check(0, Clock())
    perturb(vlm, 0.02)
    assert caught(check, 1) == "weights"


def test_adapters_are_left_out():
    vlm = loading.load(Model(name="builtin"), device=CPU)
    chat = loading.make_chat(vlm)
    bare = copied(vlm)
    vlm = loading.prepare(vlm, Lora(rank=4), (), seed=0)
    check = check_of(vlm, chat, LocalEngine(bare, chat, max_rows=16))
    check(0, Clock())  # fresh adapters change nothing
    with torch.no_grad():
        for _, parameter in vlm.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert caught(check, 1) == "weights"
    check_of(vlm, chat, LocalEngine(vlm, chat, max_rows=16))(0, Clock())


def test_a_kernel_that_is_wrong_in_decoding(trained, monkeypatch):
    true, factor = decoding.ForestCache.attend, 1.05 if trained[0].model.dtype == torch.float32 else 2.0

    def attend(*args, **options):
        return factor * true(*args, **options)

    monkeypatch.setattr(decoding.ForestCache, "attend", attend)
    assert caught(check_of(*trained, LocalEngine(*trained, max_rows=16))) == "kernel"


def rounded_to_fp8(vlm: Vlm) -> Vlm:
    """Weights of the language model and their inputs in 8 bits: a scale for each channel and each token."""
    rounded = copied(vlm)

    def in_8_bits(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    for name, module in rounded.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "language_model" in name:
            module.weight.data = in_8_bits(module.weight.data)
            module.register_forward_pre_hook(lambda module, args: (in_8_bits(args[0]),))
    return rounded


class InFp8(Faulty):
    """It says how it computes, as a server does."""

    def inspect(self, prompts, sampling, *, candidates):
        views = super().inspect(prompts, sampling, candidates=candidates)
        return [replace(view, precision="fp8") for view in views]


def test_rollouts_in_fp8_have_a_wider_limit(trained):
    vlm, chat = trained
    engine = LocalEngine(rounded_to_fp8(vlm), chat, max_rows=16)
    check = check_of(vlm, chat, InFp8(engine))
    check(0, Clock())
    assert check.worst is not None and 0.01 < check.worst.share < 0.5 and check.worst.limit > 0.15
    for name in ("black", "upside down, which no hypothesis is"):
        change = PIXELS[name]
        faulty = InFp8(engine, prompt=lambda prompt, change=change: change(prompt, chat))
        assert caught(check_of(vlm, chat, faulty)) == "pixels"


def test_without_images_text_alone_is_compared(plain):
    lines: list[str] = []
    problems = [make_problem(f"p{n}", sizes=()) for n in range(5)]
    check_of(*plain, LocalEngine(*plain, max_rows=16), problems=problems, lines=lines)(0, Clock())
    assert "prompts 2 without" in lines[0]
    other = copied(plain[0])
    perturb(other, 0.1)
    assert caught(check_of(*plain, LocalEngine(other, plain[1], max_rows=16), problems=problems)) == "weights"


def test_the_cases_are_pairs_of_equal_ids(plain):
    chat = plain[1]
    made = list(cases([*PUZZLES[:5], make_problem("two", sizes=((56, 84), (84, 56)))], chat))
    assert [case.kind for case in made] == [IMAGE, SWAPPED] * 3 + [TEXT] * 2
    assert made[0].prompt.problem_id == "two", "most images come first"
    for one, other in zip(made[0:6:2], made[1:6:2], strict=True):
        assert one.prompt.ids == other.prompt.ids and one.prompt.grids == other.prompt.grids
        assert one.prompt.images != other.prompt.images


# --- servers: vLLM's protocol, every server of a fleet ------------------------------------------------------


@contextmanager
def fleet(vlm: Vlm, chat: Chat, folder: Path, *servers: ModelServer) -> Iterator[VllmEngine]:
    """An engine over servers that run already."""
    with serving(*servers) as urls:
        settings = Rollouts(engine="vllm_server", urls=urls, health_limit_s=10)
        launch = Launch(settings=settings, dtype="float32", max_tokens=512, max_rows=8)
        backend = Fleet(settings, logs=folder, launch=launch)
        yield VllmEngine(backend, WeightsFolder(folder / "weights"), vlm, chat)
        backend.close()


def test_each_server_of_a_fleet_is_compared(plain, tmp_path):
    lines: list[str] = []
    with fleet(*plain, tmp_path, ModelServer("builtin"), ModelServer("builtin")) as engine:
        check = check_of(*plain, engine, lines=lines)
        check(0, Clock())
        perturb(plain[0], 0.1)
        engine.sync()
        check(1, Clock())
    assert all("2 engines compute what the trainer does" in line for line in lines) and len(lines) == 2
    assert check.worst is not None and check.worst.gap < 1e-4 and check.worst.precision == "float32"


def test_a_server_that_is_down_is_left_out(plain, tmp_path, caplog):
    down = ModelServer("builtin")
    down.well = False
    lines: list[str] = []
    with fleet(*plain, tmp_path, down, ModelServer("builtin")) as engine:
        check_of(*plain, engine, lines=lines)(0, Clock())
    assert "the engine computes" in lines[0] and "vLLM server 0" in caplog.text and not down.asked


def blank(ref: ImageRef) -> ImageRef:
    data = encode(Image.new("RGB", (ref.width, ref.height)))
    return image_from_bytes(data, limit=10**7, where="blank")


def test_one_server_of_two_loses_the_pixels(plain, tmp_path):
    servers = ModelServer("builtin"), ModelServer("builtin", changed=blank)
    with fleet(*plain, tmp_path, *servers) as engine, pytest.raises(TrainingError, match="pixels") as error:
        check_of(*plain, engine)(0, Clock())
    assert error.value.where.startswith("vLLM server 1") and "every image were black" in error.value.what


def test_a_server_with_other_pixel_bounds(plain, tmp_path):
    small = ModelServer("builtin", images=Images(max_pixels=4000))
    with fleet(*plain, tmp_path, small) as engine, pytest.raises(TrainingError, match="grid") as error:
        check_of(*plain, engine)(0, Clock())
    assert re.search(r"it made \d+ tokens of the images, and the trainer \d+", error.value.what)


def test_a_server_keeps_its_old_weights_under_the_new_name(plain, tmp_path):
    with fleet(*plain, tmp_path, ModelServer("builtin", stale=True)) as engine:
        check = check_of(*plain, engine)
        check(0, Clock())
        perturb(plain[0], 0.02)
        engine.sync()
        with pytest.raises(TrainingError, match=r"weights.*as if it still had the weights of before"):
            check(1, Clock())


# --- families, ranks, whole stages --------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(family_models.BUILDERS))
def test_every_family_is_compared(family, tmp_path, caplog):
    """In bfloat16 every fault is computed: no family refuses one."""
    caplog.set_level("DEBUG", logger="rlcs")
    folder = family_models.build(family, tmp_path)
    vlm = loading.load(Model(name=str(folder), dtype="bfloat16"), device=CPU)
    chat = loading.make_chat(vlm)
    check = check_of(vlm, chat, LocalEngine(vlm, chat, max_rows=16))
    check(0, Clock())
    assert check.worst is not None and check.worst.share < 0.4
    assert "cannot be computed" not in caplog.text
    change = PIXELS["black"]
    engine = Faulty(LocalEngine(vlm, chat, max_rows=16), prompt=lambda prompt: change(prompt, chat))
    assert caught(check_of(vlm, chat, engine)) == "pixels"


def test_weights_in_shards(random_model_folder, group_of_one):  # noqa: F811
    vlm = loading.load(Model(name=str(random_model_folder)), device=CPU, world=group_of_one)
    vlm = loading.spread(vlm, Parallel(compute_dtype="bfloat16"))
    chat = loading.make_chat(vlm)
    check = check_of(vlm, chat, LocalEngine(vlm, chat, max_rows=16))
    check(0, Clock())
    assert check.worst is not None and check.worst.share < 0.4 and check.worst.precision == "bfloat16"
    engine = Faulty(LocalEngine(vlm, chat, max_rows=16), prompt=lambda prompt: PIXELS["black"](prompt, chat))
    assert caught(check_of(vlm, chat, engine)) == "pixels"


def test_two_ranks_compare_the_engine_of_each(random_model_folder, tmp_path):
    grpo = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6}
    job = {"model": str(random_model_folder), "folder": str(tmp_path / "run"), "grpo": grpo, "checks": 1}
    run_on(2, [job], tmp_path / "jobs.json")
    first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["engine_gap"] < 1e-4 and "engine_gap" not in second


def study_in(folder: Path, *words: str) -> None:
    recipe = load_recipe("quickstart", list(words)).recipe
    data = load_run_data(recipe.study, recipe.data, decode_limit=recipe.images.decode_limit)
    Study(recipe, folder, data=data, output=Output(quiet=True), stop=StopFlag()).run()


def test_a_stage_compares_its_first_versions_and_reports_it(tmp_path, capsys):
    study_in(tmp_path / "on", *SMALL_STUDY, "grpo.steps=3", "rollout.checks=2", "study.arms=[base, grpo]")
    rows = read_jsonl(tmp_path / "on" / "grpo" / "metrics.jsonl")
    assert ["engine_gap" in row for row in rows] == [True, True, False]
    assert ["check" in row["seconds"] for row in rows] == [True, True, False]
    shown = capsys.readouterr().out
    assert shown.count("the engine computes what the trainer does") == 2
    page = (tmp_path / "on" / "report" / "index.html").read_text()
    assert "compared with the trainer 2 times: at most" in page
    study_in(tmp_path / "off", *SMALL_STUDY, "grpo.steps=3", "rollout.checks=0", "study.arms=[base, grpo]")
    plain = read_jsonl(tmp_path / "off" / "grpo" / "metrics.jsonl")
    own = {"seconds", "tokens_per_s", "engine_gap", "engine_gap_limit"}
    one, other = ([{k: row[k] for k in row.keys() - own} for row in each] for each in (rows, plain))
    assert one == other
    weights = [
        (tmp_path / name / "grpo" / "final" / "model.safetensors").read_bytes() for name in ("on", "off")
    ]
    assert weights[0] == weights[1], "a comparison changes no bit of a run"
