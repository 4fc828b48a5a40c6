"""A source that a teacher writes: filtered, counted, on record to the completion, kept across kills."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset, build_share
from r1hpc.corpus.build.stages import Share
from r1hpc.corpus.build.vocabulary import Encoder
from r1hpc.corpus.inspect.describe import SampleOrder, audit, trace_document, trace_sample
from r1hpc.corpus.recipe.recipe import load_recipe, parse_recipe
from r1hpc.corpus.sources.read import list_spans
from r1hpc.data.read.reader import open_dataset
from r1hpc.data.read.sft_documents import open_traces
from r1hpc.shard import main
from r1hpc.train.generate.teach_unit import TeachTask
from tests.corpus.builds import done_units, names, start_build
from tests.corpus.corpus import tree, write_recipe
from tests.corpus.teachers import write_teacher

pytestmark = pytest.mark.xdist_group("teacher")

GENERATE: dict[str, Any] = {
    "teacher": "teacher",
    "prompts": "sums.jsonl",
    "answer": "answer",
    "keep": "correct",
    "num_samples": 6,
    "max_completion_length": 12,
    "document": "{question}{completion}",
    "prompts_per_unit": 3,
}
SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(3) for b in range(4)]
"""Whose answers are 0 to 5; the teacher says 0 to 3."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def folder(tmp_path: Path, teacher: Path) -> Path:
    """A folder with the teacher and its prompts."""
    (tmp_path / "teacher").symlink_to(teacher)
    write_prompts(tmp_path, SUMS)
    return tmp_path


def write_prompts(folder: Path, sums: list[tuple[str, str]]) -> None:
    rows = [{"prompt": prompt, "answer": answer, "note": "of no matter"} for prompt, answer in sums]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path, source: dict[str, Any] | None = None, **generate: Any) -> Path:
    """A recipe of one generated source; `source` are keys of it beside generate."""
    return write_recipe(folder, sources=[{"name": "sums", **(source or {}), "generate": GENERATE | generate}])


def build(path: Path, name: str = "out", **how: Any) -> Path:
    return build_dataset(path, path.parent / name, teach=TeachTask, **how).path


def texts(path: Path) -> list[str]:
    dataset = open_dataset(path)
    assert dataset.tokenizer_path is not None
    encoder = Encoder(dataset.tokenizer_path / "tokenizer.json", dataset.eos_id)
    infos = [dataset.documents[number] for number in range(dataset.num_documents)]
    return [encoder.decode(dataset.read(i.token_start, i.token_stop - i.token_start)[:-1]) for i in infos]


