"""Real small parts shared by tests: a random Qwen2.5-VL with its processor, drawn images, problems."""

import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from rlcs.data.images import image_from_bytes
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.recipe.schema import Model
from rlcs.records import Grade, ImageRef, Problem, Prompt, Rollout, Turn
from rlcs.records.trees import Branch, Tree
from rlcs.storage import file_sum, write_manifest

pytest_plugins = ("faults_table",)


LONGEST = (
    "docs_run", "pipeline", "distributed", "families", "grpo", "engine_check", "vllm_engine", "plan_memory",
    "doctor_gpu", "notebook", "publish", "walks", "train",
)  # fmt: skip
"""The files of tests that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: with several processes none is then left alone with one of them."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish() -> None:
    """Leave modules and tests out of later garbage collections, of which every run makes several."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Ended:
    """How a command of rlcs ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def rlcs(*words: object, cwd: str | Path = ".", **variables: str) -> Ended:
    """Run a command in this process, which has imported the slow libraries once."""
    from rlcs.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["rlcs", *map(str, words)]),
        patch.dict(os.environ, {"COLUMNS": "200", **variables}),
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rows of large sources do not go where those of the person who tests lie."""
    with patch.dict(os.environ, {"RLCS_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        yield


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face format: random weights, two layers, the built-in model's processor."""
    from tools import tiny_model

    processor = tiny_model.build_processor(tiny_model.corpus(50))
    model = tiny_model.build_model(processor, seed=1, layers=2)
    folder = tmp_path_factory.mktemp("random_model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deeper random model with the tokenizer of the first: its teacher."""
    from tools import tiny_model

    processor = tiny_model.build_processor(tiny_model.corpus(50))
    folder = tmp_path_factory.mktemp("other_model")
    tiny_model.build_model(processor, seed=7, layers=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def vlm(random_model_folder: Path) -> Vlm:
    """The random model, loaded afresh so that a test may change it."""
    return loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))


@pytest.fixture
def chat(vlm: Vlm) -> Chat:
    return loading.make_chat(vlm)


SMALL_STUDY = [
    "data.cold_start=builtin:puzzles?count=12&seed=1",
    "data.rl=builtin:puzzles?count=12&seed=2",
    "data.test=builtin:puzzles?split=test&count=20&seed=3",
    "sft.epochs=2",
    "sft.batch_size=6",
    "grpo.prompts_per_step=3",
    "grpo.group_size=2",
]
"""What makes a study of the quickstart's recipe a matter of seconds."""


class LengthGrader:
    """Rewards odd numbers of characters: a random model gets reward differences that way."""

    def grade(self, pairs):
        return [Grade(reward=float(len(t) % 2), correct=len(t) % 2 == 1, why="length") for _, t in pairs]


class Stopper:
    """A screen that asks the run to stop after a step, as Ctrl-C would."""

    def __init__(self, view, stop, step):
        self._view, self._stop, self._step = view, stop, step
        self.say = view.say

    def step(self, report):
        self._view.step(report)
        if report.step == self._step:
            self._stop.is_set = True


def tree_of(prompt: Prompt, rollouts: tuple[Rollout, ...]) -> Tree:
    """A prompt and its answers as they were sampled, every token with weight 1."""
    branches = [Branch(ids=r.ids, weights=(1.0,) * len(r.ids), logprobs=r.logprobs) for r in rollouts]
    return Tree(prompt=prompt, branches=tuple(branches))


def path_ids(tree: Tree, index: int) -> tuple[int, ...]:
    """The ids of a branch, behind those of the prompt and of the branches that it follows."""
    branches = (tree.branches[branch].ids for branch in tree.path(index))
    return tuple(i for ids in (tree.prompt.ids, *branches) for i in ids)


def row_inputs(vlm: Vlm, chat: Chat, ids: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, object]:
    """Keywords of the model's own forward for rows of ids (B, L), each behind a prompt with its images."""
    images = [image for prompt in prompts for image in prompt.images]
    inputs = {"input_ids": ids, **vlm.family.text_inputs(ids, chat.image_id)}
    if images:
        grids = torch.tensor([grid for prompt in prompts for grid in prompt.grids])
        inputs |= vlm.family.vision_inputs([chat.patches(image) for image in images], grids)
    return inputs


def draw(width: int, height: int, seed: int = 0) -> ImageRef:
    """Deterministic noise, so that no two images look alike to the model."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return image_from_bytes(buffer.getvalue(), limit=10**6, where="drawn")


def make_problem(
    name: str, question: str = "How many?", sizes: tuple[tuple[int, int], ...] = ((56, 84),)
) -> Problem:
    images = tuple(draw(w, h, seed=hash_of(name) + i) for i, (w, h) in enumerate(sizes))
    return Problem(id=name, source="test", question=question, answer="4", images=images)


def make_conversation(name: str, *, system: str | None = None, choices: tuple[str, ...] = ()) -> Problem:
    """Two rounds before the question, with images in the first turn, in the third and in the question."""
    history = [
        Turn(role="user", text="<image>How many are red?"),
        Turn(role="assistant", text="I count two.\n\\boxed{2}"),
        Turn(role="user", text="And in <image> here?"),
        Turn(role="assistant", text="Three: \\boxed{3}"),
    ]
    drawn = make_problem(name, sizes=((56, 84), (84, 56), (56, 56)))
    turns = [Turn(role="system", text=system)] if system is not None else []
    return replace(drawn, question="Now <image> all together?", history=(*turns, *history), choices=choices)


def hash_of(name: str) -> int:
    return sum(name.encode())


def seal(folder: Path) -> None:
    """Write the manifest of a folder as it is now."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    write_manifest(folder, {str(p.relative_to(folder)): file_sum(p) for p in paths})
