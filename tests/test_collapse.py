"""Signs that cross their limits in RL, and what is kept of them."""

import random
from dataclasses import replace
from statistics import fmean, median

import pytest

from conftest import LengthGrader, make_problem
from rlcs.recipe.stages import Grpo
from rlcs.records import NOT_FINITE, Grade, Rollout, StopReason
from rlcs.signals import Stopped
from rlcs.storage import read_jsonl
from rlcs.train import collapse
from rlcs.train.collapse import LEAD, CollapseWatch, Signs, examples, kept_crossings, read_batch
from rlcs.train.groups import make_group
from rlcs.train.health import FALLS, SIGNS
from test_train import SMALL, run_grpo


def rows(**curves):
    """Rows of metrics with these values in their steps."""
    count = max(map(len, curves.values()))
    return [{"step": i + 1, **{key: values[i] for key, values in curves.items()}} for i in range(count)]


def crossings(rows, *, gap_limit, without=()):
    """The signs that cross their limits in the last row."""
    signs = Signs(gap_limit, without)
    return list([signs.add(row) for row in rows][-1])


def crossed(**curves):
    return [each.key for each in crossings(rows(**curves), gap_limit=0.02)]


def all_means(values):
    known = [value for value in values if value is not None]
    return [fmean(known[end - 5 : end]) for end in range(5, len(known) + 1)]


def plain_crossings(rows, gap_limit):
    """The same rule, written out over all rows."""
    skipped = [float(row.get("skipped") == NOT_FINITE) for row in rows]
    curves = {key: [row.get(key) for row in rows] for key in {key for row in rows for key in row}}
    curves[NOT_FINITE] = skipped
    limits = {s.key: s.most for s in SIGNS if s.key not in ("unscored", "zero_variance_groups")}
    limits |= {"sampler_gap": gap_limit, NOT_FINITE: 0.5}
    norms = [norm for norm in curves.get("grad_norm", [])[:-5] if norm is not None]
    if len(norms) >= 20:
        limits["grad_norm"] = 10.0 * median(norms)
    found = []
    for key, limit in limits.items():
        means = all_means(curves.get(key, []))
        if len(means) > 1 and means[-1] > limit and not all(mean > limit for mean in means[:-1]):
            found.append((key, means[-1], limit))
    for key, _, _, share, least in FALLS:
        means, before = all_means(curves.get(key, [])), all_means(curves.get(key, [])[:-1])
        if len(means) > 1 and before and max(before) >= least:
            limit = share * max(before)
            if means[-1] < limit and not all(mean < limit for mean in means[:-1]):
                found.append((key, means[-1], limit))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_step_by_step_it_is_the_rule_over_all_rows(seed):
    draw = random.Random(seed)
    keys = [*(sign.key for sign in SIGNS), "grad_norm", "accuracy", "response_tokens", "entropy"]
    signs, made, count = Signs(0.02), [], 0
    level = dict.fromkeys(keys, 1.0)
    for step in range(1, 80):
        level = {key: value * draw.choice([0.2, 1.0, 1.0, 1.0, 5.0]) for key, value in level.items()}
        row = {key: draw.uniform(0.5, 1.5) * level[key] for key in keys if draw.random() < 0.9}
        made.append({"step": step, **row} | ({"skipped": NOT_FINITE} if draw.random() < 0.4 else {}))
        found = [(each.key, each.value, each.limit) for each in signs.add(made[-1])]
        assert found == plain_crossings(made, 0.02)
        count += len(found)
    assert count, "nothing crossed"


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.key)
def test_a_sign_crosses_its_limit_when_the_mean_of_the_last_steps_does(sign):
    limit = 0.02 if sign.key == "sampler_gap" else sign.most
    fine, above = [0.9 * limit] * 5, [1.2 * limit] * 5
    watched = sign.key not in ("unscored", "zero_variance_groups")
    assert crossed(**{sign.key: fine}) == []
    assert crossed(**{sign.key: [*fine, *above[:1]]}) == [], "one step is noise"
    assert crossed(**{sign.key: [*fine, *above]}) == [sign.key] * watched
    assert crossed(**{sign.key: above + above}) == [], "it was so from the beginning"


def test_what_fell_far_below_its_best_is_a_collapse_and_what_was_never_high_is_none():
    assert crossed(accuracy=[0.6] * 8 + [0.2] * 5) == ["accuracy"]
    assert crossed(accuracy=[0.6] * 8 + [0.3] * 5) == []
    assert crossed(accuracy=[0.1] * 8 + [0.0] * 5) == []
    assert crossed(response_tokens=[200] * 8 + [20] * 5) == ["response_tokens"]
    assert crossed(entropy=[1.0] * 8 + [0.05] * 5) == ["entropy"]
    assert not [*crossings(rows(accuracy=[0.6] * 8 + [0.2] * 5), gap_limit=1.0, without=("accuracy",))]


