"""The judge of answers from files: plain numbers and words by themselves, all else by math-verify.

Imported only in the verifier's process. math-verify's own limits are signals and off here: the process is
what gets killed. It reads plain expressions with sympy.parse_expr, which evaluates; ours replaces that.
"""

import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any

import math_verify

from r1hpc.tasks.algebra import replace_parse_expr
from r1hpc.tasks.answer_forms import SPACE, TEXT, plain_number, plainly, unescaped, words
from r1hpc.tasks.arithmetic import RefusedError

_FORMULA = re.compile(r"[\d\\*+/^=(){}]")
"""Without any of these a text is no formula, whatever its letters would multiply to."""
_COSTLY = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim)(?![a-z])"
    r"|\d{31}|\d{4}\s*\}?\s*!"
    r"|(?:\^|\*\*)\s*\{?\s*-?(?:\d{4}|\d+\s*\}?\s*(?:\^|\*\*))",
    re.ASCII,
)
"""What SymPy would compute for seconds: integrals and sums (no final answer holds one), long numbers, large
factorials and exponents, towers of powers. The time limit is for what this does not foresee."""
_NUMBER = r"-?\$?\d[\d.,/]{0,40}"
_SEVERAL = re.compile(
    rf"\s*(?:[a-z]\s*=\s*)?[(\[{{]?{_NUMBER}(?:(?:,\s+|\s*;\s*|\s+(?:or|and)\s+){_NUMBER})+[)\]}}]?\.?\s*",
    re.ASCII | re.IGNORECASE,
)
"""Numbers and nothing else, of which math-verify would take the last."""
_GOES_ON = re.compile(
    r"\d(?:[xyznie](?![A-Za-z])(?:\s*\^\s*\(?-?\d+\)?)?|\s*\*?\s*(?:pi(?![a-z])|π|(?:sqrt|√)(?:\s*\([^()]*\))?))[^\d]*$",
    re.ASCII,
)
"""A last number that is a factor, of which math-verify would take the number alone. A letter that may be a
unit does not count: `5 m` is 5."""
_SQRT, _PI = re.compile(r"(?:sqrt|√)\(([^()]*)\)"), re.compile(r"(?<![A-Za-z])pi(?![A-Za-z])|π")
_LATEX_ONLY = re.compile(r"\{|\d\s*!")
_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp)(?=\s*[(\d]|\s+[a-z]|_)"
)
_LOG_TO_BASE = re.compile(r"\s*\$?log_\{?\d+\}?\s*\(?\s*[\d.,]+\s*\)?\$?\.?\s*", re.ASCII)
_OPERATOR_IN_WORDS = re.compile(
    r"(?:\broots?\s+of|\bmod(?:ulo)?)\s+\$?-?\d[\d.,]*\$?\)?\.?\s*$", re.ASCII | re.IGNORECASE
)
"""Of what these say, math-verify would take the last number: 8 for `cube root of 8`."""
_SAID_BEFORE = re.compile(r"=|\bis\b", re.IGNORECASE)
_BASE = re.compile(r"\d\s*_\s*\{?\s*(\d{1,2})\s*\}?\s*\$?\s*$")
_SHORT_WORDS = frozenset(("no", "on", "up", "ok"))
"""As words: as factors, each would equal its letters in another order."""
_NO_FORMULA = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[./]\d{1,2}[./]\d{4}|\d{1,3}(?:\.\d{1,3}){3}|\d{1,2}:\d{2}(?::\d{2})?"
    r"|(?=.*\d)(?:[A-Z][a-z]?\d{0,3}){2,}"
)
"""Dates, addresses, times and formulas of chemistry: as text, since arithmetic would make `2024-01-05` and
`2024-05-01` the same."""
_AROUND = re.compile(r"\\boxed\s*\{|\\[()\[\]]")
_ZEROS, _LETTERS = re.compile(r"(?<!\d)0+(?=\d)"), re.compile(r"[A-Za-z]")
_MAX_DEPTH = 24
_ENVIRONMENTS = ("$", r"\(", r"\[", r"\boxed")


def load(settings: Mapping[str, Any]) -> Callable[[str, str, Mapping[str, Any]], bool]:
    """The judge, warm: what is imported or compiled on first use is so before any answer's time runs."""
    logging.disable(logging.CRITICAL)
    replace_parse_expr()
    assert judge(r"\frac{1}{2}", "0.5", {})
    assert judge("1/2 + 1/4", "3/4", {})
    assert judge("x = 3", "3", {})
    assert judge("x^2+2x+1", "(x+1)^2", {})
    assert not judge("2x", "2", {})
    return judge


