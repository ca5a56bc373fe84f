"""Every proof of the packing, the engine and the chat format, on the families beside Qwen2.5-VL.

The proofs are the same functions; here `random_model_folder` holds a tiny random model of each family.
"""

import re

import pytest

import family_models
from rlcs.model import loading
from rlcs.model.families import FAMILIES
from rlcs.recipe.schema import Prompts
from test_chat import (  # noqa: F401
    test_a_conversation_gives_the_ids_of_the_chat_template,
    test_clean_text_gives_the_ids_of_the_chat_template,
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
    test_a_pack_equals_the_padded_repeated_batch,
    test_conversations_are_learnt_as_transformers_learns_them,
    test_gradient_checkpointing_changes_memory_not_gradients,
    test_packs_may_be_split_anyhow,
)


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


def test_a_template_that_words_prompts_otherwise_is_told(vlm, caplog):
    loading.make_chat(vlm, prompts=Prompts(system="Think."))
    assert not caplog.records
    vlm.processor.chat_template += "{%- if add_generation_prompt -%}{{- '<think>' -}}{%- endif -%}"
    loading.make_chat(vlm)
    [record] = caplog.records
    answer = repr(vlm.family.chat_format.roles["assistant"])[1:-1]
    rendered, _, ours = record.getMessage().partition("; rlcs trains")
    assert rendered.endswith("<think>'") and answer in rendered and answer in ours and "<think>" not in ours
