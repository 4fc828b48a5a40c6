"""Judge if an answer equals another in value: numbers, words and lists here, formulas with math-verify.

The default for questions from files. Imported only in the verifier's process. math-verify's own limits are
signals and off here, since the process is killed instead. It reads plain expressions with sympy.parse_expr,
which evaluates; ours replaces that.
"""

import logging
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import math_verify
import sympy

from r1hpc.tasks.grading.algebra import replace_parse_expr
from r1hpc.tasks.grading.answers import SPACE, TEXT, plain_number, plainly, unescaped, unmixed, words
from r1hpc.tasks.grading.arithmetic import RefusedError, parse, value
from r1hpc.tasks.grading.phrases import is_denied, plainer, spelled_number, without_cjk

_FORMULA = re.compile(r"[\d\\*+/^=(){}]")
"""Without any of these a text is no formula, whatever product its letters would make."""
_COSTLY = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim)(?![a-z])"
    r"|\d{31}|\d{4}\s*\}?\s*!"
    r"|(?:\^|\*\*)\s*\{?\s*-?(?:\d{4}|\d+\s*\}?\s*(?:\^|\*\*))",
    re.ASCII,
)
"""Text that SymPy would compute for seconds: integrals and sums (no final answer holds one), long numbers,
large factorials and exponents, towers of powers. The time limit covers the rest."""
_ANSWER_IS = re.compile(
    r"(?:\b(?:so|thus|hence|therefore),?\s+)?\b(?:(?:the|my)\s+)?(?:(?:final|correct)\s+)?"
    r"(?:(?:answer|solution)s?\s*(?:is\b|are\b|:)|option\s+\w+\s*:)",
    re.IGNORECASE,
)
_OR_WORDS = r"\\(?:text|mathrm)\s*\{\s*,?\s*or\s*\}|\\(?:lor|vee)(?![a-z])|\bor\b"
_OR = re.compile(
    rf"{_OR_WORDS}|\b(?:either|vs|versus|else|alternatively|also|as\s+well\s+as|when)\b"
    r"|\b(?:maybe|perhaps|possibly|probably)\b|\?"
    r"|\b(?:case|scenario|possibility|option|attempt|try)\s+(?:\d+|[ivx]+|[a-d])\s*:|(?<=\d)\s*(?:[|&]|\b(?:to|then)\b)\s*(?=\d)",
    re.IGNORECASE,
)
"""Between two answers, one of which may be right by chance."""
_BETWEEN_ITEMS = re.compile(
    rf"({_OR_WORDS}|\\text\s*\{{\s*,?\s*and\s*\}}|,?\s+and\s|(?<!\\),(?!\d{{3}}(?!\d))|(?<!\\);|\\q?quad(?![a-z]))"
    r"|[(\[{]|[)\]}]",
    re.IGNORECASE,
)
"""Group 1: a separator of items; else a bracket, inside which nothing separates."""
_SIDE_BY_SIDE = re.compile(r"(?<=\d)\s+(?=\d)|(?<=\])\s*(?=\[)|\.\.+|\\\\")
_NAMED = re.compile(r"\A\s*[A-Za-z](?:_\{?\w\}?)?\s*(?:=(?!=)|\\in(?![a-z])|\sin(?=\s*[({\[]))\s*")
_ASSIGNED = re.compile(r"(?<![\w\\])([A-Za-z])\s*=\s*([^,;=]+)(?=[,;]|$)")
_NUMBER_AHEAD = r"(?=.*(?:[\d\\^]|\b[b-hj-z]\b))"
_DENIED = re.compile(
    rf"(?:\b(?:not|never|neither|nor|cannot|but|except|(?:is|are|does|can)nt|unequal|excluding)\b|n['\u2019]t\b){_NUMBER_AHEAD}"
    r"|\bnot\s+(?:the\s+)?(?:answer|right|correct|true)\b|\b(?:other\s+than|different\s+from|exceeds?)\b"
    r"|\bat\s+(?:least|most|minimum|maximum)\b|\bthan\s+(?:or\s+equal\s+to\s+)?[$\s]*[-(\d\\]"
    r"|^\W*(?:over|under|above|below|up\s+to|between|wrong|incorrect|false)\b|\u00ac|\\l?not(?![a-z])|\d\s*\+\s*$",
    re.IGNORECASE | re.DOTALL,
)
"""Words saying that the value after them is not the answer, or only its bound."""
_ASIDE = re.compile(r"(?<=[\d})]),?\s+(?:\(?not\s+\S+\s*|(?:because|since)\s.*)$", re.DOTALL)
"""After an answer: `42, not 41`, `42 because ...`."""
_SAME_SIGNS = (
    (re.compile(r"=>|\\(?:Rightarrow|implies)(?![a-z])"), ", "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!=|\\not\s*="), r"\\ne "),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"(?<![\w)}])\](?=[^][(){}]*,[^][(){}]*[][])"), "("),
    (re.compile(r"(?<=[\[(])([^][(){}]*,[^][(){}]*)\[(?!\w)"), r"\1)"),
)
_RELATION = re.compile(r"[<>]|\\(?:neq?|leq?|geq?|lt|gt|leqslant|geqslant)(?![a-z])")
_MANY_VALUES = re.compile(rf"{_RELATION.pattern}|\\(?:pm|mp|cup)(?![a-z])|[\[(].*,.*[\])]")
"""An interval, a tuple, an inequality: its signs are no hedge."""
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d(\\])", re.IGNORECASE)
_NAME = r"((?:[A-Za-z]|\\[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?)"
_ASSIGNMENT = re.compile(rf"{_NAME}\s*(?:=|\bis\b)\s*([^=<>]+)")
_NAMED_TUPLE = re.compile(r"\(([^()=]+)\)\s*=\s*\((.+)\)")
_PAIR = re.compile(r"\(.+,.+\)|\[.+,.+[\])]|\(.+,.+\]", re.DOTALL)
_WHOLE = re.compile(
    r"(-?)(?:(\d{1,400}|\d{1,3}(?:,\d{3}){1,99}|\d{1,3}(?: \d{3}){1,99})"
    r"|(\d{1,9})\s*(?:\^|\*\*)\s*\{?(\d{1,3})\}?)\.?",
    re.ASCII,
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(\d)(\d))", re.ASCII)
_TIMES = re.compile(r"\\(?:times|cdot)(?![a-z])")
_ARITHMETIC = re.compile(r"(?!.*\*\*)[-\d\s()+*/]{1,80}", re.ASCII)
_UNIT = re.compile(r"[-\d.,/\s]*\d\s*(mm|cm|dm|km|m|mg|kg|g|ml|cl|l|ms|min|s|h)\.?", re.ASCII)
_LEADING = re.compile(
    r"\A\s*(?:(?!jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z']+[:,]?\s+)+(?=[-\d\\(\[])",
    re.IGNORECASE,
)
"""Words before the first number, except those of a date."""
_AFTERWARDS = re.compile(r"(?:\s+[A-Za-z]{2,})+\s*$")
_PROSE = re.compile(r"(?<![A-Za-z\\])(?!sqrt|sin|cos|tan|log|exp)[A-Za-z]{3,}")
_COMMAND = re.compile(r"\\(?:[dtc]?frac|sqrt|times|cdot|div|left|right|pi)(?![a-z])")
_SETTING = (
    (TEXT, r" \1 "),
    (re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\$|\\[()\[\]]|\\(?:left|right)(?![a-z])|(?<!\S)[a-z]\)"), " "),
)
_MOST_CLAIMS = 8
_MOST_FORMULAS = 4
"""Formulas of a list that are compared pair by pair."""
_GOES_ON = re.compile(
    r"\d(?:[xyznie](?![A-Za-z])(?:\s*\^\s*\(?-?\d+\)?)?|\s*\*?\s*(?:pi(?![a-z])|π|(?:sqrt|√)(?:\s*\([^()]*\))?))[^\d]*$",
    re.ASCII,
)
"""A last number that is a factor: math-verify would read only the number. A letter that may be a unit does
not count: `5 m` is 5."""
_SQRT, _PI = re.compile(r"(?:sqrt|√)\(([^()]*)\)"), re.compile(r"(?<![A-Za-z])pi(?![A-Za-z])|π")
_LATEX_ONLY = re.compile(r"[{(\[*^]|\d\s*!")
_EXPONENT = re.compile(r"\^\s*(?:\(([^()]*)\)|(-?\d+(?:\.\d+)?)|\{(-?\d+\.\d+)\})")
_SPACED_I = re.compile(r"(?<=\d)\s+i(?![A-Za-z])")
_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp)(?=\s*[(\d]|\s+[a-z]|_)"
)
_LOG_TO_BASE = re.compile(r"\s*\$?log_\{?\d+\}?\s*\(?\s*[\d.,]+\s*\)?\$?\.?\s*", re.ASCII)
_SAID_BEFORE = re.compile(r"=|\bis\b", re.IGNORECASE)
_BASE = re.compile(r"(\d[0-9A-F]{0,60})\)?\s*_\s*\{?\s*(\d{1,2})\s*\}?[\s$.]*$", re.ASCII)
_SHORT_WORD = re.compile(r"(?![xyz]+$)[a-z]{2}", re.IGNORECASE)
"""As a word: as factors, it would equal its letters in another order. `xy` is a product."""
_NO_FORMULA = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[./]\d{1,2}[./]\d{4}|\d{1,3}(?:\.\d{1,3}){3}|\d{1,2}:\d{2}(?::\d{2})?"
    r"|(?=.*\d)(?:[A-Z][a-z]?\d{0,3}){2,}"
)
"""Dates, addresses, times and chemical formulas: compared as text, since arithmetic would make `2024-01-05`
and `2024-05-01` the same."""
_AROUND = re.compile(r"\\boxed\s*\{|\\[()\[\]]")
_ZEROS, _LETTERS = re.compile(r"(?<!\d)0+(?=\d)"), re.compile(r"[A-Za-z]")
_MAX_DEPTH = 24
_ENVIRONMENTS = ("$", r"\(", r"\[", r"\boxed")


