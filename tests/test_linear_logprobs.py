"""Logprobs by chunks of logits that become their own gradients: equal to the plain way, in less memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from conftest import make_problem
from rlcs.model import loading, policy
from rlcs.model.linear_logprobs import linear_logprobs
from rlcs.model.packing import pack
from rlcs.model.policy import _score_chunk
from rlcs.recipe.schema import Model
from rlcs.records.trees import Branch, Tree
from test_plan_memory import measured_peak

COUNT, HIDDEN, VOCABULARY = 37, 24, 301


def plain(states, weight, targets, temperature, softcap=None):
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    capped = head if softcap is None else lambda states: softcap * torch.tanh(head(states) / softcap)
    logprobs, entropy = _score_chunk(states, targets, capped, temperature)
    return logprobs, entropy, head.weight


def tensors(dtype, *, trains):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(COUNT, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_(trains)
    targets = torch.randint(0, VOCABULARY, (COUNT,), generator=generator)
    upstream = torch.randn(COUNT, generator=generator)
    return states, weight, targets, upstream


@pytest.mark.parametrize("rows", [1, 10, 37, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_float32_equals_the_plain_way(rows, temperature, trains, softcap):
    states, weight, targets, upstream = tensors(torch.float32, trains=trains)
    logprobs, entropy, of_head = plain(states, weight, targets, temperature, softcap)
    logprobs.backward(upstream)
    expected, states.grad = states.grad, None
    ours, own_entropy = linear_logprobs(
        states, weight, targets, temperature=temperature, rows=rows, softcap=softcap
    )
    ours.backward(upstream)
    torch.testing.assert_close(ours, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states.grad, expected, rtol=1e-4, atol=1e-5)
    assert not own_entropy.requires_grad
    if trains:
        torch.testing.assert_close(weight.grad, of_head.grad, rtol=1e-4, atol=1e-5)
    else:
        assert weight.grad is None


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("of", ["both", "entropy"])
def test_gradients_of_entropies_are_exact(rows, softcap, of):
    """Against torch's own entropy of a categorical distribution, in double precision."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors(torch.float32, trains=True)[:2]]
    logits = exact[0] @ exact[1].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    truth = torch.distributions.Categorical(logits=logits / 0.6)
    states, weight, targets, upstream = tensors(torch.float32, trains=True)
    of_entropy = torch.linspace(-1, 2, COUNT)
    factor = 1.0 if of == "both" else 0.0
    (factor * upstream * truth.log_prob(targets) + of_entropy * truth.entropy()).sum().backward()

    options = {"temperature": 0.6, "rows": rows, "softcap": softcap, "entropy_gradient": True}
    ways = [linear_logprobs(states, weight, targets, **options)]
    head = lambda x: x @ weight.T if softcap is None else softcap * torch.tanh(x @ weight.T / softcap)  # noqa: E731
    ways.append(checkpoint(_score_chunk, states, targets, head, 0.6, True, use_reentrant=False))
    for logprobs, entropy in ways:
        states.grad = weight.grad = None
        torch.testing.assert_close(entropy.double(), truth.entropy(), rtol=1e-5, atol=1e-5)
        loss = (of_entropy * entropy).sum()
        (loss if of == "entropy" else loss + (upstream * logprobs).sum()).backward()
        for found, tensor in zip((states.grad, weight.grad), exact, strict=True):
            torch.testing.assert_close(found.double(), tensor.grad, rtol=1e-4, atol=2e-5)


def test_a_pack_without_targets_has_gradients_of_zero():
    """A rank that has fewer packs than another gets one of padding, which has no targets."""
    states, weight, targets, _ = tensors(torch.float32, trains=True)
    logprobs, entropy = linear_logprobs(states[:0], weight, targets[:0], temperature=0.6, rows=10)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(states.grad, torch.zeros_like(states))


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_way():
    states, weight, targets, upstream = tensors(torch.bfloat16, trains=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    truth = torch.log_softmax(exact[0] @ exact[1].T, -1).gather(1, targets[:, None])[:, 0]
    truth.backward(upstream.double())
    logprobs, _, of_head = plain(states, weight, targets, 1.0)
    logprobs.backward(upstream)
    theirs, states.grad = (logprobs.detach(), states.grad, of_head.grad), None
    ours, _ = linear_logprobs(states, weight, targets, temperature=1.0, rows=10)
    ours.backward(upstream)
    own = (ours.detach(), states.grad, weight.grad)
    for mine, their, right in zip(own, theirs, (truth.detach(), exact[0].grad, exact[1].grad), strict=True):
        error, other = ((found.double() - right).norm() / right.norm() for found in (mine, their))
        assert error < 1.5 * other < 0.05


@pytest.mark.parametrize("freeze", [(), ("language_model",)])
def test_a_model_with_fused_loss_learns_the_same(random_model_folder, monkeypatch, freeze):
    """Logprobs, entropies and every gradient; in several chunks of logits."""
    monkeypatch.setattr("rlcs.model.policy.LOGIT_CHUNK", 4000)
    found = []
    for fused in (False, True):
        settings = Model(name=str(random_model_folder), fused_loss=fused)
        vlm = loading.load(settings, device=torch.device("cpu"))
        loading.freeze(vlm, freeze)
        chat = loading.make_chat(vlm)
        branches = tuple(Branch(ids=tuple(range(30 + i, 50 + i)), weights=(1.0,) * 20) for i in range(3))
        tree = Tree(prompt=chat.prompt(make_problem("a", "q", ((56, 84),))), branches=branches)
        assert policy.LOGIT_CHUNK // vlm.model.config.text_config.vocab_size < 30
        scores = policy.score(vlm, pack([tree], chat.patches), temperature=0.7)
        (scores.logprobs * torch.linspace(-1, 1, 60)).sum().backward()
        gradients = {name: p.grad for name, p in vlm.parameters()}
        found.append({"logprobs": scores.logprobs.detach(), "entropy": scores.entropy} | gradients)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("of_entropy", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_loss_takes_less_memory(fused, of_entropy):
    """Beyond states, weights and gradients: one gradient of the head and two chunks of logits.

    One more chunk where entropies have a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 20_000, bias=False)
    states = torch.randn(100, 64, generator=generator).requires_grad_()
    targets = torch.randint(0, 20_000, (100,), generator=generator)

    def step():
        if fused:
            options = {"temperature": 1.0, "rows": 20, "entropy_gradient": of_entropy}
            logprobs, entropy = linear_logprobs(states, head.weight, targets, **options)
        else:
            pairs = zip(states.split(20), targets.split(20), strict=True)
            settings = (head, 1.0, of_entropy)
            parts = [checkpoint(_score_chunk, s, t, *settings, use_reentrant=False) for s, t in pairs]
            logprobs, entropy = (torch.cat([part[i] for part in parts]) for i in range(2))
        (logprobs + entropy if of_entropy else logprobs).sum().backward()

    chunk, weight = 4 * 20 * 20_000, head.weight.nbytes
    peak = measured_peak(step)
    assert (peak < weight + (2.2 + of_entropy) * chunk) == fused, (peak, weight, chunk)
