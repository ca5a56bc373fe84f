"""Mixed steps of RL: their gradient by the plain formula, schedule, exact resume, and what is refused."""

import math

import pytest
import torch
from transformers import AutoModelForImageTextToText

from conftest import LengthGrader, Stopper, make_problem, row_inputs
from rlcs.data import puzzles
from rlcs.engines.local import LocalEngine
from rlcs.errors import ModelError, RecipeError
from rlcs.model import loading
from rlcs.progress import screen
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.objectives import Also, Weights
from rlcs.recipe.schema import Recipe
from rlcs.recipe.stages import Grpo, Optimizer
from rlcs.records import Demonstration, Grade, Rollout, StopReason
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_jsonl
from rlcs.train import grpo
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.groups import make_group
from rlcs.train.learning import Learner
from rlcs.train.local_teacher import LocalTeacher, require_same_format
from rlcs.train.mixing import Mixer
from rlcs.train.run_dir import RunDir
from rlcs.train.trainer import Trainer

REWARDS = {"a": (1.0, 0.0, 1.0), "b": (0.0, 0.0, 0.0), "c": (0.0, 1.0, None), "d": (1.0, 0.0, 0.0)}
"""One group without a difference, and one with an answer that is not scored."""


def fresh(folder):
    vlm = loading.load(Recipe(model={"name": str(folder)}).model)
    return vlm, loading.make_chat(vlm)


def demonstrations(count=5):
    problems = puzzles.load("puzzles", split="train", count=count, seed=5)
    return [Demonstration(problem=p, response=f"so \\boxed{{{p.answer}}}", teacher="t") for p in problems]


def group_of(chat, name, settings):
    problem = make_problem(name)
    rollouts = [
        Rollout(problem_id=name, index=i, ids=(30 + i, *range(40, 42 + 2 * i), 50), stop=StopReason.EOS,
                logprobs=(-1.0,) * (4 + 2 * i), seed=i, text="t")
        for i in range(3)
    ]  # fmt: skip
    grades = [Grade(reward=r, correct=None if r is None else r == 1.0) for r in REWARDS[name]]
    return make_group(problem, chat.prompt(problem), rollouts, grades, settings)


def settings_of(average="token", **also):
    return Grpo(
        prompts_per_step=4, group_size=3, steps=3, max_new_tokens=20, loss_average=average,
        advantage="dr_grpo", also={"sft_batch_size": 3, **also},
        teacher={"model": "t" if also.get("distill") else None, "bound": 0.4},
    )  # fmt: skip


def gradient(vlm):
    return torch.cat([p.grad.flatten() for _, p in vlm.parameters() if p.grad is not None])


