"""A prepared dataset answers for every record of its inputs, and a killed build goes on with what is done."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.build.vocabulary import Encoder
from r1hpc.corpus.engine.work_dir import read_progress
from r1hpc.corpus.inspect.describe import SampleOrder, audit, sample_of, trace_sample
from r1hpc.data.read.order import RankShare
from r1hpc.data.read.reader import open_dataset
from r1hpc.shard import main
from tests.corpus.builds import done_units, names, start_build
from tests.corpus.corpus import tree, write_recipe

_WORDS = (
    "the be to of and that have with rain river mountain people town water light history number system under "
    "over small large green blue winter garden harbour letter window market bridge forest evening morning"
)


def prose(seed: int, num_sentences: int = 12) -> str:
    """Sentences that no rule minds, unlike those of any other seed."""
    draw, words = random.Random(seed), _WORDS.split()
    sentences = [" ".join(draw.choice(words) for _ in range(11)).capitalize() for _ in range(num_sentences)]
    return ". ".join(sentences) + "."


def write_lines(path: Path, texts: list[str], *extra: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "".join(extra))


def source(name: str) -> dict[str, Any]:
    return {"name": name, "kind": "jsonl", "root": ".", "glob": f"{name}.jsonl", "license": "CC0-1.0"}


STAGES: dict[str, Any] = {
    "clean": {"lang": ["en"], "min_lang_score": 0.3, "rules": ["gopher", "fineweb"], "pii": "mask"},
    "dedup": {"exact": True, "minhash": {}},
    "decontaminate": {"against": ["test.jsonl"]},
    "max_unreadable": 0.05,
    "mix": {"weights": {"a": 0.3, "b": 0.7}},
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 400},
    "part_bytes": 8000,
}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A recipe over two sources with one of everything that is to be found. Returns the recipe file."""
    texts = [prose(n) for n in range(40)]
    planted = [
        texts[0],
        texts[1] + " And that is the end of it.",
        "Too short.",
        "",
        "Das ist ein deutscher Text, der von der Sprache her nicht in diesen Datensatz gehört. " * 8,
        f"Write to jane.doe@example.org. {prose(77)}",
        prose(78)[:300] + " " + prose(500),
        "mojibake: schÃ¶n. " + prose(79),
    ]
    write_lines(tmp_path / "a.jsonl", texts + planted, "{broken\n", '{"text": null}\n')
    write_lines(tmp_path / "b.jsonl", [prose(n) for n in range(100, 140)] + [texts[3]])
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": prose(500)[50:250], "answer": "7"}) + "\n")
    return write_recipe(tmp_path, sources=[source("a"), source("b")], **STAGES)