def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
    """Equal in value. `1,234.00` is `1234`, `\\frac12` is `0.5`, `x^2+2x+1` is `(x+1)^2`.

    Of words only their case may differ, and the order of a list: math-verify would read each letter as a
    factor, and `tac` as `cat`.
    """
    if text.strip(SPACE) == answer:
        return True
    text, answer = unescaped(text), unescaped(answer)
    is_same_text = _as_text(text, answer)
    if is_same_text is not None:
        return is_same_text
    right = words(answer)
    if right and not _FORMULA.search(TEXT.sub(r"\1", text)):
        return words(text) == right
    given, wanted = plain_number(text), plain_number(answer)
    if given is not None and wanted is not None:
        return given == wanted
    if given is wanted is None and plainly(text) == plainly(answer):  # also what is costly to compute
        return True
    refuse_costly(text)
    if _other_base(text, answer):
        return False
    latex = wanted is None
    bare = text.strip(SPACE)
    is_typed_otherwise = " " in bare or bare[:1] in "({" or "e" in bare.casefold()
    if given is not None and is_typed_otherwise:  # decimals stay: they may be rounded ones
        text = str(given)
    if not latex and "\\" not in text:
        last = _SAID_BEFORE.split(text)[-1]
        if _SEVERAL.fullmatch(text) or _OPERATOR_IN_WORDS.search(last):
            return False
        said = text.rpartition("=")[2]
        is_bare_latex = _LATEX_ONLY.search(said) and not _LETTERS.search(said)
        if is_bare_latex or _GOES_ON.search(said):
            text, latex = _in_latex(said), True
        elif _LOG_TO_BASE.fullmatch(last):
            text, latex = _in_latex(last), True
    elif latex and "\\" not in text:
        text = _in_latex(text)
    return bool(math_verify.verify(_gold(answer, latex), _parsed(text, latex), timeout_seconds=None))


def _as_text(text: str, answer: str) -> bool | None:
    """Whether two short words, dates, addresses, times or formulas of chemistry are the same; None: it is not
    two of these that are compared.
    """
    said, wanted = (_bare(each) for each in (text, answer))
    are_words = wanted.casefold() in _SHORT_WORDS and said.isalpha()
    if are_words or (_NO_FORMULA.fullmatch(wanted) and _NO_FORMULA.fullmatch(said.upper())):
        return said.casefold() == wanted.casefold()
    return None


def _bare(text: str) -> str:
    """Without what sets it, and zeros ahead of a number."""
    said = _AROUND.sub("", plainly(text)).strip(SPACE).removesuffix(".")
    return _ZEROS.sub("", said.removesuffix("}") if "\\boxed" in text else said)


def _in_latex(text: str) -> str:
    """`2*pi`, `sqrt(3)/2`, `sin(x)` and `x**2` as LaTeX says them."""
    text = _PI.sub(r"\\pi ", _SQRT.sub(r"\\sqrt{\1}", text.replace("**", "^")))
    return _FUNCTION.sub(r"\\\1 ", text)


def _other_base(text: str, answer: str) -> bool:
    """Whether both say the base of a number, as in `1010_2`, and not the same: math-verify reads over it."""
    said, wanted = _BASE.search(text), _BASE.search(answer)
    return said is not None and wanted is not None and int(said[1]) != int(wanted[1])


def refuse_costly(text: str) -> None:
    """Before a parser sees it.

    Raises:
        RefusedError: it would be slow to compute, or is nested deeper than an answer is.
    """
    depths = accumulate((char in "({[") - (char in ")}]") for char in text)
    if max(depths, default=0) > _MAX_DEPTH or _COSTLY.search(text):
        raise RefusedError("costly to compute")


@lru_cache(maxsize=64)
def _gold(answer: str, latex: bool) -> Any:
    return _parsed(answer, latex)


def _parsed(text: str, latex: bool) -> Any:
    """As a formula where it is one: math-verify reads `2x` as 2 unless dollars say otherwise."""
    bare = (latex or "\\" in text) and not any(mark in text for mark in _ENVIRONMENTS)
    return math_verify.parse(f"${text}$" if bare else text, parsing_timeout=None)