def load(settings: Mapping[str, Any]) -> Callable[[str, str, Mapping[str, Any]], bool]:
    """Return the judge, warmed up: imports and compilation happen before any answer's time runs."""
    logging.disable(logging.CRITICAL)
    replace_parse_expr()
    assert judge(r"\frac{1}{2}", "0.5", {})
    assert judge("1/2 + 1/4", "3/4", {})
    assert judge("x = 3", "3", {})
    assert judge("x^2+2x+1", "(x+1)^2", {})
    assert not judge("2x", "2", {})
    return judge


def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
    """True if equal in value. `1,234.00` is `1234`, `\\frac12` is `0.5`, `x^2+2x+1` is `(x+1)^2`.

    Words may differ only in case, and lists in order: math-verify would read each letter as a factor, and
    `tac` as `cat`.
    """
    if text.strip(SPACE) == answer:
        return True
    text, answer = unescaped(text), unescaped(answer)
    for pattern, sign in _SAME_SIGNS:
        text, answer = pattern.sub(sign, text), pattern.sub(sign, answer)
    if not words(answer):
        text, answer = plainer(text), plainer(answer)
    before, *answers = _ANSWER_IS.split(text)
    if len(answers) > 1:
        return len(answers) <= _MOST_CLAIMS and all(judge(each, answer, metadata) for each in answers)
    if answers and not before.strip(SPACE):
        text = answers[0].strip(SPACE)
    is_same_text = _as_text(text, answer)
    if is_same_text is not None:
        return is_same_text
    right = words(answer)
    if right and not _FORMULA.search(TEXT.sub(r"\1", text)):
        return words(text) == right
    is_number = plain_number(text) is not None or plain_number(answer) is not None
    if not is_number and plainly(text) == plainly(answer):  # also if it is costly to compute
        return True
    if alone := TEXT.fullmatch(text.strip("$" + SPACE)):
        text = alone[1]
    is_other = bool(_FORMULA.search(answer)) and plainly(text) != plainly(answer)
    if is_other and is_denied(_ASIDE.sub("", text)) and not is_denied(answer.replace("\\", "")):
        return False
    text = _MINUS.sub("-", without_cjk(text) if answer.isascii() else text)
    text, answer = unmixed(text, len(_items(answer)) == 1), unmixed(answer)
    if (spelled := spelled_number(text)) is not None:
        text = str(spelled)
    said, based = _BASE.search(text), _BASE.search(answer)
    if said and based:
        return said.groups() == based.groups()
    if said:
        text = _in_base(said[1], int(said[2]))
    if based:
        answer = based[1]
    if (is_same_named := _same_named(text, answer)) is not None:
        return is_same_named
    whole, wanted = _whole(text), _whole(answer)
    if whole is not None and wanted is not None:
        return whole == wanted
    if _PAIR.fullmatch(_shown(answer)) and _shown(text).startswith(("\\{", "{")):
        return False
    items, listed = _items(text), _items(answer)
    if len(items) > 1 and len(listed) > 1:
        return _same_items(items, listed)
    claims = _claims(text, answer)
    return 0 < len(claims) <= _MOST_CLAIMS and all(_equal(claim, answer) for claim in claims)


