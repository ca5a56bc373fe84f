"""Which answers are right: pairs of every kind of value, and where math-verify is asked."""

import pytest

from plain_grading import grade
from rlcs.grading.answers import MAX_ANSWER, compare
from rlcs.grading.rewards import quick_grade
from rlcs.records import Grade, Problem


def problem(answer: str) -> Problem:
    return Problem(id="p", source="test", question="?", answer=answer)


RIGHT = [
    ("1,000", "1000"), ("5.0", "5"), ("0.5", r"\frac{1}{2}"), (r"2\frac{1}{2}", "2.5"), ("2 1/2", "2.5"),
    (r"1.2 \times 10^3", "1200"), ("016", "16"), (r"\frac{360}7", "360/7"), ("((((1))))", "1"),
    ("2^10", "1024"), (r"\frac{7^3}{2^{2} 13^2}", "343/676"),
    ("-2^2", "-4"), (r"\sqrt{16}", "4"), ("(3!)!", "720"),
    (r"5\text{ cm}", "5"), ("5 cm^2", "5 square centimeters"), ("60°", "60"), ("12 days", "12"),
    ("7 apples", "7"), ("69^\\circ", "69{degrees}"),
    (r"8\sqrt{3}", r"8\sqrt{3}{squareinches}"), ("50%", "0.5"), ("50", r"50\%"),
    ("35", "35掳"), ("x=5", "5"), ("5", "x = 5"), ("(1,2)", "( 1, 2 )"), (r"\{1,2\}", r"\{2,1\}"),
    ("2 or 3", "3, 2"), ("1:2", "1 : 2"), (r"\text{Rectangle}", "rectangle"), ("(B).", "B"),
    ("The answer is 5", "5"), ("中间", "中间"), ("S 23.5^\\circ W", "S 23.5 ^\\circ W"),
    # numbers in groups, with units
    ("2,500 m", "2500"), ("2500", "2,500 m"), (r"45,\! 678", "45678"), ("45 678", "45678"),
    (r"1,500\%", "1500%"),
    ("8厘米", "8"), ("8", "8平方米"), ("20元", "20 yuan"), ("45度", "45°"), ("7 Ω", "7"),
    ("3 μm", r"3\ \mu m"),
    (r"2.4 \frac{m}{s^2}", "2.4 m/s^2"), ("6 N·m", "6"), ("6 miles", r"6\mathrm{~miles}"),
    ("$7.50", "7.5 dollars"),
    # variables are no units, and units are no variables
    ("7 b", "7b"), (r"b \cdot 7", "7 b"), ("12-5m", "-5m+12"), ("-y+x", "x - y"), ("2m", "2"),
    # formulas in every notation
    ("y/b", r"\frac{y}{b}"), (r"e^{b}\cdot 5", "5e^{b}"), ("3*pi", r"3\pi"), ("exp(4)", "e^4"),
    ("ln(3)", r"\ln 3"),
    ("2theta", r"2\theta"), ("sqrt(7)/3", r"\frac{\sqrt7}{3}"), ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    ("x^-2", r"\frac1{x^2}"),
    (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+2x+1", "(x+1)^2"), (r"24+4\pi", r"4\pi+24"), ("(n+1)!", "(n+1) n!"),
    # matrices and systems
    (r"\begin{pmatrix} 5 & 6 \\ 7 & 8 \\ \end{pmatrix}", r"\begin{pmatrix}5&6\\7&8\end{pmatrix}"),
    (r"\begin{bmatrix}5\\ \frac{12}{2}\end{bmatrix}", r"\begin{pmatrix}5\\6\end{pmatrix}"),
    (r"\left(\begin{array}{c}5\\6\end{array}\right)", r"\begin{pmatrix}5\\6\end{pmatrix}"),
    ("(5, 6)", r"\begin{pmatrix}5\\6\end{pmatrix}"),
    ("a = 3, b = 4", r"\begin{cases} a=3 \\ b=4 \end{cases}"), ("3, 4", "a=3, b=4"), ("b=4, a=3", "a=3, b=4"),
    # bases, ratios, dates
    (r"73_{\text{nine}}", "73_9"), ("73", "73_9"), ("073_9", "73_{9}"), ("XY : YZ = 2 : 5", "2:5"),
    ("2∶5", "XY:YZ=2:5"),
    (r"0.5 \colon 2", r"\frac12 : 2"), ("March 3rd", "3 March"), ("2023-07-09", "July 9, 2023"),
    ("8–12", "8-12"),
    ("9:15 AM", "9:15 a.m."),
    # relations and sets
    (r"y \lt 4", "y<4"), ("y >= 4", r"y \geq 4"), (r"(-\infty,-2)\cup(2,\infty)", "y<-2 or y>2"),
    ("-2<=y<1", "[-2,1)"),
    (r"\{y \mid y > 4\}", r"(4, \infty)"), ("ℝ", r"\mathbb{R}"), (r"\varnothing", r"\emptyset"),
    ("4, -4", r"\pm 4"),
    ("3x - 2y = 1", "6x = 2 + 4y"), ("y = 3x - 2", "3x - y - 2 = 0"), ("(3;4)", "(3,4)"),
    ("{4, 3}", r"\{3, 4\}"),
    (r"2 \pm \sqrt5", r"2-\sqrt{5}, 2+\sqrt{5}"), ("g(x) = 3x", "3x"), ("3x", "g(x) = 3x"),
    ("12 = 3*4", "12"), ("0.5", r"\sin 30°"),
    # wrapped golds, words
    ("D", "<answer>D</answer>"), ("8", "#### 8"), ("8", r"So the total is $\boxed{8}$."), ("8", r"\[ 8 \]"),
    ("no solution", "No solution."), ("the red one", "red one"), ("blue and red", "red, blue"),
    ("C, A", "AC"),
]  # fmt: skip
WRONG = [
    ("1 2", "12"), ("3.14", r"\pi"), ("0.333", "1/3"), ("1/2^{98}", "1/2^{99}"),
    ("5 m", "5 cm"), ("5 cm", "5 cm^2"),
    ("5 million", "5"), ("0.5%", "50%"), ("50", "0.5"), ("y=5", "x=5"), ("[1,2)", "(1,2)"),
    ("(2,1)", "(1,2)"), ("1,2,3", "1,2"), ("5 or 6", "5"),
    ("2:4", "1:2"), ("12:00", "1:00"), ("n=2,3,4", "n=1,2,3"),
    ("teal", "late"), ("no", "on"), ("birth", "birthday"), (r"\pm 2021", "2021"),
    ("5 because of symmetry", "5"), ("z", "X+Y=Z"), ("A, B", "B"), (" ", "5"),
    ("9**9**9**9", "5"), ("10**10**10", "5"), ("(10!)!", "5"),
    ("(1+x)**5000-(1+x)**4999", "2x"), ("nan", "5"), ("1/0", "0"),
    # a variable or a noun of number is not dropped
    ("7", "7 b"), ("7", "7b"), ("7", "12-5n"), ("9 tenths", "9"), ("9", "9 halves"), ("6 thousand", "6"),
    ("6 dozen", "6"),
    ("6 squared", "6"), ("6 factorial", "6"), ("2", "2n^2"), (r"\sqrt5", r"\sqrt5 b"),
    (r"4\pi", r"4\pi r"), ("7 b", "7 cm"),
    ("3", "3 PQR"), ("$6 million", "6"), ("xy", "-xy"), ("PQ", "-PQ"),
    # units of another dimension or size
    ("9 km", "9 m"), ("4小时", "4分钟"), ("5千克", "5克"), ("30°F", "30°C"), ("8 m/s", "8 m/s^2"),
    ("$5", "5 euros"),
    # formulas
    ("2^", "2^{m}"), ("3e^{a}", "3e^{b}"), ("x+1", "y+1"), ("(mv)^2", "mv^2"), ("1000000", "999999"),
    ("4", r"4\sqrt(3)"),
    (r"\frac{1}{2}x", r"\frac{1}{2x}"), ("x^2 - 9", "x^2 + 9"), ("D_6^2", "D_6^3"),
    (r"\log_3 5", r"\log_5 3"), ("3.14159", r"\pi"),
    # groups of digits, bases, ratios, dates
    ("45", "45,000 units"), ("45,678", "(45,678)"), ("73_8", "73_9"), ("110_{2}", "110_{16}"),
    ("6", "110_2"), ("1/2", "1:2"),
    ("5:2", "2:5"), (r"\frac{2}{5}", "AB:BC=2:5"), ("2017", "2023-07-09"), ("-1", "2010-2011"),
    ("-4", "8–12"), ("July 8", "July 9"),
    ("2/3", "2/3/2023"), ("9:15 PM", "9:15 AM"), ("9.25", "9:15"),
    # matrices, lists, named values
    (r"\begin{pmatrix}6\\5\end{pmatrix}", r"\begin{pmatrix}5\\6\end{pmatrix}"),
    (r"\begin{pmatrix}5&6\end{pmatrix}", r"\begin{pmatrix}5&6\\7&8\end{pmatrix}"),
    ("4, 3", "a=3, b=4"), ("a=4, b=3", "a=3, b=4"), ("a=3", "a=3, b=4"), ("a=3, c=4", "a=3, b=4"),
    ("3, 3", r"\{3, 4\}"),
    # relations and sets
    ("y > 4", r"y \ge 4"), ("y < 4", "y > 4"), ("x > 4", "y > 4"), ("-2<y<2", "y<-2 or y>2"),
    (r"\{0\}", r"\emptyset"), ("0", "no solution"),
    ("y = 3x + 2", "y = 3x - 2"), ("3x - 2y = 2", "3x - 2y = 1"), (r"a \perp b", r"a \parallel b"),
    ("2x = 10", "x = 5"),
    ("AC", "A"), ("A", "AC"), ("AB", "AC"), ("red", "red and blue"), ("错", "对"), ("①②", "①③"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "gold"), RIGHT)
def test_equal_without_math_verify(given: str, gold: str) -> None:
    verdict = compare(given, gold)
    assert verdict.correct is True and verdict.why, verdict


@pytest.mark.parametrize(("given", "gold"), WRONG)
def test_not_equal(given: str, gold: str) -> None:
    result = quick_grade(problem(gold), f"\\boxed{{{given}}}", allow_fallbacks=False)
    assert not (isinstance(result, Grade) and result.correct), result
    full = grade(problem(gold), f"\\boxed{{{given}}}", allow_fallbacks=False)
    assert full.correct is False and full.reward == 0.0 and full.why


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        (r"\int_0^1 2x dx", r"\int_0^1 2x\, dx", True),
        (r"\sum_{n=1}^{3} n", "6", True),
        (r"\sum_{n=1}^{3} n", "7", False),
    ],
)
def test_formulas_beyond_our_grammar_go_to_math_verify(given: str, gold: str, right: bool) -> None:
    quick = compare(given, gold)
    assert quick.correct is True or (quick.correct is None and all(quick.formulas))
    assert grade(problem(gold), f"\\boxed{{{given}}}", allow_fallbacks=False).correct is right


