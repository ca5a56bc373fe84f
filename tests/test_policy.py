"""The heart: a pack equals the padded, repeated batch: logprobs, entropy, loss and every gradient."""

import re
import sys
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from conftest import make_conversation, make_problem, path_ids, row_inputs
from rlcs.data.images import open_image
from rlcs.errors import UserError
from rlcs.model import delta_net, loading, policy
from rlcs.model.attention import DensePlan
from rlcs.model.bins import within_budget
from rlcs.model.layout import layout_of
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.model.template_rules import rules_of
from rlcs.model.tree_attention import TreePlan
from rlcs.model.vlm import Vlm
from rlcs.recipe.schema import Model, Prompts
from rlcs.records import Demonstration
from rlcs.records.trees import Branch, Tree
from rlcs.train import sft
from rlcs.train.trainer import Batch
from test_chat import template_messages

TOLERANCE = 1e-5
CASES = {
    "one tree": [("a", ((56, 84),), (5, 3, 7))],
    "one branch": [("a", ((56, 84),), (6,))],
    "no image": [("a", (), (4, 9))],
    "two images": [("a", ((56, 84), (84, 56)), (4, 2))],
    "many trees of mixed sizes": [
        ("a", ((56, 84),), (5, 3, 7)),
        ("b", ((112, 56),), (1,)),
        ("c", (), (8, 2)),
        ("d", ((84, 84), (56, 56)), (3, 3, 3, 3)),
    ],
    "answers that fork": [
        ("a", ((56, 84),), (5, 3, 7, 2, 20, 4), (None, 0, 0, 2, None, 4)),
        ("b", ((84, 56),), (6, 40), (None, 0)),
    ],
    # Some are the same, some are what others begin with, and one is no part of the others.
    "answers that begin alike": [
        ("a", ((56, 84),), (30, 34, 18, 18, 20, 3, 5), None, (18, 25, 18, 18, 18, 3, 2)),
        ("b", ((84, 56),), (9, 40, 50), None, (0, 30, 30)),
    ],
}


def make_trees(chat, case, seed=0) -> list[Tree]:
    """Trees of (name, images, lengths of answers, what they follow, tokens that they share at first)."""
    generator = torch.Generator().manual_seed(seed)
    trees = []
    for name, shapes, lengths, *more in case:
        parents, alike = (*more, None, None)[:2]
        beginning = torch.randint(20, 200, (max(alike or (0,)),), generator=generator).tolist()
        branches = []
        nothing = len(lengths) * (None,)
        for length, parent, first in zip(lengths, parents or nothing, alike or nothing, strict=True):
            ids = torch.randint(20, 200, (length,), generator=generator).tolist()
            ids[: first or 0] = beginning[: first or 0]
            weights = torch.randn(length, generator=generator).tolist()
            branches.append(Branch(ids=tuple(ids), weights=tuple(weights), parent=parent))
        prompt = chat.prompt(make_problem(name, f"question {name}", shapes))
        trees.append(Tree(prompt=prompt, branches=tuple(branches), merges=alike is not None))
    return trees