def _claims(text: str, answer: str) -> list[str]:
    """Return each answer that a text gives: one, or several if it hedges, which must all be right. Return
    none if the text says what the answer is not."""
    text = _ASIDE.sub("", text)
    shown = _shown(text)
    last = _SAID_BEFORE.split(shown)[-1]
    is_one = not _MANY_VALUES.search(answer)
    is_denied = _DENIED.search(last) and not _DENIED.search(answer)
    if is_denied or (is_one and (_RELATION.search(last) or "\\pm" in shown)):
        return []
    is_matrix = "\\begin" in shown
    pieces = [shown] if is_matrix else [each for each in _OR.split(shown) if each.strip(SPACE + ",.()")]
    if len(pieces) > 1:
        if not is_one and all(map(_RELATION.search, pieces)):
            return [text]
        return [claim for piece in pieces for claim in _claims(piece, answer) or [""]]
    if not is_one:
        return [text]
    assigned = _ASSIGNED.findall(shown)
    if len({name for name, _ in assigned}) < len(assigned):
        return [each for _, each in assigned]
    sides = [side for side in shown.split("=") if not _LETTERS.search(_COMMAND.sub("", side))]
    if len(sides) > 1 and "," not in shown:
        return [side for side in sides if side.strip(SPACE)]
    items = [piece for item in _items(_LEADING.sub("", last)) for piece in _SIDE_BY_SIDE.split(item)]
    items = [item for item in items if item.strip(SPACE + ".")]
    is_list = len(items) > 1 and not is_matrix and not any(map(_PROSE.search, items))
    return items if is_list else [text]


