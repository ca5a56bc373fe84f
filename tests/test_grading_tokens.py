"""Tokens: LaTeX, plain notation and Unicode become one spelling, and decoration goes."""

import pytest

from rlcs.grading.tokens import MAX_TOKENS, enclosed, latex, spoken, tokenise


def spelling(text: str) -> str:
    return latex(tokenise(text))


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("−5", "-5"), ("5–7", "5-7"), ("2½", r"2\frac{1}{2}"), ("x²", "x^2"), ("10⁻³", "10^{-3}"),
        ("a₁₂", "a_{12}"), ("2√3", r"2\sqrt{3}"), ("√(x+1)", r"\sqrt{x+1}"), ("∛2", r"\sqrt[3]{2}"),
        ("60^{\\circ}", "60°"), ("60 ^\\circ", "60°"), ("60º", "60°"), (r"60\degree", "60°"),
        ("\uff15\u200b", "5"), ("１，２", "1,2"), ("x＝５", "x=5"), ("ℝ", r"\R"), (r"\mathbb{R}", r"\R"),
        ("α", r"\alpha"),
        ("μ", r"\mu"), ("µ", r"\mu"), ("3：4", "3:4"), ("①③", "①③"),
    ],
)  # fmt: skip
def test_unicode_becomes_latex(raw: str, plain: str) -> None:
    assert spelling(raw) == plain
    assert spelling(plain) == plain


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac12", r"\frac12"), ("\x0crac{1}{2}", r"\frac{1}{2}"),
        ("3 × 4", r"3\cdot4"), (r"3 \times 4", r"3\cdot4"), ("3*4", r"3\cdot4"), ("x**2", "x^2"),
        ("x <= 2", r"x\le2"), (r"x \leqslant 2", r"x\le2"), ("x ≤ 2", r"x\le2"), (r"x \lt 2", "x<2"),
        ("x != 2", r"x\ne2"), (r"x \not= 2", r"x\ne2"), (r"x \neq 2", r"x\ne2"),
        ("+/- 2", r"\pm2"), ("a -> b", r"a\to b"), (r"\colon", ":"), (r"A \mid B", "A|B"),
        ("pi", r"\pi"), ("2*pi", r"2\cdot\pi"), ("sqrt(3)", r"\sqrt(3)"), ("theta", r"\theta"),
        ("sin x", r"\sin x"), ("Infinity", r"\infty"), (r"\varnothing", r"\emptyset"),
        (r"0.\overline{3}", r"\frac{3}{9}"), (r"2.1\dot{6}", r"\frac{195}{90}"),
    ],
)  # fmt: skip
def test_every_notation_has_one_spelling(raw: str, plain: str) -> None:
    assert spelling(raw).replace(" ", "") == plain.replace(" ", "")


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (r"$\boxed{\dfrac{1}{2}}$", r"\frac{1}{2}"), (r"\[ 7 \]", "7"), (r"\( 7 \)", "7"), ("$$7$$", "7"),
        (r"\textbf{\text{B}}", "B"), (r"\mathbf{7}", "7"), (r"\displaystyle 7", "7"),
        (r"\left( 1,\; 2 \right)", "(1,2)"), (r"\Bigl[1, 2\Bigr)", "[1,2)"), (r"\color{red} 7", "7"),
        (r"\textcolor{red}{7}", "{7}"), (r"7 \hspace{2mm}", "7"), (r"7\,\checkmark", "7"), ("`7`", "7"),
        (r"\underline{\mathrm{7}}", "7"), (r"7 \quad \square", "7"),
    ],
)  # fmt: skip
def test_decoration_goes(raw: str, plain: str) -> None:
    assert spelling(raw) == plain


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("1,000", "1000"), ("1{,}000", "1000"), (r"1,\!234,\! 567", "1234567"), ("12 345 678", "12345678"),
        ("12\u202f345", "12345"), (r"12\,345.5", "12345.5"), ("-1,000", "-1000"), ("1,000 cm", "1000 cm"),
        (r"\frac{1,000}{3}", r"\frac{1000}{3}"), ("1,000 and 2,000", "1000 and 2000"), ("1{,}5", "1.5"),
        ("1,00", "1,00"), ("1,0000", "1,0000"), ("1, 000", "1,000"), ("0.1,000", "0.1,000"),
        ("(1,000,2)", "(1,000,2)"), ("(1,000, 2,000)", "(1000,2000)"), ("12 34", "12 34"),
        ("1234,567", "1234,567"),
    ],
)  # fmt: skip
def test_digits_in_groups_of_three_are_one_number(raw: str, plain: str) -> None:
    assert spelling(raw) == plain


def test_the_first_dollar_of_an_amount_is_kept_and_those_around_a_formula_go() -> None:
    assert spelling("$5") == spelling(r"\$5") == spelling(r"$\$5$") == "$5"
    assert spelling("$5$") == "5"


def test_words_in_text_commands_are_upright_and_apart() -> None:
    tokens = tokenise(r"5\text{ red balls} + a")
    assert [(t.text, t.upright) for t in tokens if t.kind == "word"] == [
        ("red", True),
        ("balls", True),
        ("a", False),
    ]
    assert spoken(tokens) == "5 red balls + a"


def test_enclosed_sees_only_brackets_of_one_pair() -> None:
    assert enclosed(tokenise("(a)(b)")) is False
    assert enclosed(tokenise("((a)(b))")) and enclosed(tokenise(r"[1, 2)"))
    assert not enclosed(tokenise("(")) and not enclosed(())


def test_a_long_text_gives_a_bounded_number_of_tokens() -> None:
    assert len(tokenise("x " * 100_000)) == MAX_TOKENS + 1
