"""Read the text of an answer in any notation: a plain number, words, the letter of a choice.

Used by the judges, and by majority votes, where no judge compares answers with each other.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from r1hpc.tasks.grading.phrases import is_denied, plainer, without_cjk
from r1hpc.tasks.text.format import out_of_box

SPACE = " \t\r\n"
_PLAIN = re.compile(
    r"\$?([+-]?) ?\$?(\d{1,30}|\d{1,3}(?:,\d{3}){1,9})(\.\d{0,30})?"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*\{?)([+-]?\d{1,2})\}?)?\.?",
    re.ASCII,
)
_MIXED = re.compile(r"(-?)(\d{1,30}) (\d{1,30})/(\d{1,30})", re.ASCII)
_MIXED_TYPED = re.compile(r"(?<![\d./,^])(\d{1,9})\s+(\d{1,9}/[1-9]\d{0,8})(?![\d/])", re.ASCII)
_MIXED_AND = re.compile(r"(?<![\d./,^])(\d{1,9})\s+and\s+(\d{1,9}/[1-9]\d{0,8})(?![\d/])", re.ASCII)
_MIXED_LATEX = re.compile(
    r"(?<![\w./,^}])(\d{1,9})(?:\s|\\[ ,;])*\\[dtc]?frac\s*"
    r"(?:\{\s*(\d{1,9})\s*\}\s*\{\s*(\d{1,9})\s*\}|(\d)(\d))",
    re.ASCII,
)
_ENCLOSED = re.compile(r"\(([^()]*)\)|\{([^{}]*)\}")
_INDEX = {"\u221a": "", "\u221b": "[3]"}
_THIN = "\u00a0\u2000-\u200a\u202f\u205f\u3000"
_TYPESET = (
    (re.compile("[\uff01-\uff5e\U0001d7ce-\U0001d7ff]"), lambda found: _plain(found[0])),
    (re.compile(f"(?<=\\d)[{_THIN}](?=\\d{{3}}(?!\\d))"), lambda _: ","),
    (re.compile(f"[{_THIN}]"), lambda _: " "),
    (re.compile("[\u200b-\u200d\u2060\ufeff]"), lambda _: ""),
    (
        re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+"),
        lambda found: f"^{{{_plain(found[0])}}}",
    ),
    (re.compile("[\u2080-\u2089]+"), lambda found: f"_{{{_plain(found[0])}}}"),
    (
        re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])"),
        lambda found: f"{found[1]} {_plain(found[2])}".lstrip(),
    ),
    (
        re.compile(r"([\u221a\u221b])\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z\u03c0]))"),
        lambda found: rf"\sqrt{_INDEX[found[1]]}{{{found[2] or found[3] or found[4]}}}",
    ),
)
"""Full-width and mathematical digits, spaces, raised and lowered digits, fractions and roots in one sign."""
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "*"),
        "\u2026": "..",
        **dict.fromkeys("\u00f7\u2044\u2215", "/"),
        **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u221e": r"\infty "},
        **{"\u222a": r"\cup ", "\u2205": r"\emptyset ", "\u2208": r"\in ", "\u2228": r"\lor "},
    }
)
_ESCAPED = (
    (re.compile(r"\\\$"), ""),
    (re.compile(r"\\\\\[[\d.]+\s*(?:pt|em|ex|mm|cm)\]"), r"\\\\"),
    (re.compile(r"(?<=\d)(?:,\\!|\{,\})(?=\d)|(?<=\d)\\[,;:! ](?=\d{3}(?!\d))"), ","),
)
"""A dollar and separators of thousands as written in LaTeX."""
_REPEATING = re.compile(
    r"(?<![\d.,])(-?)(\d{1,30})\.(\d{0,30})"
    r"(?:\\(?:overline|bar)\s*\{\s*(\d{1,30})\s*\}|\\(?:overline|bar)\s*(\d)|\((\d{1,30})\)"
    r"|(\\dot\s*\{?\d\}?(?:\d*\\dot\s*\{?\d\}?)?)|(\s*(?:\.\.\.?|\\[lc]?dots)(?![a-z])))",
    re.ASCII,
)
_MARKED = re.compile(
    r"(?<![\w)*`])(\*\*|`)(?=[^\s*`])([^*`\n]{0,200})(?<=[^\s*`])\1(?=[.,]?\s*$|[.,:]?\s+[A-Za-z])"
)
"""Bold or code at the end or before a word. Anywhere else two asterisks may be a power."""
_WORD = r"[^\W\d_]{2,}(?:['\u2019-][^\W\d_]+)*"
_WORDS = re.compile(rf"{_WORD}(?:[ ,.]+{_WORD})*\.?")
_LIST = re.compile(r"\s*,\s*(?:and\s+)?|\s+and\s+")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-Z])(?:\)|[.:)](?=\s|$)|$)", re.ASCII)
_REASON = r",?\s+(?:because|since)\s"
_LETTER_SET_APART = re.compile(
    rf"\(?([A-Z])\)?(?:\s*\n(?!\s*\(?[A-Z](?![A-Za-z]))|\s+[-\u2013]\s|{_REASON})", re.ASCII
)
_LETTER_SAID = re.compile(
    r"(?:(?:so|thus|therefore|hence)?,?\s*(?:the|my)?\s*(?:correct|right|best|final)?\s*"
    r"(?:answer|option|choice)(?:\s+is)?:?(?:\s+option)?)\s+"
    rf"\(?([A-Z])\)?(?:\.?\s*$|{_REASON})|\(([a-z])\)\.?\s*$",
    re.ASCII | re.IGNORECASE,
)
_CHOICE_LEAD = re.compile(
    r"\A\s*(?:(?:so|thus|therefore|hence|the|my|i|we|it|it's|is|choose|chose|pick|select|go|with|would|must|be|should"
    r"|correct|right|best|final|answer|option|choice|letter)\b[\s:,]*)+",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:[(\[]?([A-Z])[)\]]?|\(([a-z])\)|\b([a-z])\))[.:]?"
    r"(?:\s+(?i:is\s+(?:the\s+)?(?:correct|right|best|true)(?:\s+(?:answer|option|choice))?)"
    r"|\s*[-\u2013,]?\s*\(([^()]+)\)|\s*[-\u2013,]?\s+([^()]+))?\.?",
    re.ASCII,
)
_FULL_WIDTH = re.compile("[\uff01-\uff5e]+")
_ANOTHER = re.compile(r"(?<![\w'])([B-Z]|A(?!\s+[a-z]))(?![\w'])|(?<=[a-z]) (?:or|and) ([a-z])$")
_SETTING = re.compile(r"\$|\\[()\[\]]|\*\*")
_COSMETIC = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\$")
_SPACES = re.compile(r"(?:\\[,;!:]|\s)+")
_LOOSE = re.compile(r"(?<!\w) | (?!\w)")
"""A blank that does not separate two words or numbers, as the one in `3 1/2` does."""
_FRACTION = re.compile(
    r"(-?)(?:\\[dt]?frac(?:\{(\d{1,30})\}\{(\d{1,30})\}|(\d)(\d))|(\d{1,30})/(\d{1,30}))", re.ASCII
)
_MOST_CHARACTERS = 1024
"""Longest answer searched for a form: longer text is hardly a number, a word or a letter."""


def unescaped(text: str) -> str:
    """Return `\\$1,\\!000` and `1{,}000` as typed without LaTeX, typographic signs (a minus, `½`, `√2`,
    `10⁻³`) as typed on a keyboard, and `**42**` without Markdown's marks."""
    if not text.isascii():
        for pattern, typed in _TYPESET:
            text = pattern.sub(typed, text)
        text = text.translate(_SIGNS)
    for pattern, plain in _ESCAPED:
        text = pattern.sub(plain, text)
    if "." in text:
        text = _REPEATING.sub(_fraction_of, text)
    return _unmarked(text)


