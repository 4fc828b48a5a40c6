"""Run a unit of a recipe's stage `generate`: a teacher answers a range of prompts; the answers are filtered.

    build_dataset(recipe, out, teach=TeachTask)

Cheap to import: a build on a login node uses it to name its units. torch is loaded only when it writes.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.failpoints import failpoint
from r1hpc.corpus.build.generated import DOCUMENTS, ORIGINS, origin_schema
from r1hpc.corpus.recipe.recipe import TRACES, Recipe
from r1hpc.corpus.recipe.stages import GenerateRecipe
from r1hpc.corpus.sources.prompts import PromptRange, Row, read_prompts, teacher_folder
from r1hpc.corpus.sources.read import SourceSpan

if TYPE_CHECKING:
    from r1hpc.train.generate.teacher import Said

_LIBRARIES = ("torch", "transformers", "tokenizers", "jinja2", "math-verify", "sympy")
_CODE = (
    *(
        "train/generate/teach_unit.py",
        "train/generate/teacher.py",
        "train/rollout/sampler.py",
        "train/rollout/torch_engine.py",
        "train/model/model.py",
    ),
    *("train/generate/generate.py", "corpus/recipe/stages.py", "corpus/sources/prompts.py"),
    *(
        "plan/model/chat_template.py",
        "tasks/text/prompt_format.py",
        "tasks/grading/completion.py",
        "tasks/problems/task.py",
        "tasks/text/tokenizer.py",
    ),
    *(
        "tasks/grading/judges.py",
        "tasks/grading/judge_math.py",
        "tasks/grading/answers.py",
        "tasks/grading/arithmetic.py",
    ),
    *("tasks/problems/file.py", "tasks/problems/file.py", "tasks/reward/rewards.py", "tasks/reward/terms.py"),
    *("tasks/grading/algebra.py", "tasks/grading/verifier.py", "tasks/grading/worker.py"),
)
"""Code that decides a word or a verdict."""


@dataclass(frozen=True)
class TeachTask:
    """The documents of one span of a generated source."""

    recipe: Recipe
    span: SourceSpan

    @property
    def made_by(self) -> dict[str, str]:
        """Return the code and library versions that decide what is written."""
        return _made_by()

    @property
    def most_at_once(self) -> int | None:
        """Return the limit on this machine: each holds a teacher, on a GPU if there are any."""
        import torch

        return torch.cuda.device_count() or None

    def write(self, folder: Path) -> dict[str, Any]:
        import torch

        from r1hpc.train.parallel.distributed import choose_accelerator

        choose_accelerator(torch.cuda.is_available())  # before the next import, which brings DeepSpeed
        from r1hpc.train.generate.teacher import load_teacher

        generate, span = self._generate, self.span
        prompts = PromptRange(span.start, span.stop, span.digest)
        rows = read_prompts(self.recipe.resolve(generate.prompts), generate, prompts)
        teacher = load_teacher(teacher_folder(self.recipe, generate), generate)
        is_traces = self.recipe.sources[span.source].kind == TRACES
        with _Output(folder, is_traces, generate) as output:
            for number, batch in _batches(rows, span.start, generate.prompts_per_batch):
                failpoint("data.generate.batch")
                for answers in teacher.ask(number, batch):
                    for said in answers:
                        output.append(said)
        return output.record

    @property
    def _generate(self) -> GenerateRecipe:
        generate = self.recipe.sources[self.span.source].generate
        assert generate is not None, "planned for generated sources only"
        return generate


@functools.cache
def _made_by() -> dict[str, str]:
    package = Path(__file__).parents[2]
    code = hashlib.sha256(b"".join((package / name).read_bytes() for name in _CODE)).hexdigest()
    return {"code": code} | {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _batches(rows: Sequence[Row], first: int, size: int) -> Iterator[tuple[int, Sequence[Row]]]:
    """Yield the prompts decoded together, with the number of their first."""
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield first + start, rows[start : start + size]


class _Output:
    """The two files of a unit, and their totals."""

    def __init__(self, folder: Path, is_traces: bool, generate: GenerateRecipe) -> None:
        self._folder, self._is_traces, self._generate = folder, is_traces, generate
        self._lines = (folder / DOCUMENTS).open("wb")
        self._origins: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {"in": 0, "kept": 0, "num_tokens": 0, "dropped": {}}

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        import pyarrow.parquet

        self._lines.close()
        table = pyarrow.Table.from_pylist(self._origins, origin_schema())
        pyarrow.parquet.write_table(table, self._folder / ORIGINS, compression="zstd")

    def append(self, said: "Said") -> None:
        """Add one completion, kept or left out."""
        record = self.record
        record["in"] += 1
        record["num_tokens"] += said.num_tokens
        self._origins.append({**said.origin, "position": None if said.rule else self._lines.tell()})
        if said.rule:
            record["dropped"][said.rule] = record["dropped"].get(said.rule, 0) + 1
        else:
            record["kept"] += 1
            self._lines.write(json.dumps(self._document(said)).encode() + b"\n")

    def _document(self, said: "Said") -> dict[str, str]:
        parts = {"question": said.question, "prompt": said.prompt, "completion": said.text}
        if self._is_traces:
            return {name: parts[name] for name in ("prompt", "completion")}
        return {"text": self._generate.compose(**parts)}
