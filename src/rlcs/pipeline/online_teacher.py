"""Opens the teacher of on-policy distillation, and tries it before any training."""

from collections.abc import Callable
from dataclasses import replace

from rlcs.distributed import ALONE, World
from rlcs.engines.vllm.scoring import ScoringServer
from rlcs.errors import ModelError
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.packing import pack
from rlcs.model.vlm import Vlm
from rlcs.recipe.objectives import OnlineTeacher
from rlcs.recipe.schema import Model, Recipe
from rlcs.records import Prompt
from rlcs.records.trees import Branch, Tree
from rlcs.train.context import TokenScorer
from rlcs.train.local_teacher import LocalTeacher, require_same_format

_WORDS = "1 2 3"


def open_teacher(recipe: Recipe, vlm: Vlm, chat: Chat, spread: Callable[[Vlm], Vlm]) -> TokenScorer:
    """The teacher of a policy: a frozen model beside it, over the same ranks, or a server.

    Raises ModelError, EndpointError.
    """
    teacher, world = recipe.grpo.teacher, vlm.world
    if (server := teacher.endpoint) is not None:
        return ScoringServer(server, chat, marks_images=vlm.family.vllm_marks_images, world=world)
    model = _load(teacher, recipe, world, weights=True)
    require_same_format(model, vlm)
    return LocalTeacher(vlm=spread(replace(model, frozen_tower=None)))


def try_teacher(recipe: Recipe, vlm: Vlm, chat: Chat, prompt: Prompt) -> None:
    """Compare the format of a local teacher, without its weights; let a server score a short answer.

    Raises ModelError, EndpointError.
    """
    teacher = recipe.grpo.teacher
    if teacher.endpoint is None:
        require_same_format(_load(teacher, recipe, ALONE, weights=False), vlm)
        return
    ids = chat.response_ids(_WORDS)
    tree = Tree(prompt=prompt, branches=(Branch(ids=ids, weights=(1.0,) * len(ids)),))
    server = ScoringServer(
        teacher.endpoint.model_copy(update={"max_retries": 0}),
        chat,
        marks_images=vlm.family.vllm_marks_images,
    )
    server.logprobs([pack([tree], chat.patches)], temperature=1.0)


def _load(teacher: OnlineTeacher, recipe: Recipe, world: World, *, weights: bool) -> Vlm:
    settings = Model(name=str(teacher.model), attention=recipe.model.attention, dtype=recipe.model.dtype)
    try:
        model = loading.load(settings, world=world, weights=weights)
    except ModelError as error:
        raise ModelError(error.what, where=f"grpo.teacher.model={teacher.model}", fix=error.fix) from error
    model.model.requires_grad_(False)
    return model