def _fraction_of(found: re.Match[str]) -> str:
    """Return `0.1\\overline{6}`, `0.1(6)` or `0.1666...` as a fraction."""
    sign, whole, fixed, *marked, dots = found.groups()
    block = next((re.sub(r"\D", "", each) for each in marked if each), "")
    if dots:
        fixed, block = _period(fixed)
    if not block:
        return found[0]
    value = Fraction(
        int(whole + fixed + block) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(block) - 1)
    )
    return f"{sign}{value}"


def _period(digits: str) -> tuple[str, str]:
    """Split digits before `...` where they begin to repeat; no period if they do so less than twice."""
    for length in range(1, len(digits) // 2 + 1):
        block = digits[-length:]
        if digits.endswith(2 * block):
            start = len(digits)
            while digits[:start].endswith(block):
                start -= length
            return digits[:start], block
    return digits, ""


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _unmarked(text: str) -> str:
    return _MARKED.sub(r"\2", text)


def plain_number(text: str) -> Fraction | None:
    """Return the value of digits with an optional sign, dollar, thousands, decimals and power of ten as in
    `1.5e3` and `1.5*10^3`, or of a mixed number as `2 1/2`; None for anything else."""
    said = text.strip(SPACE)
    if (enclosed := _ENCLOSED.fullmatch(said)) and "," not in said:  # (1,200) is a pair
        said = (enclosed[1] or enclosed[2] or "").strip(SPACE)
    if mixed := _MIXED.fullmatch(said):
        sign, whole, over, under = mixed.groups()
        value = int(whole) + Fraction(int(over), int(under)) if int(under) else None
        return -value if value is not None and sign else value
    match = _PLAIN.fullmatch(said)
    if match is None:
        return None
    sign, whole, decimals, power = match.groups()
    return Fraction(f"{sign}{whole.replace(',', '')}{(decimals or '').rstrip('.')}e{power or 0}")


def unmixed(text: str, reads_and: bool = False) -> str:
    """Write mixed numbers as fractions: `3 1/2`, `3\\frac12`, and `3 and 1/2` where no list is asked for."""
    if reads_and:
        text = _MIXED_AND.sub(r"\1 \2", text)
    text = _MIXED_LATEX.sub(lambda found: f"{found[1]} {found[2] or found[4]}/{found[3] or found[5]}", text)
    return _MIXED_TYPED.sub(lambda found: str(int(found[1]) + Fraction(found[2])), text)


def words(text: str) -> list[str]:
    """Return the items of a list of words, or the single one, in lower case and in order; else empty. Letters
    alone may also be factors, as in `xy`: one of the words has three or more."""
    bare = " ".join(TEXT.sub(r"\1", text).strip("$" + SPACE).casefold().split())
    bare = re.sub(r"^(?:an?|the) ", "", bare)
    if not _WORDS.fullmatch(bare) or not re.search(r"[^\W\d_]{3}", bare):
        return []
    return sorted(_LIST.split(bare.removesuffix(".")))


def chosen(text: str, choices: Sequence[Any]) -> str | None:
    """Return the letter of the choice that is meant: `C`, `(c)`, `C. with its text`, `the answer is C`,
    `C because ...`, or that text alone; `$C$`, `**C**`, `\\text{C}` and `\\boxed{C}` too. None if the text
    names several.
    """
    texts = [str(choice).strip(SPACE).casefold() for choice in choices]
    typed = _FULL_WIDTH.sub(lambda found: _plain(found[0]), text).strip(SPACE)
    inner = out_of_box(_SETTING.sub("", _unmarked(typed)).strip(SPACE))
    for said in (typed, _unmarked(typed), inner, TEXT.sub(r"\1", inner).strip(SPACE)):
        is_bare = re.fullmatch(r"\(?[A-Z][).:]?", said, re.ASCII)
        # Try a text before a letter: a text may begin like one, as `C. elegans` does.
        for whole in (said, said.removesuffix(".")):
            if whole.casefold() in texts and not is_bare:
                return chr(ord("A") + texts.index(whole.casefold()))
        meant = _LETTER.match(said) or _LETTER_SET_APART.match(said) or _LETTER_SAID.match(said)
        if not meant:
            continue
        found = str(next(filter(None, meant.groups()))).upper()
        place, rest = ord(found) - ord("A"), said[meant.end() :].strip(SPACE)
        if place < len(texts) and rest.casefold().removesuffix(".") == texts[place].removesuffix("."):
            return found
        others = {letter for letter in _ANOTHER.findall(rest) if letter != found}
        if place < len(texts) and not others:
            return found
        break
    return None if is_denied(typed) else _chosen_in_words(inner, texts)


def _chosen_in_words(text: str, texts: Sequence[str]) -> str | None:
    """Return the letter in `Option B is correct`, `(b) Bonn`, `[B]`, `It is Bonn.` or `答案是B`."""
    said = _CHOICE_LEAD.sub("", without_cjk(plainer(text))).strip(SPACE)
    if (bare := said.removesuffix(".").casefold()) in texts:
        return chr(ord("A") + texts.index(bare))
    match = _CHOICE.fullmatch(said)
    if match is None:
        return None
    letter = (match[1] or match[2] or match[3]).upper()
    place, named = ord(letter) - ord("A"), (match[4] or match[5] or "").strip(SPACE).casefold()
    is_consistent = place < len(texts) and (
        not named or named.removesuffix(".") == texts[place].removesuffix(".")
    )
    return letter if is_consistent else None


def plainly(text: str) -> str:
    """Remove what only formats it: dollars, \\left, \\text around words, blanks that separate nothing."""
    return _LOOSE.sub("", _SPACES.sub(" ", _COSMETIC.sub("", TEXT.sub(r"\1", text))))


def counted_as(text: str, judge: str, metadata: Mapping[str, Any]) -> str:
    """Return the form in which an answer is counted for a majority: the same for `B` and `(B) Bonn`, for
    `0.5` and `\\dfrac{1}{2}`, for `Paris.` and `paris`, if the judge accepts one for the other. Formulas that
    only algebra makes equal stay apart. `judge` is the name of the item's judge (judges.JUDGES).
    """
    if len(text) > _MOST_CHARACTERS:
        return text
    if judge == "choice":
        return chosen(text, metadata.get("choices") or ()) or text.strip(SPACE).casefold()
    if judge != "math":
        return text.strip(SPACE)
    text = unescaped(text)
    bare = plainly(text).removesuffix(".")
    number = plain_number(text)
    if number is None:
        number = _fraction(bare)
    if number is not None:
        return str(number)
    return ", ".join(words(text)) or bare


def _fraction(bare: str) -> Fraction | None:
    match = _FRACTION.fullmatch(bare)
    if match is None:
        return plain_number(bare) if " " not in bare and "," not in bare else None
    sign, *parts = match.groups()
    over, under = (int(part) for part in parts if part is not None)
    return Fraction(-over if sign else over, under) if under else None