def origins(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.glob("generated/*/*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_only_right_answers_are_kept_and_every_completion_is_counted(folder: Path) -> None:
    path = build(recipe(folder, min_pass_rate=0.1, max_pass_rate=0.6))
    right = {f"{prompt}<think></think><answer>{answer}</answer>" for prompt, answer in SUMS}
    found = texts(path)
    assert found
    assert set(found) <= right
    documents = audit(path)["documents"]
    assert documents["in"] == len(SUMS) * 6 == documents["kept"] + sum(documents["dropped"].values())
    assert set(documents["dropped"]) == {"generate.pass_rate", "generate.repeated", "generate.wrong"}
    rows = origins(path)
    assert [(row["item"], row["sample"]) for row in rows] == [(n // 6, n % 6) for n in range(len(SUMS) * 6)]
    for item, (prompt, answer) in enumerate(SUMS):
        mine = [row for row in rows if row["item"] == item]
        rate = sum(row["correct"] for row in mine) / 6
        assert {row["prompt"] for row in mine} == {prompt}
        assert {row["pass_rate"] for row in mine} == {rate}
        kept = [row for row in mine if not row["rule"]]
        # Of a prompt one text at most is right, which is kept once.
        assert len(kept) == (0.1 <= rate <= 0.6), (prompt, answer, rate)
    assert any(row["value"] == 0 and row["rule"] == "generate.pass_rate" for row in rows)


def test_a_document_names_its_teacher_prompt_seed_and_settings(folder: Path) -> None:
    path = build(recipe(folder, {"license": "CC0-1.0"}, seed=7))
    script = "cd teacher && sha256sum *.json *.safetensors | LC_ALL=C sort -k2 | sha256sum"
    said = subprocess.run(script, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    for number, text in enumerate(texts(path)):
        document = trace_document(path, number, SampleOrder(8), 0)["document"]
        origin = document["origin"]
        assert origin["teacher"] == said.split()[0]
        assert text.startswith(origin["prompt"])
        assert SUMS[origin["item"]][0] == origin["prompt"]
        assert origin["settings"] == load_recipe(folder / "recipe.yaml").content["sources"][0]["generate"]
        assert (origin["settings"]["seed"], origin["correct"]) == (7, True)
        assert document["license"] == "CC0-1.0"


def test_the_same_prompt_and_seed_give_the_same_words_in_other_company(folder: Path) -> None:
    wide = texts(build(recipe(folder, keep="all"), "wide"))
    assert texts(build(recipe(folder, keep="all", prompts_per_unit=12), "one_unit")) == wide
    assert texts(build(recipe(folder, keep="all", prompts_per_batch=1), "one_by_one")) == wide
    assert texts(build(recipe(folder, keep="all", seed=1), "other")) != wide


def test_killed_generation_goes_on_with_the_units_that_are_done(folder: Path) -> None:
    path, out = recipe(folder), folder / "data" / "out"
    reference = build(path, "reference")
    share = ("--stage", "generate", "--share", "0/2")
    killed = start_build(path, out, *share, failpoint="data.generate.batch:kill9::2")
    assert killed.wait(200) == -signal.SIGKILL
    before = done_units(out.parent)
    assert len(before) == 2  # the teacher's hash, and the first unit of the share
    assert start_build(path, out, failpoint="data.build.publish:kill9").wait(200) == -signal.SIGKILL
    assert before.items() <= done_units(out.parent).items()
    assert tree(build_dataset(path, out, teach=TeachTask).path) == tree(reference)
    assert names(out.parent) == {"out"}


def test_a_changed_prompt_redoes_its_unit_and_a_changed_teacher_all(folder: Path) -> None:
    path, out = recipe(folder), folder / "out"
    first = generated(path, out)
    write_prompts(folder, [*SUMS[:4], ("3+0=", "3"), *SUMS[5:]])
    second = generated(path, out)
    assert (len(first), len(second)) == (4, 5)
    assert first.items() <= second.items()
    elsewhere = shutil.copytree((folder / "teacher").resolve(), folder / "elsewhere")
    moved = recipe(folder, teacher="elsewhere")
    assert generated(moved, out) == second
    assert generated(recipe(folder, num_prompts=6, teacher="elsewhere"), out) == second
    config = elsewhere / "config.json"
    config.write_text(config.read_text().replace('embeddings": 64', 'embeddings": 60'))
    assert len(generated(recipe(folder, teacher="elsewhere"), out)) == 9


def generated(path: Path, out: Path) -> dict[str, int]:
    """The units of stage generate, made now where they are missing, with the time of their record."""
    build_share(path, out, Share("generate", 0, 1), teach=TeachTask)
    found = out.parent.glob(".staging-*/units/generate/*/done.json")
    return {each.parent.name: each.stat().st_mtime_ns for each in found}


def test_traces_keep_prompt_and_completion_apart(folder: Path) -> None:
    path = build(recipe(folder, {"kind": "traces"}))
    dataset = open_traces(path)
    assert dataset.num_documents > 3
    found = audit(path)
    assert found["documents"]["in"] == len(SUMS) * 6
    assert found["documents"]["kept"] == dataset.num_documents
    _, documents = trace_sample(path, 0, SampleOrder())
    (document,) = documents
    prompt_tokens = int(dataset.prompt_lengths[document["number"]])
    assert prompt_tokens == len(document["origin"]["prompt"])  # one id a byte


def test_a_completion_that_makes_no_trace_is_counted(folder: Path) -> None:
    """The dataset's tokenizer ends with what the teacher says for 3: nobody can correct the line."""
    tokenizer = {"kind": "path", "path": "teacher", "eos_token": "3"}
    source = {"name": "sums", "kind": "traces", "generate": GENERATE}
    path = build(write_recipe(folder, sources=[source], tokenizer=tokenizer))
    documents = audit(path)["documents"]
    assert documents["dropped"]["no_trace"] > 0
    assert documents["in"] == len(SUMS) * 6 == documents["kept"] + sum(documents["dropped"].values())


def test_what_a_teacher_wrote_is_cleaned_and_mixed_like_any_source(folder: Path) -> None:
    """Answers without their prompts are few: the second of each is a duplicate."""
    (folder / "web.jsonl").write_text('{"text": "Rain falls on the roofs of the town."}\n')
    web = {"name": "web", "kind": "jsonl", "root": ".", "glob": "web.jsonl"}
    generated = {"name": "sums", "generate": GENERATE | {"document": "{completion}", "num_samples": 16}}
    stages = {"clean": {}, "dedup": {"exact": True}, "mix": {"weights": {"web": 0.5, "sums": 0.5}}}
    path = build(write_recipe(folder, sources=[web, generated], **stages))
    assert sorted(texts(path)[1:]) == [f"<think></think><answer>{digit}</answer>" for digit in range(4)]
    web_counts, counts = (each["documents"] for each in audit(path)["sources"])
    assert web_counts == {"in": 1, "kept": 1, "dropped": {}}
    assert counts["in"] == len(SUMS) * 16 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["dropped"]["exact_duplicate"] > 0
    document = trace_document(path, 2, SampleOrder(8, 0, 2), 0)["document"]
    assert (document["decisions"]["rule"], document["origin"]["correct"]) == ("", True)


def test_prompts_without_answers_are_only_sampled(folder: Path) -> None:
    (folder / "sums.jsonl").write_text('{"ask": "1+1"}\n\n{"ask": "1*1"}\n')
    path = build(recipe(folder, answer=None, keep="all", prompt="ask", template="{question}?", num_samples=2))
    assert len(texts(path)) >= 2
    for row in origins(path):
        assert (row["correct"], row["pass_rate"], row["prompt"][-1]) == (None, None, "?")


def test_what_is_cut_off_is_left_out(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"or was left out; of what teachers wrote 72 generate\.truncated"):
        build(recipe(folder, keep="all", max_completion_length=2))


def test_trace_and_plan_say_it_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(folder)
    assert main(["plan", str(path)]) == 0
    assert "stage generate: 4 units" in capsys.readouterr().out
    out = build(path)
    assert main(["trace", str(out), "--seq-len", "8", "--sample", "0"]) == 0
    said = capsys.readouterr().out
    assert "teacher: teacher, sha256 " in said
    assert "of sums.jsonl, completion " in said
    assert "verified: correct, reward 1.1, pass rate 0." in said
    assert main(["inspect", str(out), "--doc", "0"]) == 0
    assert "teacher: teacher, sha256 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "nowhere"}, "has no config.json; give the folder of a Hugging Face model"),
        ({"teacher": "owner/name"}, "not in the local cache"),
        ({"prompts": "none.jsonl"}, "none.jsonl is not there"),
        ({"prompts": "blank.jsonl"}, "blank.jsonl holds no prompt"),
        ({"prompts": "broken.jsonl"}, "broken.jsonl:2: not JSON"),
        ({"answer": "anwser"}, "no column 'anwser' (did you mean 'answer'?)"),
        ({"prompt": "empty"}, "a prompt must be text"),
        ({"prompt": "half"}, "half a surrogate pair"),
        ({"max_completion_length": 62}, "exceed the 64 tokens that the teacher reads"),
        ({"template": "{question} und"}, "no token for ['d', 'n', 'u']"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "blank.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"prompt": "1", "answer": "1"}\n{broken\n')
    (folder / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2", "empty": " ", "half": "\\ud800"}\n')
    with pytest.raises(UsageError) as error:
        build(recipe(folder, **change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "generate", "message"),
    [
        ({"root": "."}, {}, "source sums: root says which files are read"),
        ({"field": "body"}, {}, "source sums: field says which files are read"),
        ({"kind": "parquet"}, {}, "kind must be one of jsonl, traces"),
        ({}, {"answer": None}, "generate.keep needs generate.answer"),
        ({}, {"answer": None, "keep": "all", "max_pass_rate": 0.5}, "generate.max_pass_rate needs"),
        ({}, {"min_pass_rate": 0.9, "max_pass_rate": 0.5}, "is above max_pass_rate"),
        ({}, {"template": "?"}, "{question} exactly once"),
        ({}, {"document": "{prompt}"}, "must hold {completion}"),
        ({}, {"temperature": 0}, "at temperature 0 all samples are the same"),
        ({}, {"num_samples": 0}, "generate.num_samples must be at least 1"),
        ({}, {"keep": "corect"}, "did you mean 'correct'?"),
        ({}, {"topp": 0.9}, "did you mean 'top_p'?"),
    ],
)
def test_a_block_that_makes_no_sense_is_refused(
    source: dict[str, Any], generate: dict[str, Any], message: str
) -> None:
    content = {"name": "sums", **source, "generate": GENERATE | generate}
    with pytest.raises(UsageError) as error:
        parse_recipe({"name": "x", "tokenizer": {"kind": "bytes"}, "sources": [content]}, Path())
    assert message in str(error.value)


def test_ids_cannot_be_written_by_a_teacher() -> None:
    ids = {"kind": "ids", "vocab_size": 5, "eos_id": 0}
    with pytest.raises(UsageError, match="source sums: a teacher writes text"):
        parse_recipe(
            {"name": "x", "tokenizer": ids, "sources": [{"name": "sums", "generate": GENERATE}]}, Path()
        )


def test_prompts_in_parquet_or_packed_are_the_same_prompts(folder: Path) -> None:
    import gzip

    import pyarrow as pa

    (folder / "sums.jsonl.gz").write_bytes(gzip.compress((folder / "sums.jsonl").read_bytes()))
    columns = {"prompt": [p for p, _ in SUMS], "answer": [a for _, a in SUMS]}
    pyarrow.parquet.write_table(pa.table(columns), folder / "sums.parquet")
    found = [
        list_spans(load_recipe(recipe(folder, prompts=f"sums.{kind}", num_prompts=5)))
        for kind in ("jsonl", "jsonl.gz", "parquet")
    ]
    assert found[0] == found[1] == found[2]
    assert [(span.start, span.stop) for span in found[0]] == [(0, 3), (3, 5)]


def test_without_somebody_to_teach_it_is_said_how(folder: Path) -> None:
    with pytest.raises(UsageError, match="source sums is generated: build it by"):
        build_dataset(recipe(folder), folder / "out")
