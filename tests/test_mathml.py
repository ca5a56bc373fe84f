r"""Formulas in pages: what is drawn, what stays text, and that nothing that a model writes gets out."""

import re
import time
from xml.etree import ElementTree

import pytest
from latex2mathml.converter import Converter

from rlcs.report.mathml import answer_with_formulas, formula, with_formulas


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        (r"so $x^2$.", "so <math><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>."),
        (r"\(\pi\)", "<math><mrow><mi>π</mi></mrow></math>"),
        ("is\n\\[ a<b \\]\nso", 'is<math display="block"><mrow><mi>a</mi><mo>&lt;</mo><mi>b</mi>'),
        ("is\n\\[ a \\]\nso", "</math>so"),
        (r"$\sqrt{2}\,\text{m}$", '<mspace width="0.167em">'),
        (r"\begin{align*}a&=b\end{align*}", '<mtd class="right"><mi>a</mi></mtd>'),
        (r"\boxed{red circle}", '<span class="boxed">red circle</span>'),
        (r"\boxed{\frac{1}{2}}", '<span class="boxed"><math><mrow><mfrac>'),
        (r"\boxed{\boxed{5}}", r'\boxed{<span class="boxed">5</span>}'),
        (r"$\boxed{5}$", '<math><mrow><mrow class="boxed"><mrow><mn>5</mn></mrow></mrow></mrow></math>'),
        (r"$\cancel{5}$", '<mrow class="struck">'),
        (r"$\overline{AB}$", '<mrow class="over"><mrow><mi>A</mi><mi>B</mi></mrow></mrow>'),
    ],
)  # fmt: skip
def test_formulas_are_drawn(text, drawn):
    assert drawn in with_formulas(text)


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 and $10", "$5,$10", "pay $5 for one and 7$ now", "C$ D$", r"\$5 and 6\$", "a $ b $ c",
        r"\boxed{5", r"$\unknown x$", r"$\frac{1}$ ", r"$x_$", r"\\boxed{5}", r"\(" + "x+" * 1000 + r"1\)",
        r"$\def\a{\a\a}\a$", r"\(" + "{" * 51 + "x" + "}" * 51 + r"\)", r"\(" + "{" * 400 + "}" * 400 + r"\)",
    ],
)  # fmt: skip
def test_what_is_no_formula_stays_as_it_was_written(text):
    assert with_formulas(text) == text


def test_a_short_answer_needs_no_delimiters():
    assert "<mfrac>" in answer_with_formulas(r"\frac{3}{4}") and "<msup>" in answer_with_formulas("3^2")
    assert "<msub>" in answer_with_formulas("x_1")
    for words in ("red", "file_name", "$5", "12 cm", "a\nb^2"):
        assert answer_with_formulas(words) == words


HOSTILE = [
    r"\text{<script>alert(1)</script>}", r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}", "</math><script>x",
    r"\href{javascript:alert(1)}{x}", r"\style{position:fixed}{x}", r"\class{problem}{x}", r"\color{red}x",
    r"\hspace{99999em}x", r"\text{\"onload=alert(1) }", r"\begin{array}{\" onload=x}1\end{array}",
    r"\text{&amp;lt;b&amp;gt;<b>}", r"\mathrm{<img src=x>}", r"\colorbox{\"><b>}{x}",
]  # fmt: skip


@pytest.mark.parametrize("latex", HOSTILE)
def test_hostile_formulas_have_no_foreign_elements_or_attributes(latex):
    known = "math mrow mi mn mo mtext mspace mtable mtr mtd mstyle mpadded msup msub span".split()
    for page in (
        with_formulas(f"${latex}$"),
        with_formulas(rf"\boxed{{{latex}}}"),
        answer_with_formulas(latex),
    ):
        tags = re.findall(r"<(/?)(\w+)([^<>]*)>", page)
        assert {name for _, name, _ in tags} <= set(known)
        written = {name for *_, attributes in tags for name in re.findall(r"([\w-]+)=", attributes)}
        assert written <= {"stretchy", "form", "fence", "display", "mathvariant", "class"}
        assert page.count("<") == page.count(">") == len(tags), "everything else is escaped"


def test_elements_that_are_not_in_the_list_are_rows(monkeypatch):
    text = "<math><script src='x'>alert(1)</script><mi onclick='x'>y</mi></math>"
    strange = ElementTree.fromstring(text)  # noqa: S314 - written here
    monkeypatch.setattr(Converter, "convert_to_element", lambda self, latex: strange)
    assert formula("x") == "<math><mrow>alert(1)</mrow><mi>y</mi></math>"


def test_no_text_costs_much():
    started = time.monotonic()
    for text in ("$" * 3000, r"\boxed{" * 400, r"\boxed{" * 180 + "}" * 180, "$x" * 1500,
                 r"\[" * 1500, r"\(" * 1500, r"$\frac" * 500,
                 r"\begin{align}" * 230, "a^" * 1500, "$a $b" * 600):  # fmt: skip
        assert "<script" not in with_formulas(text) + answer_with_formulas(text)
    assert time.monotonic() - started < 3
    assert formula(r"\frac") is None