def decisions_of(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.glob("parts/*/decisions.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_every_record_is_kept_or_dropped_by_a_rule(planted: Path) -> None:
    report = build_dataset(planted, planted.parent / "out")
    found = audit(report.path)
    assert found["documents"]["dropped"] == {
        "contaminated": 1,
        "empty": 2,
        "exact_duplicate": 2,
        "gopher_quality.words": 1,
        "language": 1,
        "near_duplicate": 1,
        "unreadable": 1,
    }
    assert found["documents"]["in"] == 40 + 8 + 2 + 41
    assert found["documents"]["kept"] == report.num_documents == 82
    assert found["edits"] == {"lines_removed": 0, "masked": 1, "repaired": 1}
    by_source = [item["documents"] for item in found["sources"]]
    assert [(item["in"], item["kept"]) for item in by_source] == [(50, 42), (41, 40)]
    assert sum(found["tokens"].values()) == report.num_tokens
    assert found["mix"] == pytest.approx({"a": 0.3, "b": 0.7})


def test_each_decision_names_rule_value_and_place(planted: Path) -> None:
    rows = decisions_of(build_dataset(planted, planted.parent / "out").path)
    by_rule = {row["rule"]: row for row in rows if row["rule"]}
    assert (by_rule["gopher_quality.words"]["value"], by_rule["language"]["note"]) == (2, "de")
    assert by_rule["near_duplicate"]["value"] > 0.8
    lines = (planted.parent / "a.jsonl").read_bytes()
    original = json.loads(by_rule["near_duplicate"]["note"].removeprefix("of "))
    assert original[:2] == ["a", "a.jsonl"]
    assert json.loads(lines[original[2] :].split(b"\n")[0])["text"] == prose(1)
    assert by_rule["contaminated"]["note"] == "test.jsonl"
    broken = by_rule["unreadable"]
    assert lines[broken["position"] : broken["position"] + broken["size"]] == b"{broken\n"
    assert "not JSON" in broken["note"]


def test_texts_are_repaired_and_masked(planted: Path) -> None:
    dataset = open_dataset(build_dataset(planted, planted.parent / "out").path)
    assert dataset.tokenizer_path is not None
    encoder = Encoder(dataset.tokenizer_path / "tokenizer.json", dataset.eos_id)
    text = encoder.decode(dataset.read(0, dataset.num_tokens))
    assert "<EMAIL>" in text
    assert "jane.doe" not in text
    assert "schön" in text


def test_workers_and_repetition_change_no_byte(planted: Path) -> None:
    folder = planted.parent
    one = build_dataset(planted, folder / "one")
    three = build_dataset(planted, folder / "three", workers=3)
    assert len(open_dataset(one.path).manifest.parts) == 2
    assert tree(one.path) == tree(three.path)
    assert not list(folder.glob(".staging*"))


@pytest.mark.parametrize(
    "point", ["data.build.span:kill9::2", "data.build.texts:kill9::2", "data.unit.publish:kill9::4"]
)
def test_killed_preparation_goes_on(planted: Path, point: str) -> None:
    folder = planted.parent
    reference = build_dataset(planted, folder / "reference")
    out = folder / "data" / "out"
    assert start_build(planted, out, failpoint=point).wait(120) == -signal.SIGKILL
    before = done_units(out.parent)
    assert before
    assert read_progress(out)["state"] == "stopped"
    assert start_build(planted, out, failpoint="data.build.publish:kill9").wait(120) == -signal.SIGKILL
    assert before.items() <= done_units(out.parent).items()
    assert build_dataset(planted, out).id == reference.id
    assert names(out.parent) == {"out"}


def test_change_of_the_mixture_redoes_nothing(planted: Path) -> None:
    out = planted.parent / "data" / "out"
    assert start_build(planted, out, failpoint="data.build.publish:kill9").wait(120) == -signal.SIGKILL
    before = done_units(out.parent)
    other = STAGES | {"mix": {"weights": {"a": 0.5, "b": 0.5}}}
    recipe = write_recipe(planted.parent, sources=[source("a"), source("b")], **other)
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(120) == -signal.SIGKILL
    assert done_units(out.parent) == before


def test_a_held_out_file_that_has_grown_is_noticed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [prose(1), prose(2)])
    write_lines(tmp_path / "held.jsonl", [prose(3)])
    source = {"name": "a", "kind": "jsonl", "root": ".", "glob": "in.jsonl"}
    changes: dict[str, Any] = {"sources": [source], "decontaminate": {"against": ["held.jsonl"]}}
    recipe, out = write_recipe(tmp_path, **changes), tmp_path / "out"
    assert build_dataset(recipe, out).num_documents == 2
    assert not build_dataset(recipe, out).note
    write_lines(tmp_path / "held.jsonl", [prose(3), prose(2)])
    assert "inputs have changed" in build_dataset(recipe, out).note


def test_too_many_unreadable_records_stop_the_build(planted: Path) -> None:
    recipe = write_recipe(
        planted.parent, sources=[source("a"), source("b")], **(STAGES | {"max_unreadable": 0.001})
    )
    with pytest.raises(UsageError, match=r"1 of 91 records cannot be read.*a\.jsonl at \d+: not JSON"):
        build_dataset(recipe, planted.parent / "out")
    recipe = write_recipe(
        planted.parent, sources=[source("a"), source("b")], **(STAGES | {"max_unreadable": 0})
    )
    with pytest.raises(UsageError, match=r"a\.jsonl at \d+: not JSON.*set max_unreadable"):
        build_dataset(recipe, planted.parent / "out")


def test_trace_names_source_document_and_decisions(planted: Path) -> None:
    path = build_dataset(planted, planted.parent / "out").path
    dataset = open_dataset(path)
    order = SampleOrder(seq_len=32, seed=4, global_batch_size=12)
    share = RankShare(12, 2, rank=1, world_size=2)
    sample = sample_of(step=3, row=5, share=share)
    assert sample == int(share.sample_ids(2).ravel()[5])
    found, documents = trace_sample(path, sample, order)
    document = documents[0]
    raw = (planted.parent / document["path"]).read_bytes()
    decided = document["decisions"]
    line = raw[decided["position"] : decided["position"] + decided["size"]]
    assert dataset.tokenizer_path is not None
    encoder = Encoder(dataset.tokenizer_path / "tokenizer.json", dataset.eos_id)
    window = encoder.decode(dataset.read(found["token_start"], document["token_stop"] - found["token_start"]))
    assert window[:60].strip("\ufffd") in json.loads(line)["text"]
    assert (decided["language"], decided["rule"]) == ("en", "")


def test_stages_on_what_has_no_text_are_refused(tmp_path: Path) -> None:
    ids = {"tokenizer": {"kind": "ids", "vocab_size": 9, "eos_id": 0}}
    with pytest.raises(UsageError, match="dedup works on texts, not on token ids"):
        build_dataset(write_recipe(tmp_path, dedup={}, **ids), tmp_path / "out")
    write_lines(tmp_path / "a.jsonl", [])
    (tmp_path / "a.jsonl").write_text('{"text": [1, 2, 3]}\n')
    recipe = write_recipe(tmp_path, sources=[source("a")], dedup={})
    with pytest.raises(UsageError, match=r"a\.jsonl at 0: token ids, which cannot be cleaned"):
        build_dataset(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": {"rules": ["gofer"]}}, r"clean.rules must be one of.*did you mean 'gopher'"),
        ({"clean": {"pii": True}}, "clean.pii must be str"),
        ({"clean": {"lang": ["EN"]}}, "'EN' is not a language code"),
        ({"clean": []}, "clean must be a block"),
        ({"clean": {"language": ["en"]}}, "unknown key 'clean.language'"),
        ({"dedup": {"minhash": {"band": 3}}}, r"unknown key 'dedup.minhash.band' \(did you mean 'bands'"),
        ({"dedup": {"exact": 1}}, "dedup.exact must be bool"),
        ({"decontaminate": {}}, "decontaminate.against is missing"),
        ({"decontaminate": {"against": ["nowhere.jsonl"]}}, "nowhere.jsonl is not there"),
        ({"decontaminate": {"against": ["a.jsonl"], "ngram": 3}}, "1 <= min_words <= ngram"),
        ({"max_unreadable": 1}, "max_unreadable is a share"),
    ],
)
def test_bad_stage_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1)])
    with pytest.raises(UsageError, match=message):
        build_dataset(write_recipe(tmp_path, sources=[source("a")], **change), tmp_path / "out")