def _same_named(text: str, answer: str) -> bool | None:
    """Compare `x=1, y=2` by name, or `(1, 2)` in order; None if the answer or the text has no such form."""
    given, wanted = _named(text), _named(answer)
    names = [name for name, _ in wanted]
    if not names and len(dict(given)) > 1 and _exact(answer) is not None:
        return False
    if not names or len(set(names)) < len(names):
        return None
    if not given and len(names) > 1:
        items = _items(text.strip("$" + SPACE).removeprefix("(").removesuffix(")"))
        return len(items) == len(names) and all(_equal(a, b) for a, (_, b) in zip(items, wanted, strict=True))
    if not given or (len(names) == 1 and len(given) > 1 and len(dict(given)) == 1):
        return None
    found = dict(given)
    is_same = len(given) == len(names) and set(found) == set(names)
    return is_same and all(_equal(found[name], each) for name, each in wanted)


def _named(text: str) -> list[tuple[str, str]]:
    """Return the names and values of a text that is nothing but assignments; else none."""
    said = _shown(text).removesuffix(".").replace("\n", ", ")
    if several := _NAMED_TUPLE.fullmatch(said):
        names, values = (_pieces(each) for each in several.groups())
        return list(zip(names, values, strict=True)) if len(names) == len(values) else []
    found = [_ASSIGNMENT.fullmatch(each) for each in _pieces(said)]
    return [(re.sub("[{}]", "", each[1]).casefold(), each[2]) for each in found if each] if all(found) else []