def padded_logprobs(vlm: Vlm, chat, trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way: every answer behind its own copy of the prompt, padded on the right, stock attention."""
    rows = [
        (path_ids(tree, index), tree.prompt, len(branch.ids))
        for tree in trees
        for index, branch in enumerate(tree.branches)
    ]
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r, _, _ in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r, _, _ in rows])
    inputs = row_inputs(vlm, chat, ids, [prompt for _, prompt, _ in rows])
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    logits = vlm.model(attention_mask=mask, **inputs).logits
    vlm.family.install(vlm.model)
    logprobs, entropies = [], []
    for row, (full, _, length) in enumerate(rows):
        logp = torch.log_softmax(logits[row, len(full) - length - 1 : len(full) - 1], -1)
        logprobs.append(logp.gather(1, torch.tensor(full[-length:])[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(vlm: Vlm, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    vlm.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


def apart(ours, theirs) -> dict[str, float]:
    """By how much of their norms gradients differ; rounding alone decides below 1% of the largest norm."""
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    return {
        name: float((ours[name] - gradient).norm() / max(gradient.norm(), 1e-2 * largest))
        for name, gradient in theirs.items()
    }


def assert_same_gradients(ours, theirs, *, tolerance: float = TOLERANCE):
    distances = apart(ours, theirs)
    worst = max(distances, key=distances.__getitem__)
    assert distances[worst] <= tolerance, worst


def recurrent_layers(vlm: Vlm) -> list[torch.nn.Module]:
    return [module for module in vlm.model.modules() if isinstance(module, delta_net.FollowsPaths)]


def tolerance_for(vlm: Vlm, theirs, compute) -> float:
    """1e-5; for recurrent layers twice the error of the stock kernel: its gradients in other chunks differ.

    `compute` makes the gradients `theirs` once more.
    """
    layers = recurrent_layers(vlm)
    if not layers:
        return TOLERANCE
    stock = sys.modules[type(layers[0]).__mro__[2].__module__]
    with pytest.MonkeyPatch.context() as patch:
        kernel = stock.torch_chunk_gated_delta_rule
        patch.setattr(stock, "torch_chunk_gated_delta_rule", partial(kernel, chunk_size=16))
        return max(TOLERANCE, 2 * max(apart(compute(), theirs).values()))


class InDouble(TorchFunctionMode):
    """Within it what asks for float32 gets float64: kernels and norms of transformers cast to the former."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("attention", ["tree", "dense"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_pack_equals_the_padded_repeated_batch(vlm, chat, case, attention):
    vlm = Vlm(**{**vars(vlm), "attention": attention})
    trees = make_trees(chat, case)
    packed = pack(trees, chat.patches)
    scores = score(vlm, packed)
    loss = -(packed.weights * scores.logprobs).sum()
    ours = gradients(vlm, loss)
    plain, entropy = padded_logprobs(vlm, chat, trees)
    plain_loss = -(packed.weights * plain).sum()
    theirs = gradients(vlm, plain_loss)
    tolerance = tolerance_for(
        vlm, theirs, lambda: gradients(vlm, -(packed.weights * padded_logprobs(vlm, chat, trees)[0]).sum())
    )
    torch.testing.assert_close(scores.logprobs, plain, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(scores.entropy, entropy, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(loss, plain_loss, rtol=TOLERANCE, atol=TOLERANCE)
    tower = vlm.family.vision_tower
    assert any(re.search(tower, name) for name in ours) == any(shapes for _, shapes, *_ in case)
    assert_same_gradients(ours, theirs, tolerance=tolerance)


@pytest.mark.parametrize(
    ("case", "shares_head"),
    [
        ("many trees of mixed sizes", False),
        ("many trees of mixed sizes", True),
        ("answers that fork", True),
        ("answers that begin alike", False),
    ],
)
def test_in_double_precision_a_pack_is_exact(vlm, chat, case, shares_head, monkeypatch):
    """Every path and gradient, with nothing left that rounding could hide."""
    # Recomputed in the backward pass, which `InDouble` does not reach there.
    monkeypatch.setattr(policy, "checkpoint", lambda compute, *inputs, use_reentrant: compute(*inputs))
    vlm.model.double()
    # The kernel for all experts at once knows no doubles.
    if any(".experts." in name for name, _ in vlm.model.named_parameters()):
        vlm.model.set_experts_implementation("eager")
    with InDouble():
        trees = make_trees(chat, CASES[case])
        packed = pack(trees, chat.patches, shares_head=shares_head)
        assert (packed.num_tokens < sum(tree.num_tokens for tree in trees)) == shares_head
        scores = score(vlm, packed)
        ours = gradients(vlm, -(packed.weights * scores.logprobs).sum())
        plain, entropy = padded_logprobs(vlm, chat, trees)
        theirs = gradients(vlm, -(packed.weights * plain).sum())
    assert scores.logprobs.dtype == torch.float64
    torch.testing.assert_close(scores.logprobs, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(scores.entropy, entropy, rtol=0, atol=1e-9)
    assert_same_gradients(ours, theirs, tolerance=1e-9)


def test_chunks_of_the_head_change_nothing(vlm, chat, monkeypatch):
    computed, recomputing = policy._score_chunk, policy.checkpoint
    counts = {"kept": 0, "recomputed": 0}

    def counted(kind, compute, *inputs, **options):
        counts[kind] += 1
        return compute(*inputs, **options)

    monkeypatch.setattr(policy, "_score_chunk", lambda *inputs: counted("kept", computed, *inputs))
    monkeypatch.setattr(
        policy,
        "checkpoint",
        lambda _, *inputs, **options: counted("recomputed", recomputing, computed, *inputs, **options),
    )
    packed = pack(make_trees(chat, CASES["one tree"]), chat.patches)
    whole = score(vlm, packed)
    assert counts == {"kept": 1, "recomputed": 0}
    whole_grads = gradients(vlm, whole.logprobs.sum())
    monkeypatch.setattr(policy, "LOGIT_CHUNK", 4 * vlm.model.get_output_embeddings().weight.shape[0])
    parts = score(vlm, packed)
    assert counts == {"kept": 1, "recomputed": 4}  # 15 targets in chunks of 4
    torch.testing.assert_close(parts.logprobs, whole.logprobs)
    assert_same_gradients(gradients(vlm, parts.logprobs.sum()), whole_grads)


def plain_conversations(vlm: Vlm, demonstrations: list[Demonstration], *, turns: str) -> torch.Tensor:
    """The loss of transformers: whole conversations by the chat template, padded, labels in replies alone."""
    texts, images, tokenizer = [], [], vlm.processor.tokenizer
    words = vlm.family.chat_format
    rules = rules_of(vlm.processor, words, thinking=None)
    for each in demonstrations:
        prompt = vlm.processor.apply_chat_template(
            template_messages(each.problem), tokenize=False, add_generation_prompt=True
        )
        texts.append(prompt + rules.response(each.response) + words.turn_end + words.after_turn)
        images.append([open_image(ref) for ref in each.problem.images])
    vlm.processor.tokenizer.padding_side = "right"
    inputs = vlm.processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], -100)
    head = tokenizer(words.turn_start + words.roles["assistant"], add_special_tokens=False)["input_ids"]
    opening = tokenizer(rules.answer_start, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(words.turn_end)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        starts = [i + len(head) for i in range(len(ids)) if ids[i : i + len(head)] == head]
        for start in starts if turns == "all" else starts[-1:]:
            # What an answer begins with is part of the prompt.
            start += len(opening) if ids[start : start + len(opening)] == opening else 0
            stop = ids.index(end, start) + 1
            labels[row, start:stop] = inputs["input_ids"][row, start:stop]
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    loss = vlm.model(**inputs, labels=labels).loss
    vlm.family.install(vlm.model)
    return loss


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("attention", ["tree", "dense"])
def test_conversations_are_learnt_as_transformers_learns_them(vlm, turns, attention):
    vlm = Vlm(**{**vars(vlm), "attention": attention})
    chat = loading.make_chat(vlm, prompts=Prompts(system=None))
    demonstrations = [
        Demonstration(problem=make_conversation(name, system=system), response=text, teacher="t")
        for name, system, text in (("a", None, "Five.\n\\boxed{5}"), ("bc", "Be brief.", "\\boxed{7}"))
    ]
    trees = [sft.tree_of(each, chat, turns=turns) for each in demonstrations]
    assert trees[0].num_tokens == len(trees[0].prompt.ids) + len(trees[0].branches[0].ids)
    packed = pack(trees, chat.patches)
    assert len(packed.grids) == 6  # every image once
    sums = sft.make_objective("token")(Batch(pack=packed), score(vlm, packed))
    loss = sums.loss / sums.tokens
    ours = gradients(vlm, loss)
    plain_loss = plain_conversations(vlm, demonstrations, turns=turns)
    torch.testing.assert_close(loss, plain_loss, rtol=TOLERANCE, atol=TOLERANCE)
    theirs = gradients(vlm, plain_loss)
    tolerance = tolerance_for(
        vlm, theirs, lambda: gradients(vlm, plain_conversations(vlm, demonstrations, turns=turns))
    )
    assert_same_gradients(ours, theirs, tolerance=tolerance)


def test_packs_may_be_split_anyhow(vlm, chat):
    trees = make_trees(chat, CASES["many trees of mixed sizes"])
    together = score(vlm, pack(trees, chat.patches)).logprobs
    apart = []
    for members in within_budget([t.num_tokens for t in trees], 60):
        apart.append((members, score(vlm, pack([trees[i] for i in members], chat.patches)).logprobs))
    lengths = [sum(len(b.ids) for b in t.branches) for t in trees]
    whole = dict(enumerate(together.split(lengths)))
    for members, part in apart:
        for index, piece in zip(members, part.split([lengths[i] for i in members]), strict=True):
            torch.testing.assert_close(piece, whole[index], rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_logits(vlm, chat):
    packed = pack(make_trees(chat, CASES["no image"]), chat.patches)
    assert not torch.allclose(score(vlm, packed, temperature=0.5).logprobs, score(vlm, packed).logprobs)
    flat = score(vlm, packed, temperature=1e6)
    vocabulary = vlm.model.get_output_embeddings().weight.shape[0]
    torch.testing.assert_close(
        flat.entropy, torch.full_like(flat.entropy, vocabulary).log(), rtol=1e-3, atol=1e-3
    )


def test_gradient_checkpointing_changes_memory_not_gradients(vlm, chat):
    packed = pack(make_trees(chat, CASES["one tree"]), chat.patches)
    vlm.model.train()
    plain = gradients(vlm, score(vlm, packed).logprobs.sum())
    vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(vlm, score(vlm, packed).logprobs.sum()), plain)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 32), (4, 4, 16), (8, 1, 64)])
def test_tree_attention_equals_the_dense_reference(heads, kv_heads, size):
    layout = layout_of([(40, [5, 3, 7]), (17, [9]), (11, []), (60, [30, 1, 20, 44])])
    generator = torch.Generator().manual_seed(0)

    def rand(h):
        return torch.randn(1, h, layout.length, size, generator=generator)

    query, key, value, upstream = rand(heads), rand(kv_heads), rand(kv_heads), rand(heads)
    results = {}
    for name, plan in (
        ("dense", DensePlan(layout, torch.device("cpu"))),
        ("tree", TreePlan(layout, torch.device("cpu"))),
    ):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = plan.attend(0, *inputs)
        results[name] = (output.detach(), *torch.autograd.grad(output, inputs, upstream))
    for ours, reference in zip(results["tree"], results["dense"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "device", "way_out"), [("flex", "cpu", "tree"), ("tree", "cuda", "flex")])
def test_attention_of_another_device_is_refused_at_once(kind, device, way_out):
    settings = Model(name="builtin", attention=kind)
    with pytest.raises(UserError, match=rf"model.attention={kind}: .*\n.*auto \({way_out} on this device"):
        loading.load(settings, device=torch.device(device))
