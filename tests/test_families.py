"""The proofs of a family, for each beside Qwen2.5-VL: what docs/how-to/add-a-model-family.md goes through.

Most are the functions that prove packing, engine, chat format and adapters; here `random_model_folder` holds
a tiny random model of each family.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import family_models
from conftest import make_problem
from rlcs.data.images import open_image
from rlcs.data.rows import Row
from rlcs.model import loading
from rlcs.model.families import FAMILIES
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.recipe.schema import Prompts
from rlcs.report.preview import make_view
from test_chat import (  # noqa: F401
    chat_once,
    test_a_conversation_gives_the_ids_of_the_chat_template,
    test_clean_text_gives_the_ids_of_the_chat_template,
    test_typed_control_tokens_stay_text,
)
from test_engines_local import (  # noqa: F401
    prompts,
    test_greedy_answers_are_those_of_transformers,
    test_rollouts_do_not_depend_on_batching_or_order,
    test_sampler_logprobs_are_the_policys,
)
from test_lora import (  # noqa: F401
    test_a_new_adapter_changes_no_logprob_at_all,
    test_merged_says_what_the_adapter_says_and_plain_transformers_loads_it,
    test_only_adapters_learn_and_the_reference_does_not_move,
)
from test_packing import test_positions_are_those_of_the_model_itself  # noqa: F401
from test_parity_check import test_a_healthy_untrained_model_passes, untrained  # noqa: F401
from test_policy import (  # noqa: F401
    CASES,
    make_trees,
    test_a_pack_equals_the_padded_repeated_batch,
    test_conversations_are_learnt_as_transformers_learns_them,
    test_gradient_checkpointing_changes_memory_not_gradients,
    test_in_double_precision_a_pack_is_exact,
    test_packs_may_be_split_anyhow,
)
from test_prefixes import (  # noqa: F401
    passes,
    short,
    test_a_later_turn_goes_on_from_the_earlier_one,
    test_questions_about_one_image_are_asked_at_once,
)
from test_serving_weights import test_half_the_bytes_in_bfloat16  # noqa: F401


@pytest.fixture(scope="module", params=sorted(family_models.BUILDERS))
def random_model_folder(request, tmp_path_factory):
    return family_models.build(request.param, tmp_path_factory.mktemp(request.param))


def test_every_parameter_belongs_to_exactly_one_part(vlm):
    family = FAMILIES[vlm.model.config.model_type]
    assert family is vlm.family
    seen = dict.fromkeys(("vision_tower", "merger", "language_model"), 0)
    loading.freeze(vlm, [])
    unused = {name for name, p in vlm.model.named_parameters() if not p.requires_grad}
    assert bool(unused) == (getattr(vlm.model.config, "audio_config", None) is not None)
    for part in seen:
        loading.freeze(vlm, [part])
        frozen = {name for name, p in vlm.model.named_parameters() if not p.requires_grad} - unused
        others = [getattr(family, other) for other in seen if other != part]
        assert frozen and not any(re.search(o, name) for o in others for name in frozen)
        seen[part] = len(frozen)
    assert sum(seen.values()) + len(unused) == len(list(vlm.model.named_parameters()))


def changed(branch):
    return replace(branch, ids=tuple(20 + (index + 57) % 180 for index in branch.ids))


def test_nothing_leaks_from_another_branch_or_tree(vlm, chat):
    """All tokens of one branch change, then all of one tree with its images: nothing else moves.

    Bit for bit, but where experts are: they multiply other numbers of tokens, and so round otherwise.
    """
    trees = make_trees(chat, CASES["many trees of mixed sizes"]) + make_trees(
        chat, CASES["answers that fork"]
    )
    before = by_branch(vlm, chat, trees)
    exact = "moe" not in vlm.family.model_type

    first, fork = trees[0], trees[4]
    one = replace(first, branches=(first.branches[0], changed(first.branches[1]), *first.branches[2:]))
    assert_others_stay(before, by_branch(vlm, chat, [one, *trees[1:]]), {(0, 1)}, exact=exact)
    branches = list(fork.branches)
    branches[2] = changed(branches[2])  # branch 3 follows it, 4 and 5 follow others
    other = [*trees[:4], replace(fork, branches=tuple(branches)), *trees[5:]]
    assert_others_stay(before, by_branch(vlm, chat, other), {(4, 2), (4, 3)}, exact=exact)

    [last] = make_trees(chat, [("c", *CASES["many trees of mixed sizes"][3][1:])], seed=1)
    last = replace(last, branches=tuple(map(changed, last.branches)))
    assert len(last.prompt.ids) == len(trees[3].prompt.ids)
    other = [*trees[:3], last, *trees[4:]]
    assert_others_stay(before, by_branch(vlm, chat, other), {(3, i) for i in range(4)}, exact=exact)


def by_branch(vlm, chat, trees) -> dict[tuple[int, int], torch.Tensor]:
    """The logprobs of every branch, by tree and branch."""
    logprobs = iter(score(vlm, pack(trees, chat.patches)).logprobs.detach())
    places = [(t, b) for t, tree in enumerate(trees) for b in range(len(tree.branches))]
    return {(t, b): torch.stack([next(logprobs) for _ in trees[t].branches[b].ids]) for t, b in places}


def assert_others_stay(before, after, moved, *, exact):
    for place, logprobs in before.items():
        if place in moved:
            assert (after[place] - logprobs).abs().max() > 1e-3
        elif exact:
            assert torch.equal(after[place], logprobs), place
        else:
            torch.testing.assert_close(after[place], logprobs, rtol=0, atol=1e-5)


def test_the_pixel_bounds_of_a_processor_are_those_that_set_them(vlm):
    for least, most in ((3136, 700_000), (62720, 1_204_224)):
        vlm.family.image_processing(vlm.processor, min_pixels=least, max_pixels=most)
        saved = vlm.processor.image_processor.to_dict()
        least, most = vlm.family.pixel_bounds(vlm.processor)
        vlm.family.image_processing(vlm.processor, min_pixels=least, max_pixels=most)
        assert vlm.processor.image_processor.to_dict() == saved


def test_every_layer_and_vision_block_is_a_unit_that_can_be_sharded(vlm):
    units = [m for m in vlm.model.modules() if type(m).__name__ in vlm.model._no_split_modules]
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    outside = [name for name, parameter in vlm.model.named_parameters() if id(parameter) not in inside]
    assert units and not any(re.search(r"\.\d+\.", n) for n in outside if not re.search(vlm.family.merger, n))


def test_the_tower_gets_what_the_processor_makes(vlm, chat):
    problem = make_problem("p", sizes=((84, 56), (112, 84), (60, 61)))
    content = [{"type": "image"}] * 3 + [{"type": "text", "text": "q"}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    images = [open_image(ref) for ref in problem.images]
    expected = vlm.processor(text=[text], images=images, return_tensors="pt")
    patches = [chat.patches(ref) for ref in problem.images]
    inputs = vlm.family.vision_inputs(patches, torch.tensor(chat.prompt(problem).grids))
    # A processor may pad images further.
    assert inputs and all(
        torch.equal(value, expected[name][tuple(map(slice, value.shape))]) for name, value in inputs.items()
    )


def test_a_view_has_a_cell_for_each_image_token(vlm, chat):
    problem = make_problem("p", sizes=((84, 56), (112, 84)))
    view = make_view(Row(problem=problem, response="4"), vlm, chat)
    for image, (start, end), (_, height, _) in zip(
        view.images, view.prompt.spans, view.prompt.grids, strict=True
    ):
        cell = image.height * view.prompt.merge_size // height
        assert image.width * image.height == cell**2 * (end - start)


def test_what_stands_for_images_and_turns_is_never_sampled(vlm, chat):
    sampling, written = chat.sampling(max_new_tokens=1), vlm.family.chat_format
    banned = set(vlm.processor.tokenizer.convert_tokens_to_ids(list(written.banned)))
    assert banned == set(sampling.banned_ids) and vlm.model.config.image_token_id in banned
    assert sampling.stop_ids == (vlm.processor.tokenizer.convert_tokens_to_ids(written.turn_end),)


def test_a_template_that_words_prompts_otherwise_is_told(vlm, caplog):
    loading.make_chat(vlm, prompts=Prompts(system="Think."))
    assert not caplog.records
    vlm.processor.chat_template = "{{- 'x' -}}" + vlm.processor.chat_template
    loading.make_chat(vlm)
    [record] = caplog.records
    assert "renders 'x" in record.getMessage()


def test_the_page_on_families_names_every_family_and_proof_and_shows_real_code():
    root = Path(__file__).parent.parent
    page = (root / "docs/how-to/add-a-model-family.md").read_text()
    proofs = {name for name in globals() if name.startswith("test_") and "_page_" not in name}
    assert set(re.findall(r"^- `(test_\w+)`", page, re.MULTILINE)) == proofs
    assert set(FAMILIES) <= set(re.findall(r"`(\w+)`", page))
    code = (root / "src/rlcs/model/families/internvl.py").read_text()
    lines = {line.strip() for line in code.splitlines()}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippets and all(line.strip() in lines for text in snippets for line in text.splitlines())