@pytest.mark.parametrize(("given", "gold"), [*RIGHT[::4], *WRONG[::4]])
def test_a_verdict_names_both_values_and_the_rule(given: str, gold: str) -> None:
    verdict = compare(given, gold)
    if verdict.why != "the same text":
        assert ": " in verdict.answer_value and ": " in verdict.gold_value


def test_values_in_words() -> None:
    verdict = compare(r"0.5 \text{ cm}", r"x = \frac{1}{4} \text{ m}")
    assert verdict.correct is False and verdict.why == "another unit: cm against m"
    assert verdict.answer_value == "quantity: 1/2, written 0.5 cm"
    assert verdict.gold_value == r"named value: x = 1/4, written \frac{1}{4} m"


def test_numbers_to_a_number_of_decimal_places() -> None:
    assert compare("3.14", "3.1416").correct is False
    assert compare("3.14 cm", "x = 3.1416", places=2).correct is True
    assert compare("3.15", "3.1416", places=2).correct is False
    assert compare(r"\frac{22}{7}", "3.14", places=2).correct is True
    assert compare("3.14, 2", "3.1416", places=2).correct is False


def test_a_long_answer_is_wrong_unless_it_is_the_gold_answer_itself() -> None:
    long = "1+" * 1_500 + "1"
    assert compare(long, long).correct is True
    assert compare(long, "1501").correct is False
    assert compare("1" * (MAX_ANSWER + 1), "1" * (MAX_ANSWER + 1)).correct is False
