"""The judge of answers from files: plain numbers and words by themselves, all else by math-verify.

Imported only in the verifier's process. math-verify's own limits are signals and off here: the process is
what gets killed. It reads plain expressions with sympy.parse_expr, which evaluates; ours replaces that.
"""

import logging
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import math_verify

from r1hpc.tasks.algebra import replace_parse_expr
from r1hpc.tasks.arithmetic import RefusedError

_PLAIN = re.compile(r"\$?(-?)\$?(\d{1,30}|\d{1,3}(?:,\d{3}){1,9})(\.\d{0,30})?\.?", re.ASCII)
_WORD = r"[^\W\d_]{2,}(?:['\u2019-][^\W\d_]+)*"
_WORDS = re.compile(rf"{_WORD}(?:[ ,.]+{_WORD})*\.?")
_FORMULA = re.compile(r"[\d\\*+/^=(){}]")
"""Without any of these a text is no formula, whatever its letters would multiply to."""
_LIST = re.compile(r"\s*,\s*(?:and\s+)?|\s+and\s+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_COSTLY = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim)(?![a-z])"
    r"|\d{31}|\d{4}\s*\}?\s*!"
    r"|(?:\^|\*\*)\s*\{?\s*-?(?:\d{4}|\d+\s*\}?\s*(?:\^|\*\*))",
    re.ASCII,
)
"""What SymPy would compute for seconds: integrals and sums (no final answer holds one), long numbers, large
factorials and exponents, towers of powers. The time limit is for what this does not foresee."""
_MAX_DEPTH = 24
_SPACE = " \t\r\n"
_ENVIRONMENTS = ("$", r"\(", r"\[", r"\boxed")


def load(settings: Mapping[str, Any]) -> Callable[[str, str, Mapping[str, Any]], bool]:
    """The judge, warm: what is imported or compiled on first use is so before any answer's time runs."""
    logging.disable(logging.CRITICAL)
    replace_parse_expr()
    assert judge(r"\frac{1}{2}", "0.5", {})
    assert judge("1/2 + 1/4", "3/4", {})
    assert judge("x = 3", "3", {})
    assert judge("x^2+2x+1", "(x+1)^2", {})
    return judge


def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
    """Equal in value. `1,234.00` is `1234`, `\\frac12` is `0.5`, `x^2+2x+1` is `(x+1)^2`.

    Of words only their case may differ, and the order of a list: math-verify would read each letter as a
    factor, and `tac` as `cat`.
    """
    if text.strip(_SPACE) == answer:
        return True
    right = words(answer)
    if right and not _FORMULA.search(_TEXT.sub(r"\1", text)):
        return words(text) == right
    given, wanted = plain_number(text), plain_number(answer)
    if given is not None and wanted is not None:
        return given == wanted
    refuse_costly(text)
    latex = wanted is None
    return bool(math_verify.verify(_gold(answer, latex), _parsed(text, latex), timeout_seconds=None))


def refuse_costly(text: str) -> None:
    """Before a parser sees it.

    Raises:
        RefusedError: it would be slow to compute, or is nested deeper than an answer is.
    """
    depths = accumulate((char in "({[") - (char in ")}]") for char in text)
    if max(depths, default=0) > _MAX_DEPTH or _COSTLY.search(text):
        raise RefusedError("costly to compute")


def plain_number(text: str) -> Fraction | None:
    """The value of digits with an optional sign, dollar, thousands and decimals; None for anything else."""
    match = _PLAIN.fullmatch(text.strip(_SPACE))
    if match is None:
        return None
    sign, whole, decimals = match.groups()
    return Fraction(f"{sign}{whole.replace(',', '')}{(decimals or '').rstrip('.')}")


def words(text: str) -> list[str]:
    """The items of a list of words, or the one there is, in lower case and in order; empty for others.

    Letters alone may also be factors, as in `xy`: one of the words has three or more.
    """
    bare = " ".join(_TEXT.sub(r"\1", text).strip("$" + _SPACE).casefold().split())
    if not _WORDS.fullmatch(bare) or not re.search(r"[^\W\d_]{3}", bare):
        return []
    return sorted(_LIST.split(bare.removesuffix(".")))


@lru_cache(maxsize=64)
def _gold(answer: str, latex: bool) -> Any:
    return _parsed(answer, latex)


def _parsed(text: str, latex: bool) -> Any:
    """As a formula where it is one: math-verify reads `2x` as 2 unless dollars say otherwise."""
    bare = (latex or "\\" in text) and not any(mark in text for mark in _ENVIRONMENTS)
    return math_verify.parse(f"${text}$" if bare else text, parsing_timeout=None)
