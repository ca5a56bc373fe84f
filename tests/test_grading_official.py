"""The official rules: their quirks by hand, and the published results where the files are at hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlcs.grading.official import mathvision, mathvista, wemath
from rlcs.grading.official.latex2sympy import NoValueError, rounded
from rlcs.grading.official.mathvista import Kind, edit_distance
from rlcs.grading.official.wemath import Steps, four_dimensions, step_accuracies

OFFICIAL = Path(os.environ.get("RLCS_BENCHMARKS", Path(__file__).parents[2] / "shared" / "benchmarks"))
needs_files = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"no benchmark files at {OFFICIAL}: set RLCS_BENCHMARKS"
)


def read(name: str) -> Any:
    text = (OFFICIAL / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else json.loads(text)


# --- MATH-Vision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{A}", "a"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("The final answer is (B).", "b"),
        ("The answer is 12. Because.", "12"),
        ("It must be D.", "d"),
        ("(C)\nThe sides are equal.", "c"),
        (r"\boxed{x = 5\text{ cm}}", "5{cm}"),
        (r"\boxed{60^\circ}", "60"),
        (r"\boxed{20 km}", "20"),
        (r"\boxed{3/4}", r"\frac{3}{4}"),
        (r"\boxed{-0/4}", "-0/4"),
        (r"\boxed{2\sqrt3}", r"2\sqrt{3}"),
        (r"\boxed{.5}", r"\frac{1}{2}"),
        (r"\boxed{\$1.00}", "1.00"),
        ("no idea", "noidea"),
        ("", ""),
    ],
)
def test_mathvision_extraction(response: str, answer: str) -> None:
    assert mathvision.extract(response) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "options", "right"),
    [
        ("a", "A", ("1", "2"), True),
        ("1", "A", ("1", "2"), True),
        ("2", "A", ("1", "2"), False),
        ("60", "A", (r"$60^{\circ}$", "2"), False),  # a degree sign in the option: refused there
        ("a1", "A", ("1", "2"), False),
        ("3.14", r"\pi", (), True),
        ("0.001", "0", (), True),
        (r"2\frac{1}{2}", "2.5", (), False),  # a product there
        ("1:2", "0.5", (), True),
        ("(1,2)", "(1.0,2.001)", (), False),
        ("(0.5,2.5)", r"(\frac{1}{2},2.501)", (), True),
        ("[1,x)", "[1,2)", (), False),
        ("1000", "1,000", (), True),
        ("", "", (), False),
        ("__import__('os')", "5", (), False),
        ("9^{9^{9^{9}}}", "5", (), False),
    ],
)
def test_mathvision_equality(answer: str, gold: str, options: tuple[str, ...], right: bool) -> None:
    assert mathvision.is_correct(answer, gold, options) is right


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5)3", 5), ("1 2", 2), ("12:30", 0.4), ("-2^2", -4), ("2^3^2", 64), ("5.0.0", 0), (r"50\%", 0.5),
        (r"\sqrt[3]{8}", 2), ("e^2", 7.39), (r"\sin{30}", -0.99), (r"\sin^{-1}1", 1.57), (r"\log_2{8}", 3),
        ("5!", 120), (r"\binom{5}{2}", 10), (r"1/2\sqrt{3}", 0.29),
        (r"\lfloor2.5\rfloor", 2), ("2.675", 2.67), (r"2\pi", 6.28), ("+".join(["1"] * 100), 100),
    ],
)  # fmt: skip
def test_values_as_the_official_comparator_reads_them(text: str, value: float) -> None:
    assert rounded(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "5cm",
        "e",
        r"\frac12",
        "1,5",
        "5%",
        "(1",
        r"\sqrt{-1}",
        "1/0",
        "2^-1",
        "1e5",
        "9" * 9999,
        "(" * 999,
        r"\sin" * 999 + "1",
    ],
)
def test_what_has_no_value(text: str) -> None:
    with pytest.raises(NoValueError):
        rounded(text)


def mathvision_totals(items: list[tuple[bool, str, int]]) -> dict[str, str]:
    """Totals of (correct, subject, level) as the official `*_result.json` writes them: `436/3040=14.34%`."""
    counts: dict[str, list[bool]] = {}
    for correct, subject, level in items:
        at = f"level{level}"
        for key in ("-all", f"-{at}", subject, f"{subject}_{at}", f"-{at}_{subject}"):
            counts.setdefault(key, []).append(correct)
    return {
        key: f"{sum(each)}/{len(each)}={round(sum(each) / len(each) * 100, 2)}%"
        for key, each in sorted(counts.items())
    }


@needs_files
def test_mathvision_published_flags_and_totals() -> None:
    problems = {row["id"]: row for row in read("mathvision/test.jsonl")}
    rows = read("mathvision/published/Gemini-Pro-CoT.jsonl")
    items = []
    for row in rows:
        problem = problems[row["id"]]
        answer = mathvision.extract(row["response"])
        assert answer == row["model_answer"], row["id"]
        correct = mathvision.is_correct(answer, problem["answer"], problem["options"])
        assert correct == row["correct"], row["id"]
        items.append((correct, problem["subject"], problem["level"]))
    assert len(items) == 3040
    assert mathvision_totals(items) == read("mathvision/published/Gemini-Pro-CoT_result.json")


# --- MathVista -----------------------------------------------------------------------------------


def test_edit_distance_against_the_slow_way() -> None:
    def slow(one: str, other: str) -> int:
        row = list(range(len(other) + 1))
        for i, x in enumerate(one, start=1):
            last, row = row, [i]
            for j, y in enumerate(other, start=1):
                row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
        return row[-1]

    words = ["", "a", "ab", "ba", "kitten", "sitting", "3/11", "8/11", "none", "No", "Yes", "abcabcabd" * 9]
    assert all(edit_distance(a, b) == slow(a, b) for a in words for b in words)


@pytest.mark.parametrize(
    ("extraction", "kind", "prediction"),
    [
        ("5.9", Kind(question_type="free_form", answer_type="integer"), "5"),
        ("1,000", Kind(question_type="free_form", answer_type="integer"), None),
        ("inf", Kind(question_type="free_form", answer_type="integer"), None),
        ("1.25", Kind(question_type="free_form", answer_type="float", precision=1), "1.2"),
        ("x", Kind(question_type="free_form", answer_type="float", precision=1), None),
        ("[1, 2]", Kind(question_type="free_form", answer_type="list"), "[1, 2]"),
        ("(b) 12", Kind(question_type="multi_choice", answer_type="text", choices=("11", "12")), "12"),
        ("B", Kind(question_type="multi_choice", answer_type="text", choices=("11", "12")), "12"),
        ("", Kind(question_type="multi_choice", answer_type="text", choices=("Yes", "No")), "No"),
    ],
)
def test_mathvista_prediction(extraction: str, kind: Kind, prediction: str | None) -> None:
    assert mathvista.predict(extraction, kind) == prediction


def test_mathvista_shortcut_where_no_language_model_is_asked() -> None:
    whole = Kind(question_type="free_form", answer_type="integer")
    choice = Kind(question_type="multi_choice", answer_type="text", choices=("Yes", "No"))
    assert mathvista.shortcut("", whole) == ""
    assert mathvista.shortcut(" 12 ", whole) == "12"
    assert mathvista.shortcut("No", choice) == "No"
    assert mathvista.shortcut('The answer is "No".', choice) == "No"
    assert mathvista.shortcut("I think it is No", choice) is None


def kind_of(row: dict) -> Kind:
    """What MathVista's rule must know of a question, from a row of its files."""
    fields = {name: row[name] for name in ("question_type", "answer_type", "precision")}
    return Kind(choices=tuple(row["choices"] or ()), **fields)


