"""The blocks of a recipe between reading and storing: clean, dedup, decontaminate, mix.

All are optional. Each dataclass is one block of the YAML; what its numbers mean stands beside the code that
uses them (see cleaning/ and mixture).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.mixing import MixConfig

RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
_GROUPS = {"gopher": ("gopher_quality", "gopher_repetition")}
PII = ("keep", "mask", "drop")
MIX_BY = ("tokens", "documents")


def one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UsageError naming the nearest value unless `value` is allowed."""
    if value not in allowed:
        raise UsageError(
            f"{where} must be one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}"
        )


@dataclass(frozen=True)
class CleanRecipe:
    """Which documents are kept, and what is repaired or masked in them."""

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
        """The rules by their own names, in the order in which they are applied."""
        chosen = {name for rule in self.rules for name in _GROUPS.get(rule, (rule,))}
        return tuple(name for name in RULES if name in chosen)


@dataclass(frozen=True)
class MinhashRecipe:
    """Near duplicates by MinHash over word n-grams, found by bands of rows (FineWeb's numbers)."""

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.7
    """Candidates whose estimated Jaccard similarity is less are not taken for duplicates."""

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
    """Of documents with the same text, or nearly, the first is kept, over all sources in their order."""

    exact: bool = True
    minhash: MinhashRecipe | None = None


@dataclass(frozen=True)
class DecontaminateRecipe:
    """Documents that share an n-gram of words with an evaluation file are left out."""

    against: tuple[str, ...]
    """Files: JSON lines (each string in them), or text (each paragraph)."""
    ngram: int = 13
    """Llama and GPT-3 take 13; an item of fewer words is searched whole, down to min_words."""
    min_words: int = 8

    def __post_init__(self) -> None:
        if not self.against:
            raise UsageError("decontaminate.against is empty: name the evaluation files")
        if not 1 <= self.min_words <= self.ngram <= 256:
            raise UsageError(
                "decontaminate needs 1 <= min_words <= ngram <= 256, "
                f"not min_words {self.min_words} and ngram {self.ngram}"
            )


@dataclass(frozen=True)
class MixRecipe:
    """In which shares training sees the sources (see mixture)."""

    by: str = "tokens"
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source by name: fractions that sum to 1 or 100, or whole numbers. None: its size."""
    max_epochs: float | None = None
    """A source that has been seen so often is left out from then on."""
    temperature: float = 1.0
    """Shares are raised to 1/temperature: above 1 small sources gain."""

    def __post_init__(self) -> None:
        one_of("mix.by", self.by, MIX_BY)
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"mix.temperature must be a positive number, not {self.temperature}")
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise UsageError(f"mix.max_epochs must be a positive number, not {self.max_epochs}")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(f"mix.weights.{name} must be a positive number, not {weight}")

    def check_sources(self, names: tuple[str, ...]) -> None:
        """Raise UsageError unless the weights, where there are any, name exactly the sources."""
        if self.weights:
            check_weighted("mix.weights", self.weights, names)

    def check_sum(self) -> None:
        """Raise UsageError for fractions that sum neither to 1 nor to 100 (within 1 %): one is mistyped.

        Only for what is built now: weights of a dataset that is there stay as they are.
        """
        weights = self.weights.values()
        total = math.fsum(weights)
        is_near = any(math.isclose(total, whole, rel_tol=0.0101) for whole in (1, 100))
        if is_near or all(float(weight).is_integer() for weight in weights):
            return
        shares = ", ".join(f"{name} {weight / total:.1%}" for name, weight in self.weights.items())
        raise UsageError(
            f"mix.weights sum to {total:g}, not to 1 or 100: the shares would be {shares}. Correct them, or "
            "give whole numbers, which are parts of their sum"
        )


def check_weighted(where: str, weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise UsageError unless the weights name exactly the sources."""
    for name in weights:
        if name not in names:
            raise UsageError(f"{where} names no source {name!r}{nearest(name, names)}")
    if missing := [name for name in names if name not in weights]:
        raise UsageError(f"{where} says nothing of source {missing[0]!r}; give each source its share")


def check_schedule(mix: MixConfig, names: Sequence[str]) -> None:
    """Raise UsageError unless each change of weights of a run names exactly the sources of its dataset."""
    for number, entry in enumerate(mix.schedule):
        check_weighted(f"data.mix.schedule[{number}].weights", entry["weights"], names)