def _items(text: str) -> list[str]:
    """Return the items of a list or a set; for anything else only the text."""
    said = _NAMED.sub("", _shown(text)).strip(SPACE).removesuffix(".")
    for opening, closing in (("\\{", "\\}"), ("{", "}")):
        if said.startswith(opening) and said.endswith(closing):
            said = said[len(opening) : -len(closing)]
            break
    items = [_NAMED.sub("", each).strip(SPACE) for each in _pieces(said)]
    if len(items) == 1 and items[0].startswith("\\pm"):
        value_alone = items[0].removeprefix("\\pm").strip(SPACE)
        return [value_alone, f"-{value_alone}"]
    return [each for each in items if each]


def _pieces(said: str) -> list[str]:
    """Split at the separators outside of brackets."""
    items, depth, start = [], 0, 0
    for found in _BETWEEN_ITEMS.finditer(said):
        if not found[1]:
            depth += 1 if found[0] in "([{" else -1
        elif depth == 0:
            items.append(said[start : found.start()])
            start = found.end()
    return [each.strip(SPACE) for each in (*items, said[start:]) if each.strip(SPACE)]


def _same_items(items: list[str], wanted: list[str]) -> bool:
    """True if each item equals a different one of those wanted, in any order."""
    if len(items) != len(wanted):
        return False
    if sum(plain_number(each) is None and _rational(each) is None for each in items) > _MOST_FORMULAS:
        return _equal(*(rf"\{{{','.join(each)}\}}" for each in (items, wanted)))
    left = list(wanted)
    for item in items:
        same = next((each for each in left if plainly(item) == plainly(each) or _equal(item, each)), None)
        if same is None:
            return False
        left.remove(same)
    return True


def _shown(text: str) -> str:
    """Return a text without its formatting: dollars, boxes, \\text, `a)` before an item."""
    for pattern, plain in _SETTING:
        text = pattern.sub(plain, text)
    return text.strip(SPACE)


def _whole(text: str) -> int | None:
    """Return a whole number of up to 400 digits, or a power of one as in `2^{100}`; None for others."""
    match = _WHOLE.fullmatch(_NAMED.sub("", _shown(text)))
    if match is None:
        return None
    sign, digits, base, power = match.groups()
    found = int(re.sub("[, ]", "", digits)) if digits else int(base) ** int(power)
    return -found if sign else found


def _rational(text: str) -> Fraction | None:
    """Return the value of `\\frac34`, `-(6/8)` and other arithmetic of integers; None for anything else."""
    said = _FRACTION.sub(r"(\1\3)/(\2\4)", _NAMED.sub("", _shown(text)))
    said = _TIMES.sub("*", said)
    if not _ARITHMETIC.fullmatch(said):
        return None
    try:
        return value(parse(said, algebra=True))
    except (RefusedError, ZeroDivisionError):
        return None


def _exact(text: str) -> tuple[Fraction, bool] | None:
    """Return the value of a number, a fraction or one of them in percent, and whether it is in percent."""
    said = _shown(text).removesuffix(".").rstrip(SPACE)
    is_percent = said.endswith("%")
    said = said.removesuffix("%").removesuffix("\\").rstrip(SPACE) if is_percent else said
    value = plain_number(said)
    if value is None:
        value = _rational(said)
    return None if value is None else (value / 100 if is_percent else value, is_percent)


def _same_value(number: Fraction, is_percent: bool, right: Fraction, is_right_percent: bool) -> bool:
    """True for one value. `12` and `12%` are the same where a percentage was asked for, as 12 suggests."""
    if number == right:
        return True
    if is_percent:
        return not is_right_percent and right >= 1 and number * 100 == right
    return is_right_percent and number == right * 100


def _in_base(digits: str, base: int) -> str:
    try:
        return str(int(digits, base))
    except ValueError:
        return ""


