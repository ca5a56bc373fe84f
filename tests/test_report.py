"""The report: findings as numbers, the page as text, and what hostile or broken folders do to it."""

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from rlcs.errors import RunFolderError
from rlcs.recipe.arms import ARMS
from rlcs.records import Grade, GradedSample, Sample, StopReason
from rlcs.report import build, charts, findings, pictures
from rlcs.report.compare import compare, write_html
from rlcs.report.differences import differences
from rlcs.report.load_run import read_run
from rlcs.report.pages import visible

ALL_ARMS = ("base", "sft", "grpo", "sft_grpo")
SKILL = {"base": 0.32, "sft": 0.55, "grpo": 0.47, "sft_grpo": 0.76}
FAMILIES = ("grid", "bars", "area")


def test_every_arm_has_a_colour_of_its_own_by_day_and_by_night():
    style = (Path(charts.__file__).parent / "style.css").read_text(encoding="utf-8")
    colours = {arm: re.findall(rf"--{arm.replace('_', '-')}: (#\w+);", style) for arm in ARMS}
    assert all(len(each) == 2 for each in colours.values())
    assert all(len({each[k] for each in colours.values()}) == len(ARMS) for k in (0, 1))
    points = [(0.0, 0.0), (1.0, 1.0)]
    drawn = charts.phases_chart("arms", "an area for every arm", [(arm, points) for arm in ARMS])
    assert all(f"var(--{arm.replace('_', '-')})" in drawn for arm in ARMS)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw_image(path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (84, 84), "white")
    pen = ImageDraw.Draw(image)
    for cell in range(9):
        x, y = 28 * (cell % 3), 28 * (cell // 3)
        pen.rectangle((x, y, x + 28, y + 28), outline="#cccccc")
        colour = rng.choice(("#d62728", "#1f77b4", "#2ca02c", "#ffbf00"))
        if rng.random() < 0.7:
            shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
            shape((x + 6, y + 6, x + 22, y + 22), fill=colour)
    image.save(path)


def grpo_row(stage: str, step: int, steps: int, rng: random.Random, lift: float) -> dict[str, object]:
    done = 1 - math.exp(-2.5 * step / steps)

    def near(value: float) -> float:
        return value * (1 + rng.gauss(0, 0.06))

    seconds = {"rollout": near(1.9), "grade": near(0.2), "reference": near(0.3), "update": near(1.1)}
    if step % 20 == 0:
        seconds["save"] = 0.8
    return {
        "stage": stage, "step": step, "steps": steps, "seconds": seconds,
        "loss": rng.gauss(0, 0.02), "lr": 5e-5, "grad_norm": near(0.8), "tokens": 20000,
        "reward": near(0.4 + lift * done), "accuracy": near(0.4 + lift * done), "kl": near(0.02 + 0.1 * done),
        "entropy": near(0.9 - 0.5 * done), "clip_fraction": near(0.01), "ratio_max": 1.4,
        "response_tokens": near(70 + 15 * done), "truncated": near(0.02), "unscored": 0.0,
        "zero_variance_groups": near(0.2 + 0.2 * done), "repeated_share": near(0.01),
        "boxes_per_answer": near(1 + 2 * done if stage == "grpo" else 1),
        "no_format_share": near(0.3 * (1 - done) + 0.01), "sampler_gap": near(1e-5),
    }  # fmt: skip


def make_run(folder: Path, *, arms: tuple[str, ...] = ALL_ARMS, seed: int = 0, problems: int = 60) -> Path:
    """A realistic run folder: `problems` held-out problems, 80 metric rows a stage."""
    rng = random.Random(seed)
    (folder / "eval" / "images").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: quickstart\nseed: 0\ngrpo:\n  steps: 80\n  clip_high: 0.3\n")
    held_out = []
    for index in range(problems):
        name = f"images/{index:04d}.png"
        if index < 60:
            draw_image(folder / "eval" / name, rng)
        family = FAMILIES[index % 3]
        question = (
            f"Count the red shapes and the blue circles in the {family}. How many more red shapes are there?"
        )
        image = {"sha256": f"{index:064}", "width": 84, "height": 84, "path": name}
        held_out.append({"id": f"{family}-{index:04d}", "source": "puzzles", "question": question,
                         "answer": str(index % 7), "choices": ["4", "5"] if index % 2 else [],
                         "metadata": {"family": family, "level": 1 + index % 3},
                         "images": [image] if index < 60 else []})  # fmt: skip
    write_rows(folder / "eval" / "problems.jsonl", held_out)
    summary: dict[str, object] = {}
    for arm in arms:
        summary[arm] = make_arm(folder / "eval" / arm, arm, held_out, rng)
    rows = [{"stage": "sft", "step": s, "steps": 80, "loss": 0.3 + 2 * math.exp(-s / 12) * rng.gauss(1, 0.1),
             "grad_norm": 1.0 + rng.random(), "lr": 1e-3, "tokens_per_s": 9000.0,
             "seconds": {"data": 0.02, "update": 0.9 + 0.1 * rng.random()}}
            for s in range(1, 81)]  # fmt: skip
    write_rows(folder / "sft" / "metrics.jsonl", rows)
    for stage, lift in (("sft_grpo", 0.4), ("grpo", 0.15))[: 2 if "grpo" in arms else 1]:
        write_rows(
            folder / stage / "metrics.jsonl", [grpo_row(stage, s, 80, rng, lift) for s in range(1, 81)]
        )
        rollouts = [rollout(f"train-{g}", i, rng) for g in range(8) for i in range(8)]
        write_rows(folder / stage / "rollouts" / "step-000080.jsonl", rollouts)
    (folder / "cold_start").mkdir()
    (folder / "cold_start" / "stats.json").write_text(
        json.dumps({"asked": 1000, "kept": 752, "kept_share": 0.752})
    )
    write_summary(folder, summary)
    return folder


def write_summary(folder: Path, arms: dict[str, object]) -> None:
    seconds = {"cold_start": 4.0, "sft": 76.0, "sft_grpo": 291.0, "eval_base": 9.0, "eval_sft": 16.0}
    if "grpo" in arms:
        seconds["grpo"] = 280.0
    summary = {"name": "quickstart", "arms": arms, "seconds": seconds, "recipe": {"report": {"gallery": 48}},
               "command": ["rlcs", "quickstart", "--out", "runs/a b"],
               "versions": {"rlcs": "0.1.0", "torch": "2.14.1"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def make_arm(
    folder: Path, arm: str, held_out: list[dict[str, object]], rng: random.Random
) -> dict[str, object]:
    predictions = []
    for problem in held_out:
        correct = rng.random() < SKILL[arm]
        said = problem["answer"] if correct else str(rng.randrange(7, 12))
        steps = "Row 1: red circle, blue square, empty. Row 2: red square, green circle, blue circle. " * 2
        response = f"\\boxed{{{said}}}" if arm == "base" else f"{steps}So the answer is \\boxed{{{said}}}"
        predictions.append({"id": problem["id"], "response": response, "extracted": said, "correct": correct,
                            "reward": float(correct), "why": "equal" if correct else "not equal",
                            "tokens": len(response) // 3, "stop": "eos"})  # fmt: skip
    write_rows(folder / "predictions.jsonl", predictions)
    right = sum(bool(p["correct"]) for p in predictions) / len(predictions)
    scores = {
        "accuracy": right,
        "low": right - 0.03,
        "high": right + 0.03,
        "n": len(predictions),
        "unscored": 0,
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    return scores


def rollout(problem: str, index: int, rng: random.Random) -> dict[str, object]:
    right = rng.random() < 0.6
    return {"id": problem, "index": index, "response": f"Row 1 has two red shapes.\nThus \\boxed{{{index}}}",
            "reward": float(right), "correct": right, "extracted": str(index), "stop": "eos",
            "why": "the same number" if right else "another number", "answer_value": f"number: {index}",
            "gold_value": "quantity: 4 in cm", "tokens": 60, "advantage": 0.8 if right else -1.2}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text, and whether all elements are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "link", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path) -> Page:
    page = Page(build(run).read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("report") / "full", problems=90)
    build(run)
    return run


def built(run: Path) -> Page:
    """The page that the fixture has built."""
    return Page((run / "report" / "index.html").read_text(encoding="utf-8"))


def test_full_page_tells_the_whole_story(full: Path) -> None:
    page = built(full)
    (gap, *_) = differences([read_run(full)])
    assert not gap.clear
    assert f"RL added nothing measurable: {gap.first:.1%} → {gap.second:.1%}" in page.text
    story = ("Cold start + RL against SFT only on the same 90 held-out problems", "includes zero",
             "The cold start (SFT) added", "A cold start before RL added", "RL without a cold start added",
             "Boxes per answer", "Warning sign in RL only: boxes per answer, 1.", "The models disagree",
             "RL after SFT, step 80", "clip_high: 0.3", "torch 2.14.1", "rlcs quickstart --out 'runs/a b'",
             "! over", "Measuring: SFT only")  # fmt: skip
    for words in story:
        assert words in page.text
    assert page.text.count("✓ right") + page.text.count("✗ wrong") == 4 * 48 + 2 * 3 * 3
    assert len([t for t in page.tags if t == "img"]) == 48
    assert len([t for t in page.tags if t == "svg"]) == 1 + 9 + 2 + 3  # arms, RL and SFT curves, phases


def test_page_is_one_file_that_asks_for_nothing(full: Path) -> None:
    page = built(full)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith(("data:image/", "#")) or (tag, value) == ("a", "rollouts.html"), value
    html = (full / "report" / "index.html").read_text()
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html
    assert len(html.encode()) < 5_000_000


def test_every_picture_is_described_and_ids_are_unique(full: Path) -> None:
    page = built(full)
    images = page.tags.count("img")
    assert len([v for t, n, v in page.attributes if (t, n) == ("img", "alt") and v]) == images
    assert len(
        [v for t, n, v in page.attributes if (t, n) == ("svg", "aria-label") and v]
    ) == page.tags.count("svg")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_page_is_the_same_every_time(full: Path) -> None:
    before = (full / "report" / "index.html").read_bytes()
    assert build(full).read_bytes() == before


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x {{ 7*7 }} \x00\x1b[31m\u202egnp.exe"
)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r<b>un", problems=6)
    problems = rows_of(run / "eval" / "problems.jsonl")
    for row in problems:
        row.update(
            id=f"{row['id']}{HOSTILE}",
            question=HOSTILE,
            answer=HOSTILE,
            metadata={"family": HOSTILE, "level": HOSTILE},
        )
    write_rows(run / "eval" / "problems.jsonl", problems)
    for arm in ALL_ARMS:
        rows = rows_of(run / "eval" / arm / "predictions.jsonl")
        for row in rows:
            row.update(
                id=f"{row['id']}{HOSTILE}",
                response=HOSTILE + "\ud800",
                extracted=HOSTILE,
                why=HOSTILE,
                answer_value=HOSTILE,
            )
        write_rows(run / "eval" / arm / "predictions.jsonl", rows)
    rows = rows_of(run / "sft_grpo" / "rollouts" / "step-000080.jsonl")
    write_rows(
        run / "sft_grpo" / "rollouts" / "step-000080.jsonl",
        [{**row, "id": HOSTILE, "response": HOSTILE} for row in rows],
    )
    row = grpo_row("sft_grpo", 1, 80, random.Random(0), 0.4)
    row["seconds"] = {HOSTILE: 1.0}
    write_rows(run / "sft_grpo" / "metrics.jsonl", [{**row, "skipped": HOSTILE}])
    (run / "recipe.yaml").write_text(f"name: '</pre>{HOSTILE}'\n")
    (run / "summary.json").write_text(
        json.dumps({"name": HOSTILE, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    )
    page = page_of(run)
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(
        value.startswith("data:") for tag, name, value in page.attributes if (tag, name) == ("img", "src")
    )
    assert page.text.count("<script>alert(1)</script>") > 6 * 5
    assert "{{ 7*7 }}" in page.text
    assert "\u202e" not in page.text and "\x1b" not in page.text and "\\u202egnp.exe" in page.text


def test_turns_before_a_question_are_shown_wherever_the_question_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=6)
    history = [{"role": "user", "text": "an EARLIER turn"}, {"role": "assistant", "text": "its <b>reply</b>"}]
    asked = [{**row, "history": history} for row in rows_of(run / "eval/problems.jsonl")]
    write_rows(run / "eval/problems.jsonl", asked)
    write_rows(run / "cold_start/problems.jsonl", asked[:1])
    write_rows(run / "cold_start/kept.jsonl", [{"id": asked[0]["id"], "response": "four"}])
    step = run / "sft_grpo/rollouts/step-000080.jsonl"
    write_rows(step.parent / "problems.jsonl", [{**asked[0], "id": row["id"]} for row in rows_of(step)])
    page = page_of(run)
    for turn in ("User an EARLIER turn", "Assistant its <b>reply</b>"):
        assert page.text.count(turn) == 7, "six of held-out problems, one of a teacher"
    assert "an EARLIER turn" in (run / "report/rollouts.html").read_text()


GARBAGE = b'[1]\n{"id": {"a": [1]}, "step": "x", "images": 3, "correct": "yes", "tokens": true}\n\xff{"torn'
KINDS = ["two_arms", "no_eval", "only_sft", "only_recipe", "only_summary", "empty_files", "garbage"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_left_out(tmp_path: Path, kind: str) -> None:
    run = make_run(
        tmp_path / "run", arms=("base", "sft_grpo") if kind == "two_arms" else ALL_ARMS, problems=12
    )
    kept = {
        "no_eval": ("sft", "sft_grpo", "recipe.yaml"),
        "only_sft": ("sft",),
        "only_recipe": ("recipe.yaml",),
        "only_summary": ("summary.json",),
    }.get(kind)
    for path in sorted(run.rglob("*"), reverse=True):
        if kept and not any(path.is_relative_to(run / name) for name in kept):
            path.rmdir() if path.is_dir() else path.unlink()
        elif path.is_file() and kind in ("empty_files", "garbage") and path.name != "recipe.yaml":
            path.write_bytes(GARBAGE if kind == "garbage" else b"")
    page = page_of(run)
    expected = {
        "two_arms": "Cold start and RL together added",
        "no_eval": "RL after SFT: reward 0.",
        "only_sft": "SFT: loss ",
        "only_summary": "Accuracy on held-out problems",
        "garbage": "rlcs report",
    }
    assert expected.get(kind, "Nothing measured yet") in page.text
    if kind != "garbage":
        assert ("RL only" in page.text) == (kind == "only_summary")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to report"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_averaged_and_each_is_shown(tmp_path: Path) -> None:
    for seed in (10, 2):
        make_run(tmp_path / f"seed-{seed}", seed=seed, problems=20)
    page = page_of(tmp_path)
    each = [
        json.loads((tmp_path / f"seed-{s}" / "eval/sft_grpo/scores.json").read_text())["accuracy"]
        for s in (2, 10)
    ]
    assert f"→ {sum(each) / 2:.1%}" in page.text.partition("seeds 2, 10")[2][:80], "the headline"
    assert "on the same 20 held-out problems, mean of 2 seeds" in page.text
    assert "seeds 2, 10" in page.text
    row = page.text[page.text.index("Every model that was measured") :]
    row = row[row.index("Cold start + RL") :]
    assert row.index(f"{each[0]:.1%}") >= 0 and f"{each[1]:.1%}" in row[:120]


def test_problems_of_no_family_and_level_and_without_kept_images_are_shown_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=12)
    rows = rows_of(run / "eval" / "problems.jsonl")
    for row in rows:
        row["metadata"] = {}
        for image in row["images"]:  # type: ignore[attr-defined]
            del image["path"]
    write_rows(run / "eval" / "problems.jsonl", rows)
    page = page_of(run)
    assert "Count the red shapes" in page.text and "could not be read" not in page.text
    assert "img" not in page.tags


def test_images_outside_the_run_or_broken_are_not_embedded(tmp_path: Path) -> None:
    draw_image(tmp_path / "secret.png", random.Random(0))
    draw_image(tmp_path / "eval" / "good.png", random.Random(0))
    (tmp_path / "eval" / "bad.png").write_bytes(b"\x89PNG broken")
    names = ["../secret.png", str(tmp_path / "secret.png"), "bad.png", "absent.png", "good.png"]
    assert len(pictures.embed(tmp_path / "eval", names, most_bytes=30_000)) == 1


def test_large_images_shrink_to_their_share(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(900 * 700 * 3)
    Image.frombytes("RGB", (900, 700), noise).save(tmp_path / "noise.png")
    (picture,) = pictures.embed(tmp_path, ["noise.png"], most_bytes=20_000)
    assert picture.uri.startswith("data:image/jpeg;base64,") and len(picture.uri) < 20_000 * 4 / 3 + 50
    assert (picture.width, picture.height) == (288, 224), "the size on the page, known before it is drawn"


def test_differences_count_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", arms=("base", "sft_grpo"), problems=40)
    (found,) = differences([read_run(run)])
    rows = {arm: rows_of(run / "eval" / arm / "predictions.jsonl") for arm in ("base", "sft_grpo")}
    pairs = [(b["correct"], t["correct"]) for b, t in zip(rows["base"], rows["sft_grpo"], strict=True)]
    assert (found.gained, found.lost) == (pairs.count((False, True)), pairs.count((True, False)))
    assert found.points == pytest.approx((found.gained - found.lost) / 40)
    assert found.low < found.points < found.high


def test_scores_are_counted_when_the_file_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=30)
    (run / "eval" / "grpo" / "scores.json").unlink()
    (run / "summary.json").unlink()
    (result,) = [r for r in findings.arm_results([read_run(run)]) if r.arm == "grpo"]
    rows = rows_of(run / "eval" / "grpo" / "predictions.jsonl")
    assert result.accuracy == sum(bool(r["correct"]) for r in rows) / 30
    assert result.low < result.accuracy < result.high and set(result.by_family) == set(FAMILIES)


def test_gallery_prefers_disagreement_and_fills_shortages(full: Path) -> None:
    run = read_run(full)
    for count in (1, 7, 48, 1000):
        sections = findings.gallery(run, count)
        shown = [p.id for s in sections for p in s.problems]
        assert len(shown) == len(set(shown)) == min(count, 90)
    first = findings.gallery(run, 48)[0]
    assert (
        first.kind == "The models disagree"
        and len(first.problems) >= 24
        and first.total > len(first.problems)
    )
    for problem in first.problems:
        assert len({answers[problem.id].grade.correct for answers in run.answers.values()}) == 2
    assert findings.gallery(run, 48) == findings.gallery(read_run(full), 48)


def test_late_rollouts_show_best_and_worst_of_mixed_groups() -> None:
    def member(group: str, reward: float) -> GradedSample:
        sample = Sample(id=group, stop=StopReason.EOS, tokens=1)
        return GradedSample(sample=sample, grade=Grade(reward=reward, correct=reward > 0))

    rollouts = [member("equal", 1.0)] * 4 + [member("mixed", r) for r in (0.0, 1.0, 0.5, 0.25)]
    groups = findings.late_rollouts(rollouts, groups=1)
    assert [a.sample.id for a in groups[0]] == ["mixed"] * 3
    assert groups[0][0].grade.reward == 1.0 and groups[0][-1].grade.reward == 0.0
    assert len(findings.late_rollouts(rollouts[:1])[0]) == 1


def test_every_part_of_a_reward_has_its_curve_after_the_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=6)
    path = run / "sft_grpo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    write_rows(path, [row | {"reward_accuracy": 0.5, "reward_format": 0.0} for row in rows])
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", build(run).read_text())
    assert titles[:4] == ["Reward", "Reward: accuracy", "Reward: format", "Accuracy on training problems"]
    compared, sides = compare(run, run)
    assert compared.ends["RL after SFT reward_accuracy"] == (0.5, 0.5)
    write_html(tmp_path / "compare.html", compared, sides)
    assert "RL after SFT: reward: format" in (tmp_path / "compare.html").read_text()


def test_health_compares_first_and_last_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", problems=3)
    rows = [{"step": s, "boxes_per_answer": 1.0 if s <= 40 else 9.0, "seconds": {}} for s in range(1, 81)]
    write_rows(run / "sft_grpo" / "metrics.jsonl", rows)
    (boxes,) = [h for h in findings.health([read_run(run)]) if h.sign.name == "Boxes per answer"]
    assert boxes.stages["sft_grpo"] == (1.0, 9.0) and boxes.sign.most == 1.5
    (cut,) = [h for h in findings.health([read_run(run)]) if h.sign.name == "Answers cut at the limit"]
    assert set(cut.stages) == {"grpo"} and cut.stages["grpo"][1] < cut.sign.most


def test_thinning_and_smoothing_keep_means_and_ends() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    short = findings.thin(points)
    assert len(short) <= 300 and findings.thin(short) == short and findings.thin([]) == []
    assert sum(p[1] for p in short) / len(short) == pytest.approx(3.0, abs=0.05)
    assert findings.smooth([1.0, 2.0]) == [1.0, 2.0] and findings.smooth([5.0] * 50) == [5.0] * 50


def test_charts_follow_the_page(full: Path) -> None:
    lines = [("grpo", [[(1.0, 0.1), (2.0, 0.4)]])]
    chart = charts.curve_chart("accuracy", 'told "so" <b>', lines, name="c")
    assert "40%" in chart and "40%" not in charts.curve_chart("reward", "", lines, name="c")
    assert (
        "var(--grpo)" in chart and "#0a0b" not in chart and "<metadata" not in chart and "DejaVu" not in chart
    )
    assert 'aria-label="told &#34;so&#34; &lt;b&gt;"' in chart
    assert charts.phases_chart("p", "one step", [("p0", [(1.0, 2.0)])]).count("<svg") == 1


def test_visible_keeps_words_and_lines() -> None:
    assert visible("größer\n\tΔ 漢字 🙂") == "größer\n\tΔ 漢字 🙂"
    assert visible("a\x00\u202e\r") == "a\\u0000\\u202e\\u000d"


LATEX = r"So $AB = \sqrt{3^2+4^2}$:\n\[ \frac{1}{2} \cdot 10 = \boxed{5} \]\n<b>not bold</b> costs $5 and $6"


@pytest.fixture(scope="module")
def with_latex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with formulas in questions, choices, gold answers and responses, and earlier turns."""
    run = make_run(tmp_path_factory.mktemp("latex") / "run", problems=12)
    rows = rows_of(run / "eval" / "problems.jsonl")
    turns = [{"role": "user", "text": "What is $x^2$?"}, {"role": "assistant", "text": "A square."}]
    for row in rows:
        row |= {"question": r"Find $\frac{a}{b}$.", "answer": r"\frac{3}{4}", "choices": [r"\sqrt{2}", "5"]}
        row["history"] = turns
    write_rows(run / "eval" / "problems.jsonl", rows)
    for arm in ALL_ARMS:
        path = run / "eval" / arm / "predictions.jsonl"
        write_rows(path, [{**row, "response": LATEX, "extracted": r"x_1"} for row in rows_of(path)])
    build(run)
    return run


def test_formulas_are_drawn_and_the_text_is_at_hand(with_latex: Path) -> None:
    html = (with_latex / "report" / "index.html").read_text()
    page = built(with_latex)
    assert page.open == [] and "b" in page.tags and "not bold" in page.text
    assert "<b>not bold</b> costs $5 and $6" in page.text, "text stays text"
    assert page.tags.count("math") == 12 * (1 + 1 + 1 + 1) + 12 * 4 * (1 + 1 + 1)
    assert page.text.count("As it was written") == 12 * 4 and page.text.count(LATEX) == 12 * 4
    assert re.search(r"<b>User</b> What is <math>", html) and "A square." in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_pages_fit_a_phone_and_nothing_in_them_moves(with_latex: Path, tmp_path: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    found, sides = compare(with_latex, with_latex)
    write_html(tmp_path / "compare.html", found, sides)
    pages = [with_latex / "report" / "index.html", with_latex / "report" / "rollouts.html"]
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.add_init_script(
            "window.moved = 0; new PerformanceObserver(list => { for (const shift of list.getEntries()) "
            "moved += shift.value }).observe({ type: 'layout-shift', buffered: true })"
        )
        for path in (*pages, tmp_path / "compare.html"):
            page.goto(path.as_uri())
            page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
        page.goto(pages[0].as_uri())
        page.wait_for_timeout(200)
        assert page.evaluate("moved") == 0
        wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
        shadows = wide + ".map(box => getComputedStyle(box).backgroundImage.split('gradient').length - 1)"
        assert set(page.evaluate(shadows)) == {4}, "each table that goes on has its shadows"
        sizes = (
            "[...document.images].map(i => [i.naturalWidth / i.naturalHeight, i.width / i.height, i.width])"
        )
        for natural, shown, width in page.evaluate(sizes):
            assert abs(natural - shown) < 0.02 and 100 < width < 300
        drawn = "document.querySelector('math mfrac').getBoundingClientRect().height"
        assert page.evaluate(drawn) > 15 and page.evaluate(
            "document.querySelector('math').namespaceURI"
        ).endswith("MathML")
        browser.close()
