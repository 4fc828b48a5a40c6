"""The block `generate` of a source: its documents are what a teacher says to the prompts of a file.

    {name: synthetic, generate: {teacher: models/r1, prompts: gsm8k.jsonl, answer: answer, keep: correct}}

Names and meanings are those of the settings of stage generate, wherever a setting has one.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.data.recipe_stages import one_of

KEEP = ("all", "correct", "best")
_WITHOUT_MEANING = ("teacher", "prompts", "num_prompts", "prompts_per_unit")
"""What says where something lies, how much there is or how it is divided, not what is written."""
_BYTES_PER_TOKEN = 4
_PLACES = re.compile(r"\{(question|prompt|completion)\}")


@dataclass(frozen=True)
class GenerateRecipe:
    """A source that is made: every prompt is put to the teacher `num_samples` times."""

    teacher: str
    """Folder of a Hugging Face causal language model with its tokenizer."""
    prompts: str
    """JSON lines (.gz, .zst, .bz2 too) or Parquet: a prompt each."""
    prompt: str = "prompt"
    """The column of the prompt."""
    answer: str | None = None
    """The column of the right answer; null: there is none, and no verifier."""
    choices: str = ""
    """The column of the choices, where the answer is one of several."""
    num_prompts: int | None = None
    """Only the first so many."""
    template: str = "{question}"
    """What is asked: the prompt in place of {question}."""
    document: str = "{completion}"
    """What is stored, of {question} (the column), {prompt} (as asked) and {completion}. Traces store the last
    two by their roles."""
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
    """Prompts that the teacher solves more often are left out: they teach nothing."""
    answer_in: str = "tags"
    """Where a completion says its answer. tags: <answer>...</answer>; boxed: the last \\boxed{...}."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, where it has one; none: prompts are put as they are."""
    system_prompt: str | None = None
    open_thinking: bool = False
    """`<think>` ends every prompt."""
    prompts_per_unit: int = 64
    """A finished unit is kept by a kill, one under way is done again."""
    prompts_per_batch: int = 0
    """Prompts that are decoded together: it bounds the KV cache. 0: those of the unit."""

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
        """Refuse what only a verifier could decide where the prompts have no answers."""
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
        """Those of the file of prompts that are read."""
        return tuple(name for name in (self.prompt, self.answer, self.choices) if name)

    def compose(self, **parts: str) -> str:
        """The document of question, prompt and completion. Braces in what is put in stay what they are."""
        return _PLACES.sub(lambda found: parts[found[1]], self.document)

    def meaning(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of the settings that decide what a teacher writes."""
        return {name: value for name, value in settings.items() if name not in _WITHOUT_MEANING}

    def most_bytes(self, num_prompts: int) -> int:
        """Of text that comes of so many prompts, at four bytes a token: an upper estimate."""
        return num_prompts * self.num_samples * self.max_completion_length * _BYTES_PER_TOKEN