def _equal(text: str, answer: str) -> bool:
    """True if one claim is equal in value to the answer."""
    given, wanted = plain_number(text), plain_number(answer)
    said_exactly, exact = _exact(text), _exact(answer)
    if said_exactly is not None and exact is not None:
        if (verdict := _same_value(*said_exactly, *exact)) or "." not in text + answer:
            return verdict
        if (given is None) == (wanted is None) or "%" in text + answer:
            return False  # a decimal may be a rounded fraction: math-verify knows to which digit
    refuse_costly(text)
    unit, right_unit = _UNIT.fullmatch(_shown(text)), _UNIT.fullmatch(_shown(answer))
    if unit and right_unit and unit[1] != right_unit[1]:
        return False
    latex = wanted is None
    bare = text.strip(SPACE)
    text = bare.removesuffix(".") if latex else text
    is_typed_otherwise = " " in bare or bare[:1] in "({" or "e" in bare.casefold()
    if given is not None and is_typed_otherwise:  # decimals stay: they may be rounded
        text = str(given)
    if not latex and "\\" not in text:
        last = _SAID_BEFORE.split(text)[-1]
        said = text.rpartition("=")[2]
        is_bare_latex = _LATEX_ONLY.search(said) and not _LETTERS.search(said)
        if is_bare_latex or _GOES_ON.search(said):
            text, latex = _in_latex(said), True
        elif _LOG_TO_BASE.fullmatch(last):
            text, latex = _in_latex(last), True
    elif latex and not _MANY_VALUES.search(answer) and "$" not in text and _PROSE.search(text):
        text = _AFTERWARDS.sub("", _LEADING.sub("", _SAID_BEFORE.split(text)[-1].strip(SPACE)))
    if latex:
        text, answer = _in_latex(text), _in_latex(answer)
    return _verified(_gold(answer, latex), text, latex)


def _verified(gold: Any, text: str, latex: bool) -> bool:
    """Return math-verify's verdict. It does not join `x<1 or x>2` to one set by itself."""
    options = {"allow_set_relation_comp": True, "timeout_seconds": None}
    pieces = re.split(_OR_WORDS, text) if _RELATION.search(text) else [text]
    if len(pieces) > 1:
        found = [_parsed(piece, latex)[0] for piece in pieces]
        return bool(math_verify.verify(gold, [sympy.Union(*(each.as_set() for each in found))], **options))
    return bool(math_verify.verify(gold, _parsed(text, latex), **options))


def _as_text(text: str, answer: str) -> bool | None:
    """Compare two short words, dates, addresses, times or chemical formulas; None for anything else."""
    said, wanted = (_bare(each) for each in (text, answer))
    are_words = _SHORT_WORD.fullmatch(wanted) and said.isalpha()
    if are_words or (_NO_FORMULA.fullmatch(wanted) and _NO_FORMULA.fullmatch(said.upper())):
        return said.casefold() == wanted.casefold()
    return None


def _bare(text: str) -> str:
    """Remove formatting, and zeros before a number."""
    said = _AROUND.sub("", plainly(text)).strip(SPACE).removesuffix(".")
    return _ZEROS.sub("", said.removesuffix("}") if "\\boxed" in text else said)


def _in_latex(text: str) -> str:
    """Write `2*pi`, `sqrt(3)/2`, `sin(x)` and `x**2` in LaTeX."""
    text = _PI.sub(r"\\pi ", _SQRT.sub(r"\\sqrt{\1}", text.replace("**", "^")))
    text = _SPACED_I.sub("i", text)
    return _FUNCTION.sub(r"\\\1 ", _EXPONENT.sub(_exponent, text))


def _exponent(found: re.Match[str]) -> str:
    """Return an exponent in braces, a decimal as a fraction: math-verify keeps 2^{0.5} apart from a root."""
    said = str(next(filter(None, found.groups()), ""))
    return f"^{{{Fraction(said) if re.fullmatch(r'-?[0-9]+[.][0-9]+', said) else said}}}"


def refuse_costly(text: str) -> None:
    """Raise RefusedError for a text that is slow to compute or nested deeply, before a parser sees it."""
    depths = accumulate((char in "({[") - (char in ")}]") for char in text)
    if max(depths, default=0) > _MAX_DEPTH or _COSTLY.search(text):
        raise RefusedError("costly to compute")


def _parsed(text: str, latex: bool) -> Any:
    """Parse it as a formula if it is one: math-verify reads `2x` as 2 without dollars."""
    bare = (latex or "\\" in text) and not any(mark in text for mark in _ENVIRONMENTS)
    return math_verify.parse(f"${text}$" if bare else text, parsing_timeout=None)


_gold = lru_cache(maxsize=64)(_parsed)