def test_commands(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(planted.parent / "out")
    assert main(["plan", str(planted), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"] == {"evaluation": 1, "clean": 2, "dedup": 1, "tokenizer": 1, "tokens": 2}
    assert main(["status", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "none"
    assert main(["build", str(planted), "--out", out, "--engine", "local", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["built"]
    assert (built["documents"]["in"], built["documents"]["kept"]) == (91, 82)
    assert built["sources"][1]["documents"] == {"in": 41, "kept": 40, "dropped": {"exact_duplicate": 1}}
    assert main(["build", str(planted), "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "records    91 in, 82 kept, 9 dropped (2 empty, 2 exact_duplicate, 1 contaminated, " in shown
    assert "source     b: 41 in, 40 kept, 1 dropped (1 exact_duplicate)\n" in shown
    assert main(["status", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"
    assert main(["audit", out]) == 0
    shown = capsys.readouterr().out
    assert "a: 42 of 50 records kept" in shown
    assert "near_duplicate" in shown
    assert "70.0% of the mixture" in shown
    step = ["--step", "2", "--rank", "1", "--row", "0", "--world-size", "2", "--global-batch-size", "8"]
    assert main(["trace", out, "--seq-len", "32", *step]) == 0
    assert "decided: kept, language en" in capsys.readouterr().out


def test_a_plain_build_ends_with_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1), "", prose(2)])
    recipe = write_recipe(tmp_path, sources=[source("a")])
    assert main(["build", str(recipe), "--out", str(tmp_path / "out")]) == 0
    assert "source     a: 3 in, 2 kept, 1 dropped (1 empty)\n" in capsys.readouterr().out


def test_status_of_a_build_under_way(planted: Path) -> None:
    out = planted.parent / "out"
    process = start_build(planted, out, failpoint="data.build.texts:sleep=30")
    try:
        found: dict[str, Any] = {}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = read_progress(out)
            if found["state"] == "building" and found["stages"][-2]["done"] == 1:
                break
            time.sleep(0.1)
        stages = {stage["stage"]: (stage["done"], stage["units"]) for stage in found["stages"]}
        assert stages == {
            "evaluation": (1, 1),
            "clean": (2, 2),
            "dedup": (1, 1),
            "tokenizer": (1, 1),
            "tokens": (0, 2),
        }
    finally:
        process.kill()
        process.wait(30)
        assert isinstance(process, subprocess.Popen)


def write_large(folder: Path) -> Path:
    """A recipe of some twenty parts, each of a fraction of a second's work."""
    for name, first in (("a", 0), ("b", 10_000)):
        (folder / name).mkdir(parents=True)
        for part in range(10):
            texts = [prose(first + 100 * part + n) for n in range(60)]
            write_lines(folder / name / f"{part}.jsonl", [*texts, texts[0]])
    (folder / "test.jsonl").write_text(json.dumps({"question": prose(500)[50:250]}) + "\n")
    sources = [source(name) | {"root": name, "glob": "*.jsonl"} for name in ("a", "b")]
    return write_recipe(folder, sources=sources, **STAGES)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 3])
def test_kills_at_any_moment(tmp_path: Path, workers: int) -> None:
    """Each kill costs at most one part a worker; the end is the same id, and nothing is left behind."""
    recipe = write_large(tmp_path / "in")
    reference = build_dataset(recipe, tmp_path / "reference")
    out, finished = tmp_path / "data" / "out", 0
    draw = random.Random(workers)
    while finished < 25:
        begun: dict[str, int] = {}
        while not out.exists():
            process = start_build(recipe, out, "--workers", str(workers))
            time.sleep(draw.uniform(0.5, 4.0))
            process.kill()
            process.wait(30)
            finished += 1
            assert begun.items() <= done_units(out.parent).items() or out.exists(), "a part was made again"
            begun = done_units(out.parent)
            owner = out.parent / ".staging-out/owner.json"
            if owner.exists():  # as if the next attempt ran elsewhere
                owner.write_text(json.dumps({"host": f"node{finished}", "pid": 1}))
        build_dataset(recipe, out)
        assert open_dataset(out).id == reference.id
        assert names(out.parent) == {"out"}
        out.rename(tmp_path / f"done-{finished}")