def test_gradients_that_explode_or_are_not_finite():
    assert crossed(grad_norm=[1.0] * 25 + [20.0] * 5) == ["grad_norm"]
    assert crossed(grad_norm=[1.0] * 10 + [20.0] * 5) == [], "too few steps to know what is usual"
    assert crossed(skipped=[""] * 6 + [NOT_FINITE] * 3) == [NOT_FINITE]


def test_a_sign_is_kept_once_and_few_in_all(tmp_path, monkeypatch):
    watch = CollapseWatch(tmp_path, [], gap_limit=0.02)
    curves = {
        key: [0.0] * 6 + [9.0] * 5 + [0.0] * 6 + [9.0] * 5 for key in ("kl", "truncated", "repeated_share")
    }
    for row in rows(**curves):
        if (found := watch.add(row)) is not None:
            watch.kept.append(watch.keep(found, [], ()))
    assert [each.key for each in watch.kept] == ["repeated_share", "truncated"]
    assert watch.kept == kept_crossings(tmp_path)
    again = CollapseWatch(
        tmp_path, rows(**{key: values[:5] for key, values in curves.items()}), gap_limit=0.02
    )
    repeated = [again.add(row) for row in rows(**curves)[5:]]
    assert [found.key for found in repeated if found] == ["repeated_share", "truncated"], (
        "taken again after a stop"
    )


def test_the_checkpoint_lies_some_steps_before(tmp_path):
    watch = CollapseWatch(tmp_path, [], gap_limit=0.02)
    [crossing] = crossings(rows(kl=[0.0] * 100 + [9.0]), gap_limit=0.02)
    assert crossing.step == 101
    for checkpoints, expected in (
        ((50, 90, 100), 90), ((100 - LEAD + 2, 100), 92), ((120,), 0), ((), 0),
    ):  # fmt: skip
        assert watch.keep(crossing, [], checkpoints).checkpoint == expected
    early = replace(crossing, step=20)
    assert watch.keep(early, [], (15,)).checkpoint == 0, "it may begin where the stage begins"


def test_the_examples_are_the_answers_in_which_the_sign_shows(chat):
    texts = [r"\boxed{1}", r"\boxed{1} \boxed{2} \boxed{3}", "none"]
    problem = make_problem("p", sizes=())
    rollouts = [
        Rollout(problem_id="p", index=i, ids=(3,), logprobs=(-1.0,), stop=StopReason.EOS, seed=i, text=text)
        for i, text in enumerate(texts)
    ]
    grades = [Grade(reward=r, correct=bool(r)) for r in (1.0, 0.0, 0.0)]
    group = make_group(problem, chat.prompt(problem), rollouts, grades, Grpo())
    assert examples([group], "boxes_per_answer", 1)[0][0].text == texts[1]
    assert examples([group], "no_format_share", 1)[0][0].text == "none"
    assert examples([group], "kl", 1)[0] == (rollouts[0], 1.0)


class RightUntil(LengthGrader):
    """Grades by length, and from a step on says that nothing is right."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def grade(self, pairs):
        self.left -= 1
        return [replace(grade, correct=self.left >= 0) for grade in super().grade(pairs)]


def test_the_run_keeps_the_batch_and_the_checkpoint_whenever_it_was_stopped(
    random_model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(collapse, "LEAD", 4)
    settings = Grpo(**SMALL | {"steps": 14, "save_every": 3, "optimizer": {"lr": 0.0}})
    run_grpo(random_model_folder, tmp_path / "a", settings, grader=RightUntil(6))
    [crossing] = kept_crossings(tmp_path / "a" / "collapse")
    assert (crossing.key, crossing.step, crossing.checkpoint) == ("accuracy", 10, 6)
    assert crossing.value == pytest.approx(0.2) and "20.0% over the last 5 steps" in crossing.message
    kept = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000009", "step-000012"], "else the newest two"
    batch = read_batch(tmp_path / "a" / "collapse", crossing)
    written = read_jsonl(tmp_path / "a" / "rollouts" / "step-000010.jsonl")
    assert [r.text for group in batch for r in group.rollouts] == [row["response"] for row in written]
    for group in batch:
        assert all(len(r.ids) == len(r.logprobs) for r in group.rollouts) and group.prompt.images
        assert all(image.data is None and image.sha256 for image in group.prompt.images)

    with pytest.raises(Stopped):
        run_grpo(random_model_folder, tmp_path / "b", settings, grader=RightUntil(6), stop_at=6)
    run_grpo(random_model_folder, tmp_path / "b", settings, grader=RightUntil(0))
    for name in ("batch.jsonl", "crossing.json"):
        path = f"collapse/step-000010/{name}"
        assert (tmp_path / "a" / path).read_text() == (tmp_path / "b" / path).read_text()
