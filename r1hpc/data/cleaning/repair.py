"""Text repair by ftfy (Speer 2019): mojibake, HTML entities, control characters, line ends, NFC.

A text that shows none of these signs is not sent through it: it would come out the same, and most are such.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from r1hpc.base.errors import UsageError

# Typographic quotes stay, and so do ligatures and full-width letters: an author's choice is no damage.
_KEPT = {"uncurl_quotes": False, "fix_character_width": False, "fix_latin_ligatures": False}
_SIGNS = re.compile(
    "&[#A-Za-z][A-Za-z0-9]{1,31};|[\x00-\x08\x0b-\x0d\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd\ud800-\udfff]"
    "|[\xc2-\xf4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)


def repair(text: str) -> str:
    """The text as it was meant.

    Raises:
        UsageError: ftfy is not installed.
    """
    if text.isascii() and "&" not in text and _is_plain(text):
        return text
    if _SIGNS.search(text) or not unicodedata.is_normalized("NFC", text):
        return str(_fix()(text))
    return text


def _is_plain(text: str) -> bool:
    return _SIGNS.search(text) is None


@functools.cache
def _fix() -> Callable[[str], Any]:
    try:
        import ftfy
    except ImportError:
        raise UsageError(
            "clean.repair needs the package ftfy; install the extra: pip install r1hpc[data], or set "
            "repair: false"
        ) from None
    config = ftfy.TextFixerConfig(explain=False, **_KEPT)
    return functools.partial(ftfy.fix_text, config=config)
