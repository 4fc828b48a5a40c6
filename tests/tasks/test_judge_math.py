"""The judge of answers from files: numbers, words, and what it refuses before math-verify does anything."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.tasks.grading.answers import counted_as, plain_number
from r1hpc.tasks.grading.arithmetic import RefusedError
from r1hpc.tasks.grading.judge_math import judge, refuse_costly


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", Fraction(42)),
        (" -42\n", Fraction(-42)),
        ("$1,234.50", Fraction("1234.5")),
        *(("1.5e3", Fraction(1500)), ("2E-2", Fraction(1, 50)), ("1e999", None), ("2e", None)),
        ("-$3", Fraction(-3)),
        ("7.", Fraction(7)),
        ("007", Fraction(7)),
        ("1,23", None),
        ("12,345,678", Fraction(12345678)),
        ("1234,567", None),
        ("\u0664\u0662", None),
        ("9" * 31, None),
        ("e3", None),
        ("--1", None),
        ("4 2", None),
        ("", None),
    ],
)
def test_plain_numbers(text: str, number: Fraction | None) -> None:
    assert plain_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        ("tac", "cat", False),
        ("t a c", "cat", False),
        ("Cat", "cat", True),
        (r"\text{east}", "east", True),
        ("East.", r"\text{east}", True),
        ("new  york", "New York", True),
        ("York New", "New York", False),
        ("stop", "pots", False),
        ("Öle", "öle", True),
        ("yx", "xy", True),
        ("well-known", "Well-known", True),
        ("Bob, Alice", "Alice, Bob", True),
        (r"\text{Alice} \text{ and } \text{Bob}", "Bob and Alice", True),
        (r"x \cdot y", "xy", True),
        ("y*x", "xy", True),
        ("b + a", "a + b", True),
        ("2x", "x2", True),
    ],
)
def test_words_are_no_products(text: str, answer: str, is_right: bool) -> None:
    assert judge(text, answer, {}) is is_right


@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        *(("2x", "2", False), ("12+5x", "12", False), ("5i", "5", False), ("3pi", "3", False)),
        *(("3 sqrt(2)", "3", False), ("2 sqrt(4)", "4", True), ("2e", "2", False)),
        *(("log_2(8)", "3", True), ("log_2(8)", "8", False), ("log_2 8", "8", False)),
        *(
            ("The square root of 16 is 4", "4", True),
            ("100 mod 7 = 2", "2", True),
            ("17 mod 5 is 2", "2", True),
        ),
        *(("The sum of the roots of the polynomial is 5", "5", True), ("remainder modulo 7 is 3", "3", True)),
        *(("The value of log_2(8) is 3", "3", True), ("So log_2 of 8 is 3", "3", True)),
        *(("5 (log_2 scale)", "5", True), ("log_2(8) = 3", "3", True)),
        *(("cube root of 8", "8", False), ("2 mod 5", "5", False), ("1.5e3", r"\frac{3000}{2}", True)),
        *(
            ("3, 5", "5", False),
            ("$3 or $5", "5", False),
            ("x = -3, 5", "5", False),
            ("3 and 5.", "5", False),
        ),
        *(("2x^2", "2", False), ("Tom has 3x as many, so 21", "21", True), ("June 5, 2023", "2023", True)),
        *(("the answer is 42", "42", True), ("40 + 2", "42", True), ("5 m", "5", True), ("7 in", "7", True)),
        *(("2x = 10, x = 5", "5", True), ("3 apples and 5 pears, 8", "8", True), ("10%", "10", True)),
    ],
)
def test_a_number_that_goes_on_is_another_value(text: str, answer: str, is_right: bool) -> None:
    """math-verify takes the last number of what is no formula."""
    assert judge(text, answer, {}) is is_right


@given(st.decimals(-(10**12), 10**12, places=4))
def test_a_written_number_is_read_back(number: object) -> None:
    assert plain_number(f"{number}") == Fraction(f"{number}")
    assert plain_number(f"{number:,}") == Fraction(f"{number}")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "99**98**97",
            "9^9^9",
            "9^{9^{9}}",
            "2^{-10000}",
            "10^{ 1000000 }",
            "9999!",
            "9999999 !",
            "{9999}!",
        ),
        *(r"\int_0^1 x dx", r"\sum_{k=1}^n k", r"\prod k", r"\lim_{x\to 0} x", r"\iint f", "1" * 31),
        *("(" * 25 + "1", "\\frac{" * 30 + "1" + "}{2}" * 30, "[{(" * 9),
    ],
)
def test_costly(text: str) -> None:
    with pytest.raises(RefusedError):
        refuse_costly(text)


@pytest.mark.parametrize(
    "text",
    [
        *("x^2y^3", "2^{10}", "e^{x^2}", "5!", "999!", r"\frac{1}{2}", r"\sqrt{18}", "x^2+2x+1", "10^{100}"),
        *(r"\left(\frac{1}{2}\right)^{2}", r"\{1,2,3\}", "1" * 30, "a**2*b**2", r"\sin(x)^2", r"\limits"),
    ],
)
def test_not_costly(text: str) -> None:
    refuse_costly(text)


def test_what_is_costly_to_compute_is_right_where_it_is_the_answer_but_for_how_it_is_set() -> None:
    assert judge(r"$\left(2\right)^{1005}$", "(2)^{1005}", {})
    with pytest.raises(RefusedError):
        judge("2^{1006}", "2^{1005}", {})
    assert not judge("2,100", "2, 100", {}), "a number is no list"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\$18", "18"),
        (r"\$5 \text{ dollars}", "5"),
        ("36", r"\$36"),
        *(("**18**", "18"), ("The answer is **18**.", "18"), ("**18** apples", "18"), ("`18`", "18")),
        *(("**1/2**", "0.5"), (r"**\frac12**", "0.5"), ("**(3, 4)**", "(3, 4)"), ("**Paris**", "paris")),
        *(("2*3**2", "18"), ("x**2", "x^2")),
        ("32348", r"\$32,\!348"),
        ("1{,}234", "1234"),
        ("{5}", "5"),
        ("(-3)", "-3"),
        ("+5", "5"),
        ("\N{MINUS SIGN}7", "-7"),
        ("2^{10}", "1024"),
        ("10^{-3}", "0.001"),
        ("4!", "24"),
        ("2 1/2", "2.5"),
        ("2 1/2", r"2\frac{1}{2}"),
        (r"2\frac12", "5/2"),
        ("2*pi", r"2\pi"),
        ("pi/4", r"\frac{\pi}{4}"),
        ("2 sin(x)", r"2\sin x"),
        ("ln(2)", r"\ln 2"),
        ("x**2", "x^2"),
        ("No.", "no"),
        ("h2o", "H2O"),
        (r"\boxed{No}", "no"),
        ("v=at", "at"),
        ("03:45", "3:45"),
        ("01/05/2024", "1/5/2024"),
        ("(0, 100)", "(0,100)"),
        ("0.333333", r"\frac{1}{3}"),
        ("0.666667", "2/3"),
        ("There are 5!", "5"),
        ("5 {cm}", "5"),
        ("1010", "1010_2"),
        ("1010_{2}", "1010_2"),
    ],
)
def test_a_right_answer_is_right_however_it_is_written(text: str, answer: str) -> None:
    assert judge(text, answer, {})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 1/2", "1"),
        ("4!", "4"),
        ("(3, 4)", "4"),
        ("on", "no"),
        ("O2H", "H2O"),
        ("2024-01-05", "2024-05-01"),
        ("192.168.0.2", "192.168.0.1"),
        ("10:30", "10:03"),
        ("1010_3", "1010_2"),
        ("100", "(0,100)"),
        ("1200", "(1,200)"),
    ],
)
def test_what_math_verify_reads_over_is_wrong(text: str, answer: str) -> None:
    assert not judge(text, answer, {})


def test_votes_for_an_amount_are_counted_together() -> None:
    forms = (r"\$1,000", r"1{,}000", "1000", "(1000)", "+1000", "$1,000.00")
    assert {counted_as(form, "math", {}) for form in forms} == {"1000"}
