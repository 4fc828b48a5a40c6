"""Define a recipe's blocks clean, dedup and decontaminate. corpus/clean/ explains their numbers."""

from dataclasses import dataclass

from r1hpc.base.errors import UsageError
from r1hpc.base.names import one_of

RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
_GROUPS = {"gopher": ("gopher_quality", "gopher_repetition")}
PII = ("keep", "mask", "drop")


@dataclass(frozen=True)
class CleanRecipe:
    """The documents to keep, and what to repair or mask in them."""

    lang: tuple[str, ...] = ()
    """ISO 639 codes to keep; none: all languages, and none is identified."""
    min_lang_score: float = 0.65
    """FineWeb's threshold for English (Penedo et al. 2024, section 3.3)."""
    rules: tuple[str, ...] = ()
    """gopher (both halves), gopher_quality, gopher_repetition, c4, fineweb."""
    repair: bool = True
    """Text repair by ftfy: mojibake, control characters, HTML entities, line ends, NFC."""
    pii: str = "keep"
    """keep, mask, or drop the document."""

    def __post_init__(self) -> None:
        for rule in self.rules:
            one_of("clean.rules", rule, (*_GROUPS, *RULES))
        one_of("clean.pii", self.pii, PII)
        if not 0 <= self.min_lang_score <= 1:
            raise UsageError(f"clean.min_lang_score must lie between 0 and 1, not {self.min_lang_score}")
        for code in self.lang:
            if not code.isalpha() or code != code.lower():
                raise UsageError(f"clean.lang: {code!r} is not a language code such as en, de or zh")

    @property
    def single_rules(self) -> tuple[str, ...]:
        """Return the rules by their own names, in the order in which they apply."""
        chosen = {name for rule in self.rules for name in _GROUPS.get(rule, (rule,))}
        return tuple(name for name in RULES if name in chosen)


@dataclass(frozen=True)
class MinhashRecipe:
    """Near duplicates by MinHash over word n-grams, found by bands of rows (FineWeb's numbers)."""

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.7
    """Candidates with a lower estimated Jaccard similarity are not duplicates."""

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows"):
            if not 1 <= getattr(self, name) <= 256:
                raise UsageError(
                    f"dedup.minhash.{name} must lie between 1 and 256, not {getattr(self, name)}"
                )
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"dedup.minhash.threshold must lie between 0 and 1, not {self.threshold}")


@dataclass(frozen=True)
class DedupRecipe:
    """Keep the first of equal or nearly equal documents, over all sources in their order."""

    exact: bool = True
    minhash: MinhashRecipe | None = None


@dataclass(frozen=True)
class DecontaminateRecipe:
    """Leave out documents that share an n-gram of words with an evaluation file."""

    against: tuple[str, ...]
    """Files: JSON lines (each string in them), or text (each paragraph)."""
    ngram: int = 13
    """Llama and GPT-3 use 13; an item of fewer words is searched as a whole, down to min_words."""
    min_words: int = 8

    def __post_init__(self) -> None:
        if not self.against:
            raise UsageError("decontaminate.against is empty: name the evaluation files")
        if not 1 <= self.min_words <= self.ngram <= 256:
            raise UsageError(
                "decontaminate needs 1 <= min_words <= ngram <= 256, "
                f"not min_words {self.min_words} and ngram {self.ngram}"
            )