def learnt(folder, teacher, settings, *, budget=8192, parts=1):
    """The gradient of one optimiser step, before clipping, with packs of `budget` in so many parts."""
    vlm, chat = fresh(folder)
    settings = settings.model_copy(update={"pack_tokens": budget})
    context = GrpoContext(
        vlm=vlm, reference=None, chat=chat, engine=None, grader=None,
        demonstrations=demonstrations(), teacher=LocalTeacher(vlm=fresh(teacher)[0]),
    )  # fmt: skip
    trainer = Trainer(vlm, Optimizer(lr=0.0, max_grad_norm=1e9), steps=1, max_bad_steps=1)
    learner = Learner(trainer, context, settings, Clock(), Mixer(context, settings, seed=3).begin(0))
    groups = list(enumerate(group_of(chat, name, settings) for name in REWARDS))
    for start in range(0, 4, 4 // parts):
        learner.add(groups[start : start + 4 // parts])
        learner.advance()
    [result] = learner.finish()
    return gradient(vlm), result


def plain(folder, teacher, settings):
    """The same from the formulas, a sequence at a time, by the models' own forward."""
    vlm, chat = fresh(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    other = AutoModelForImageTextToText.from_pretrained(teacher)

    def logprobs(model, prompt, ids):
        row = torch.tensor([[*prompt.ids, *ids]])
        logits = model(**row_inputs(vlm, chat, row, [prompt])).logits[0, len(prompt.ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    sums = {"reward": [], "distill": [], "gap": []}
    for name in REWARDS:
        group = group_of(chat, name, settings)
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            if advantage is None:
                continue
            own = logprobs(model, group.prompt, rollout.ids)
            gap = logprobs(other, group.prompt, rollout.ids).detach() - own.detach()
            ratio = (own - own.detach()).exp()
            sums["reward"].append(-advantage * ratio)
            sums["distill"].append(-gap.clamp(-0.4, 0.4) * ratio)
            sums["gap"].append(-gap)
    average = settings.loss_average
    if average == "token":
        reward = torch.cat(sums["reward"]).mean()
    elif average == "sequence":
        reward = torch.stack([each.mean() for each in sums["reward"]]).mean()
    else:
        reward = torch.cat(sums["reward"]).sum() / (len(sums["reward"]) * settings.max_new_tokens)
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None,
                          demonstrations=demonstrations())  # fmt: skip
    shown = []
    mixer = Mixer(context, settings, seed=3)
    if mixer.demonstrations is not None:
        for each in mixer.demonstrations.take(3):
            shown.append(-logprobs(model, chat.prompt(each.problem), chat.response_ids(each.response)))
    weights = settings.also.at(0, settings.steps)
    loss = weights.reward * reward + weights.distill * torch.cat(sums["distill"]).mean()
    sft = torch.cat(shown).mean() if shown else torch.zeros(())
    loss = loss + weights.sft * sft
    loss.backward()
    vlm.model.load_state_dict(model.state_dict())
    grads = dict(model.named_parameters())
    for name, parameter in vlm.parameters():
        parameter.grad = grads[name].grad
    return gradient(vlm), loss.item(), sft.item(), torch.cat(sums["gap"]).mean().item()


def near(one, other):
    return (one - other).norm() / other.norm()


@pytest.mark.parametrize(
    ("average", "also"),
    [
        ("token", {"reward": 0.6, "sft": 0.3, "distill": 0.8}),
        ("sequence", {"reward": 0.6, "sft": 0.3, "distill": 0.8}),
        ("constant", {"reward": 0.6, "sft": [0.3, 0.0], "distill": 0.8}),
        ("sequence", {"reward": 0.0, "sft": 0.0, "distill": 1.0}),
        ("sequence", {"reward": 1.0, "sft": 0.5}),
        ("token", {"reward": 0.0, "sft": 1.0}),
    ],
)
def test_the_gradient_is_that_of_the_plain_formula(
    random_model_folder, other_model_folder, monkeypatch, average, also
):
    """Each loss by its own mean, in one pack or in many, with groups that come in parts."""
    settings = settings_of(average, **also)
    expected, loss, sft, gap = plain(random_model_folder, other_model_folder, settings)
    for budget, parts in ((8192, 1), (200, 4)):
        found, result = learnt(random_model_folder, other_model_folder, settings, budget=budget, parts=parts)
        assert near(found, expected) < 1e-4, (budget, parts)
        assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
        if settings.also.sft:
            assert result.values["sft_loss"] == pytest.approx(sft, rel=1e-4)
        if settings.also.distill:
            assert result.values["teacher_kl"] == pytest.approx(gap, rel=1e-4)


def test_without_a_difference_of_rewards_a_teacher_still_teaches(
    random_model_folder, other_model_folder, monkeypatch
):
    monkeypatch.setitem(REWARDS, "a", (0.0, 0.0, 0.0))
    monkeypatch.setitem(REWARDS, "c", (1.0, 1.0, 1.0))
    monkeypatch.setitem(REWARDS, "d", (1.0, 1.0, None))
    settings = settings_of(reward=1.0, sft=0.0, distill=1.0)
    found, _ = learnt(random_model_folder, other_model_folder, settings)
    assert near(found, plain(random_model_folder, other_model_folder, settings)[0]) < 1e-4


def test_weights_lie_on_a_line_and_belong_to_arms():
    also = Also(reward=[0.5, 1.0], sft=[1.0, 0.0], distill=0.2, arms=["sft_grpo"])
    assert also.at(0, 5) == Weights(reward=0.5, sft=1.0, distill=0.2)
    assert also.at(2, 5) == Weights(reward=0.75, sft=0.5, distill=0.2)
    assert also.at(4, 5) == Weights(reward=1.0, sft=0.0, distill=0.2)
    assert also.at(0, 1) == Weights(reward=0.5, sft=1.0, distill=0.2)
    assert also.of("grpo").at(3, 5) == Weights(reward=1.0, sft=0.0, distill=0.0)
    assert also.of("sft_grpo") == also
    assert Also().of("mixed").sft == (1.0, 0.0) and Also().of("sft_grpo").ever == {"reward"}


def trained(source, teacher, folder, *, stop_at=None):
    """Four mixed steps; the weights."""
    settings = Grpo(
        steps=4, prompts_per_step=3, group_size=3, max_new_tokens=6, save_every=2, optimizer_steps=2,
        optimizer={"lr": 1e-3}, also={"sft": [1, 0], "distill": 0.5, "sft_batch_size": 4},
        teacher={"model": "t"},
    )  # fmt: skip
    vlm, chat = fresh(source)
    context = GrpoContext(
        vlm=vlm, reference=None, chat=chat, engine=LocalEngine(vlm, chat, max_rows=8),
        grader=LengthGrader(), demonstrations=demonstrations(7), teacher=LocalTeacher(vlm=fresh(teacher)[0]),
    )  # fmt: skip
    problems = puzzles.load("puzzles", split="train", count=10, seed=5)
    with StopFlag() as stop, screen("mixed", settings.steps, quiet=True) as view:
        stage = RunDir(folder, name="mixed", seed=3, settings=settings, recipe_hash="h")
        view = view if stop_at is None else Stopper(view, stop, stop_at)
        grpo.train(context, problems, settings, run=stage, screen=view, stop=stop)
    return {name: p.detach().clone() for name, p in vlm.model.named_parameters()}


def test_a_mixed_stage_stopped_and_continued_equals_the_unbroken_one(
    random_model_folder, other_model_folder, tmp_path
):
    """The demonstrations go on where they were, too."""
    both = random_model_folder, other_model_folder
    unbroken = trained(*both, tmp_path / "a")
    with pytest.raises(Stopped):
        trained(*both, tmp_path / "b", stop_at=2)
    continued = trained(*both, tmp_path / "b")
    for name, weight in unbroken.items():
        assert torch.equal(continued[name], weight), name
    rows = [list(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    for row, twin in zip(*rows, strict=True):
        assert [row.get(key) for key in ("sft_loss", "teacher_kl")] == [
            twin.get(key) for key in ("sft_loss", "teacher_kl")
        ]
    assert [row["weight_sft"] for row in rows[0]] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert math.isfinite(rows[0][3]["teacher_kl"]) and "sft_loss" in rows[0][2]


def test_a_teacher_with_another_tokenizer_or_of_another_family_is_refused(vlm, other_model_folder):
    require_same_format(fresh(other_model_folder)[0], vlm)
    with pytest.raises(ModelError, match=r"tokenizer is another one: .* entries differ"):
        require_same_format(fresh("builtin")[0], vlm)
    with pytest.raises(ModelError, match=r"the teacher is a qwen3_5, the policy a qwen2_5_vl"):
        require_same_format(fresh("builtin-hybrid")[0], vlm)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grpo.also.distill=1", "grpo.also.arms=[sft_grpo]"], "also.distill needs a teacher"),
        (["grpo.teacher.model=x"], "teacher.model is not used"),
        (["grpo.teacher.base_url=http://h/v1"], "a teacher on a server needs model"),
        (["grpo.also.sft=0.1"], "grpo.also is set for mixed, and this study has sft_grpo"),
        (["study.arms=[base,mixed]", "grpo.also.sft=0"], "the arm mixed learns from demonstrations"),
        (["study.arms=[base,mixed]", "grpo.loss_average=micro_batch", "grpo.also.sft=1"], "mean of each"),
        (["study.arms=[base,mixed]", "grpo.loss_average=micro_batch"], "in the arm mixed has a mean"),
        (["study.arms=[base,grpo]", "grpo.also.arms=[grpo]", "grpo.also.sft=1"], "learns from no demonstr"),
        (["grpo.also.reward=0", "grpo.also.arms=[sft_grpo]"], "all weights are 0 in the arm sft_grpo"),
        (["grpo.also.arms=[sft]"], "grpo.also.arms"),
        (
            ["grpo.also={distill: 1, arms: [sft_grpo]}", "grpo.teacher={model: x, base_url: 'http://h/v1'}",
             "grpo.temperature=0.7"],
            "logprobs at temperature 1",
        ),
        (["grpo.also={reward: 0, distill: 1, arms: [sft_grpo]}", "grpo.teacher.model=x",
          "grpo.kl={kind: k3, coefficient: 0.1}"], "kl belongs to the loss of the reward"),
        (["grpo.also={reward: 0, distill: 1, arms: [sft_grpo]}", "grpo.teacher.model=x",
          "grpo.sight.coefficient=0.01"], "sight belongs to the loss of the reward"),
        (["grpo.also={reward: 0, distill: 1, arms: [sft_grpo]}", "grpo.teacher.model=x",
          "grpo.entropy.control=bonus"], "entropy belongs to the loss of the reward"),
        (["grpo.also={reward: 0, distill: 1, arms: [sft_grpo]}", "grpo.teacher.model=x",
          "grpo.mismatch_mask=0.1"], "mismatch_mask belongs to the loss of the reward"),
        (["grpo.also={distill: 1, arms: [sft_grpo]}",
          "grpo.teacher={model: x, base_url: 'http://u:p@h/v1'}"], "the address holds a user or a password"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", ["study.arms=[base,sft,sft_grpo]", *words])
