"""Gold answers as data sets ship them: unwrapped, or refused with a reason."""

import time

import pytest

from plain_grading import grade
from rlcs.grading.golds import unwrap
from rlcs.records import Problem

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
WORKED = r"We add two and three and so get the sum, which is $\boxed{5}$."


@pytest.mark.parametrize(
    ("gold", "text", "mark"),
    [
        ("<answer>D</answer>", "D", "<answer>"),
        ("<think> x </think>\n\n<answer> 5 </answer>", "5", "<answer>"),
        ("<think> it is \\boxed{3} </think> 5", "5", "</think>"),
        ("<answer>The answer is 7.</answer>", "7", "<answer>"),
        ("<answer>B</answer>, so <answer>B</answer>", "B", "<answer>"),
        ("#### 5", "5", "####"),
        ("#### 1,000", "1,000", "####"),
        (GSM8K, "72", "####"),
        (WORKED, "5", "box"),
        (r"$\boxed{5}$", "5", "box"),
        (r"it is \boxed{\frac{1}{2}}, so \boxed{ \frac{1}{2}}", r"\frac{1}{2}", "box"),
        (r"<think>\boxed{1}</think> \boxed{a \boxed{\frac{1}{2}}}", r"\frac{1}{2}", "box"),
        (r"<answer>\boxed{\text{B}}</answer>", r"\text{B}", "box"),
        ("The answer is 5.", "5", "words"),
        ("The answer is $5.50.", "$5.50", "words"),
        ("Answer: B", "B", "words"),
        ("**Answer:** B", "B", "words"),
        ("**Answer: B**", "B", "words"),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "$5$", "words"),
        ("故选：B", "B", "words"),
        ("答案是 12 。", "12", "words"),
        ('["12"]', "12", "list"),
        ("['5']", "5", "list"),
        ("['$\\\\frac{1}{2}$']", r"$\frac{1}{2}$", "list"),
        ('["A","B"]', "A, B", "list"),
        ('["(1,2)", "3"]', "(1,2); 3", "list"),
    ],
)
def test_marks_are_taken_off(gold: str, text: str, mark: str) -> None:
    found = unwrap(gold)
    assert (found.text, found.why) == (text, mark)
    assert (unwrap(text).text, unwrap(text).why) == (text, ""), "what is unwrapped stays"


@pytest.mark.parametrize(
    "gold",
    [
        "5", "5.0", "B", "(B) 12", "Option B", "[1,2]", "[5]", "[]", r"\[ 5 \]", "$x=1$", "a right triangle",
        "Yes. It is symmetric.", "答案不唯一", "S 23.5 ^\\circ W", "x ^ { 2 } + 2 x + 1 " * 9 + "= 0",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "no answer", "box 5",
    ],
)  # fmt: skip
def test_plain_answers_stay_as_they_are(gold: str) -> None:
    assert unwrap(f" {gold}\n") == unwrap(gold)
    assert (unwrap(gold).text, unwrap(gold).why) == (gold, "")


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<answer> </answer>", "empty"),
        (r"\boxed{}", "empty"),
        (r"\boxed{5", "the last box is not closed"),
        (r"\boxed{5} or \boxed{6", "the last box is not closed"),
        (r"\boxed{5} or \boxed{6}", "several boxes that differ"),
        ("First \\boxed{5}.\n\nAfter that \\boxed{6}, and \\boxed{6}.", "several boxes that differ"),
        ("<think> so 5", "the reasoning is not finished"),
        ("<answer>5", "mark around the answer is not complete"),
        ("5</answer>", "mark around the answer is not complete"),
        ("#### Answer\n5", "mark around the answer is not complete"),
        ("<answer>B</answer> or <answer>C</answer>", "several <answer> tags that differ"),
        ('["\\frac12"]', "a list that cannot be read"),
        ('["", "a"]', "a list that cannot be read"),
        ("We add two and three. " * 6, "no answer is marked"),
        ("因为这个三角形是直角三角形" * 5, "no answer is marked"),
        ("The answer is " + "very " * 30 + "long", "no answer is marked"),
    ],
)
def test_what_is_not_clearly_one_answer_is_refused(gold: str, why: str) -> None:
    assert unwrap(gold).text is None and why in unwrap(gold).why


@pytest.mark.parametrize(
    "gold",
    ["\\boxed{" * 5000 + "5" + "}" * 5000, "\\boxed{5}" * 20_000, "<answer>" * 20_000,
     "#### " * 20_000, "答案" * 20_000, "answer: " * 20_000,
     '["' + "a" * 100_000 + '"]', "['" * 3000 + "']" * 3000],
)  # fmt: skip
def test_hostile_golds_end_soon(gold: str) -> None:
    started = time.process_time()
    unwrap(gold)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("gold", ["<answer>D</answer>", "**Answer:** D", "['D']"])
def test_a_problem_made_by_hand_is_graded_by_its_plain_answer(gold: str) -> None:
    problem = Problem(id="1", source="s", question="?", answer=gold, choices=("1", "2", "3", "4"))
    verdicts = [grade(problem, rf"\boxed{{{letter}}}", allow_fallbacks=False).correct for letter in "CD4"]
    assert verdicts == [False, True, True]