TOTALS_BY = "question_type answer_type language source category task context grade skills".split()


def mathvista_totals(items: list[tuple[bool, dict[str, Any]]]) -> dict[str, object]:
    """Totals of (correct, fields) as the official score files of 2023 hold them.

    Percentages are texts with two decimals, except the average, which drops a last zero.
    """
    right = sum(correct for correct, _ in items)
    average = {"accuracy": str(round(100 * right / len(items), 2)), "correct": right, "total": len(items)}
    scores: dict[str, object] = {"average": average}
    for key in TOTALS_BY:
        groups: dict[str, list[bool]] = {}
        for correct, fields in items:
            value = fields[key]
            for name in dict.fromkeys(value) if isinstance(value, list) else (value,):
                groups.setdefault(str(name), []).append(correct)
        best_first = sorted(groups.items(), key=lambda group: -sum(group[1]) / len(group[1]))
        scores[key] = {
            name: {"accuracy": f"{100 * sum(each) / len(each):.2f}", "correct": sum(each), "total": len(each)}
            for name, each in best_first
        }
    return scores


@needs_files
def test_mathvista_published_flags_and_scores() -> None:
    items = []
    for row in read("mathvista/output_bard.json").values():
        correct = mathvista.predict(row["extraction"], kind_of(row)) == row["answer"]
        assert correct == row["true_false"], row["pid"]
        items.append((correct, {**row, **row["metadata"]}))
    assert len(items) == 1000
    assert mathvista_totals(items) == read("mathvista/scores_bard.json")


