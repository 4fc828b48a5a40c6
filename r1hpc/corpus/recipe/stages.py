"""Define a recipe's optional blocks: clean, dedup, decontaminate, mix, and a source's generate.

    {name: synthetic, generate: {teacher: models/r1, prompts: gsm8k.jsonl, answer: answer, keep: correct}}

Each dataclass is one block of the YAML; its numbers are explained beside the code that uses them
(corpus/clean/ and data/read/mixture.py). A source with `generate` has the documents that a teacher writes to
the prompts of a file; names and meanings are those of stage generate's settings, if it has them.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import one_of

RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
_GROUPS = {"gopher": ("gopher_quality", "gopher_repetition")}
PII = ("keep", "mask", "drop")
KEEP = ("all", "correct", "best")
_WITHOUT_MEANING = ("teacher", "prompts", "num_prompts", "prompts_per_unit")
"""Settings of place, amount or division, which do not change what is written."""
_BYTES_PER_TOKEN = 4
_PLACES = re.compile(r"\{(question|prompt|completion)\}")


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


@dataclass(frozen=True)
class GenerateRecipe:
    """A generated source: the teacher answers every prompt `num_samples` times."""

    teacher: str
    """Folder of a Hugging Face causal language model with its tokenizer."""
    prompts: str
    """JSON lines (.gz, .zst, .bz2 too) or Parquet: a prompt each."""
    prompt: str = "prompt"
    """The column of the prompt."""
    answer: str | None = None
    """The column of the right answer; null: none, and no verifier."""
    choices: str = ""
    """The column of the choices, if the answer is one of several."""
    num_prompts: int | None = None
    """Use only the first so many."""
    template: str = "{question}"
    """The text of the question, with the prompt in place of {question}."""
    document: str = "{completion}"
    """The stored text, made of {question} (the column), {prompt} (as asked) and {completion}. Traces store
    the last two by their roles."""
    num_samples: int = 1
    """Completions of each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_completion_length: int = 1024
    """Tokens; a completion that has not ended by then is left out."""
    seed: int = 0
    keep: str = "all"
    """all; correct; best: the one of highest reward of each prompt, if it is correct."""
    min_pass_rate: float = 0.0
    """Prompts that the teacher solves less often are left out."""
    max_pass_rate: float = 1.0
    """Prompts that the teacher solves more often are left out: they are too easy."""
    answer_in: str = "tags"
    """Place of the answer in a completion. tags: <answer>...</answer>; boxed: the last \\boxed{...}."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, if it has one; none: prompts are used as they are."""
    system_prompt: str | None = None
    open_thinking: bool = False
    """`<think>` ends every prompt."""
    prompts_per_unit: int = 64
    """A kill keeps finished units and loses the current one."""
    prompts_per_batch: int = 0
    """Prompts decoded together, which bounds the KV cache. 0: all of the unit."""

    def __post_init__(self) -> None:
        one_of("generate.keep", self.keep, KEEP)
        one_of("generate.answer_in", self.answer_in, ("tags", "boxed"))
        one_of("generate.chat_template", self.chat_template, ("auto", "none"))
        self._check_numbers()
        if self.template.count("{question}") != 1:
            raise UsageError(
                f"generate.template must hold {{question}} exactly once; it is {self.template!r}"
            )
        if "{completion}" not in self.document:
            raise UsageError(f"generate.document must hold {{completion}}; it is {self.document!r}")
        self._check_judged()

    def _check_numbers(self) -> None:
        for name in ("num_samples", "max_completion_length", "prompts_per_unit", "num_prompts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"generate.{name} must be at least 1, not {value}")
        for name in ("top_k", "seed", "prompts_per_batch"):
            if not 0 <= getattr(self, name) < 2**63:
                raise UsageError(f"generate.{name} must be at least 0, not {getattr(self, name)}")
        for name in ("top_p", "min_p", "min_pass_rate", "max_pass_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"generate.{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not self.top_p:
            raise UsageError("generate.top_p must be above 0; 1 keeps all tokens")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"generate.temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.temperature == 0 and self.num_samples > 1:
            raise UsageError("generate.num_samples: at temperature 0 all samples are the same; take 1")

    def _check_judged(self) -> None:
        """Refuse settings that need a verifier if the prompts have no answers."""
        if self.min_pass_rate > self.max_pass_rate:
            raise UsageError(
                f"generate.min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}"
            )
        asked = {
            "keep": self.keep != "all",
            "min_pass_rate": self.min_pass_rate > 0,
            "max_pass_rate": self.max_pass_rate < 1,
            "choices": bool(self.choices),
        }
        for name, is_asked in asked.items():
            if is_asked and self.answer is None:
                raise UsageError(
                    f"generate.{name} needs generate.answer: the column of the right answer in {self.prompts}"
                )
        asked_for = f"{self.system_prompt or ''}{self.template}"
        is_judged = self.answer is not None and self.answer_in == "tags"
        if is_judged and "\\boxed" in asked_for and "<answer>" not in asked_for:
            raise UsageError(
                "generate.answer_in=tags counts what <answer> </answer> holds, and the prompts ask for "
                "\\boxed{}: say answer_in: boxed"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns to read from the file of prompts."""
        return tuple(name for name in (self.prompt, self.answer, self.choices) if name)

    def compose(self, **parts: str) -> str:
        """Return the document of question, prompt and completion. Braces in these stay as they are."""
        return _PLACES.sub(lambda found: parts[found[1]], self.document)

    def meaning(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that decide what a teacher writes."""
        return {name: value for name, value in settings.items() if name not in _WITHOUT_MEANING}

    def most_bytes(self, num_prompts: int) -> int:
        """Return an upper estimate of the text from so many prompts, at four bytes a token."""
        return num_prompts * self.num_samples * self.max_completion_length * _BYTES_PER_TOKEN