# --- We-Math -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("<Thought process>: <<x>> <Answer>: <<B>>", "B"),
        ("Answer: C. because", "C"),
        ("Answer A. Answer: D", "D"),
        ("Answer: (B)", None),
        (r"\boxed{B}", None),
        ("Because of C", "B"),
        ("Answer: I", None),
        ("", None),
    ],
)
def test_wemath_extraction(response: str, letter: str | None) -> None:
    assert wemath.extract(response) == letter


QUADRANTS = [
    # parts, whole, strict, loose
    ((True, True), True, "cm", "cm"),
    ((True, False), True, "rm", "cm"),
    ((False, False), True, "rm", "rm"),
    ((True, True), False, "ig", "ig"),
    ((True, False), False, "ik", "ik"),
    ((False, False), False, "ik", "ik"),
    ((True, True, True), True, "cm", "cm"),
    ((False, False, True), True, "rm", "cm"),
    ((False, False, False), True, "rm", "rm"),
    ((True, True, True), False, "ig", "ig"),
    ((True, True, False), False, "ik", "ik"),
]


@pytest.mark.parametrize(("parts", "whole", "strict", "loose"), QUADRANTS)
def test_every_quadrant(parts: tuple[bool, ...], whole: bool, strict: str, loose: str) -> None:
    for name, is_loose in ((strict, False), (loose, True)):
        counts = four_dimensions([Steps(parts=parts, whole=whole)], loose=is_loose)
        assert {q: getattr(counts, q) for q in ("ik", "ig", "cm", "rm")} == {
            q: int(q == name) for q in ("ik", "ig", "cm", "rm")
        }


def test_wemath_rates_by_hand() -> None:
    yes, no = Steps(parts=(True, True), whole=True), Steps(parts=(False, False), whole=False)
    rote = Steps(parts=(True, False), whole=True)
    narrow = Steps(parts=(True, True, True), whole=False)
    problems = [yes] * 200 + [no] * 150 + [rote] * 100 + [narrow] * 75
    strict, loose = (four_dimensions(problems, loose=way) for way in (False, True))
    assert strict.total == 525
    assert (f"{strict.ik_rate:.2%}", f"{strict.ig_rate:.2%}") == ("28.57%", "14.29%")
    assert (f"{strict.cm_rate:.2%}", f"{strict.rm_rate:.2%}") == ("38.10%", "33.33%")
    assert f"{strict.score:.2%}" == f"{(525 - 0.5 * 75 - 100 - 150) / 525:.2%}" == "45.24%"
    assert (f"{loose.cm_rate:.2%}", f"{loose.rm_rate:.2%}", f"{loose.score:.2%}") == (
        "57.14%",
        "0.00%",
        "64.29%",
    )
    assert step_accuracies(problems) == {
        "S1": (400 + 100 + 225) / (900 + 225),
        "S2": 300 / 450,
        "S3": 0.0,
    }


def test_wemath_rates_of_nothing_are_zero_not_an_error() -> None:
    nothing = four_dimensions([], loose=False)
    assert (nothing.score, nothing.ik_rate, nothing.rm_rate) == (0.0, 0.0, 0.0)
    failed = four_dimensions([Steps(parts=(False, False), whole=False)], loose=False)
    assert failed.rm_rate == 0.0 and failed.ik_rate == 1.0


def test_wemath_problems_are_grouped_by_id() -> None:
    rows = [("7", "2steps_1", True), ("7", "2steps_multi", False), ("7", "2steps_2", True)]
    assert wemath.group(rows) == {"7": Steps(parts=(True, True), whole=False)}
    with pytest.raises(ValueError, match="problem 7 of 2 steps has only"):
        wemath.group(rows[:2])


@needs_files
def test_wemath_has_525_problems() -> None:
    rows = read("wemath/testmini.json")
    problems = list(wemath.group((row["ID"], row["key"], True) for row in rows).values())
    assert [sum(len(p.parts) == n for p in problems) for n in (2, 3)] == [360, 165]
    assert four_dimensions(problems, loose=False).score == 1.0
    assert step_accuracies(problems) == {"S1": 1.0, "S2": 1.0, "S3": 1.0}


@needs_files
def test_official_verdicts_of_the_case_file() -> None:
    cases = [case for case in read("grader_cases.json")["cases"] if case["kind"] != "reward"]
    for case in cases:
        if case["kind"] == "wemath":
            verdict = wemath.extract(case["prediction"]) == case["gold"]
        else:
            verdict = mathvista.predict(case["prediction"], kind_of(case)) == case["gold"]
        assert verdict == case["expected"], case["id"]
