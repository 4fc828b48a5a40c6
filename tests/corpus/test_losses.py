"""A source that loses all of its records, or more than its max_dropped, is refused with the reasons."""

from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset, build_share
from r1hpc.corpus.build.stages import Share
from r1hpc.corpus.clean import clean
from r1hpc.corpus.inspect.describe import audit
from r1hpc.corpus.recipe import load_recipe
from r1hpc.data.format.errors import DataError
from r1hpc.shard import main
from tests.corpus.builds import done_units
from tests.corpus.corpus import write_recipe
from tests.corpus.test_prepare import prose, source, write_lines

STAGES: list[dict[str, Any]] = [{}, {"clean": {"repair": False}}, {"dedup": {"exact": True}}]
GOPHER = {"repair": False, "rules": ["gopher_quality"]}


def build(folder: Path, *sources: dict[str, Any], **changes: Any) -> Path:
    recipe = write_recipe(folder, sources=list(sources), **changes)
    return build_dataset(recipe, folder / "data" / "out").path


def stages_made(folder: Path) -> set[str]:
    return {path.parent.parent.name for path in folder.glob("data/.staging-*/units/*/*/done.json")}


@pytest.mark.parametrize("stages", STAGES)
def test_a_source_may_not_lose_more_than_its_share(tmp_path: Path, stages: dict[str, Any]) -> None:
    write_lines(tmp_path / "a.jsonl", [f"text {n}" for n in range(71)] + [""] * 29)
    write_lines(tmp_path / "b.jsonl", ["other"])
    b = source("b")
    with pytest.raises(DataError) as refused:
        build(tmp_path, source("a") | {"max_dropped": 0.28}, b | {"max_dropped": 0}, **stages)
    mend = "correct its records" + bool(stages) * ", loosen the stages for it (sources[].clean)"
    assert str(refused.value) == (
        "source a: 29 of 100 records are dropped (29 empty), a share of 0.29 and more than its max_dropped "
        f"0.28 allows; {mend}, or raise sources[].max_dropped"
    )
    assert refused.value.exit_status == 1
    assert not (tmp_path / "data" / "out").exists()
    units = done_units(tmp_path / "data")
    with pytest.raises(DataError, match="max_dropped 0"):
        build(tmp_path, source("a") | {"max_dropped": 0}, b, **stages)
    assert done_units(tmp_path / "data") == units, "a unit was made again"
    build(tmp_path, source("a") | {"max_dropped": 0.29}, b, **stages)  # .29 * 100 is less than 29
    with pytest.raises(DataError, match=r"^source a: 29 of 100 .* max_dropped 0\.1 "):
        build(tmp_path, source("a") | {"max_dropped": 0.1}, b, **stages)


def test_every_source_that_loses_too_much_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["", "x"])
    write_lines(tmp_path / "b.jsonl", ["", "", "y"])
    sources = [source(name) | {"max_dropped": 0.4} for name in "ab"]
    with pytest.raises(DataError, match=r"(?s)source a: 1 of 2 .*\nsource b: 2 of 3 .*share of 0\.666667"):
        main(["build", str(write_recipe(tmp_path, sources=sources)), "--out", str(tmp_path / "out")])


def test_max_dropped_is_in_no_hash_and_is_a_share(tmp_path: Path) -> None:
    hashes = {
        load_recipe(write_recipe(tmp_path, sources=[source("a") | change])).hash
        for change in ({}, {"max_dropped": 0.5}, {"max_dropped": 1}, {"clean": None})
    }
    assert len(hashes) == 1
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="source a: max_dropped must be 0 to 1"):
            load_recipe(write_recipe(tmp_path, sources=[source("a") | {"max_dropped": share}]))


def test_a_source_emptied_by_clean_is_refused_before_the_next_stage(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1), prose(2)])
    write_lines(tmp_path / "b.jsonl", ["Too short.", "x = 1", ""])
    message = r"source b: 3 of 3 records are dropped \(2 gopher_quality.words, 1 empty\), and none is left"
    with pytest.raises(DataError, match=message):
        build(tmp_path, source("a"), source("b"), clean=GOPHER, dedup={"exact": True})
    assert stages_made(tmp_path) == {"clean"}


def test_a_source_emptied_by_dedup_is_refused_before_the_next_stage(tmp_path: Path) -> None:
    for name, texts in (("a", [prose(1), prose(2), prose(3)]), ("b", [prose(1), "", prose(2)])):
        write_lines(tmp_path / f"{name}.jsonl", texts)
    message = r"source b: 3 of 3 records are dropped \(2 exact_duplicate, 1 empty\), and none is left"
    with pytest.raises(DataError, match=message):
        build(tmp_path, source("a"), source("b"), dedup={"exact": True})
    assert stages_made(tmp_path) == {"clean", "dedup"}


def test_a_job_of_the_next_stage_refuses_what_the_jobs_before_it_dropped(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1)])
    write_lines(tmp_path / "b.jsonl", ["x = 1"])
    recipe, out = write_recipe(tmp_path, sources=[source("a"), source("b")], clean=GOPHER), tmp_path / "out"
    build_share(recipe, out, Share("clean", 0, 1))
    with pytest.raises(DataError, match=r"source b: 1 of 1 records are dropped \(1 gopher_quality.words\)"):
        build_share(recipe, out, Share("tokenizer", 0, 1), after_others=True)


def test_a_source_emptied_in_a_plain_build_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1)])
    write_lines(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"source b: 2 of 2 records are dropped \(2 empty\), and none"):
        build(tmp_path, source("a"), source("b"))
    assert not (tmp_path / "data" / "out").exists()


@pytest.mark.parametrize("stages", STAGES)
def test_a_source_without_records_needs_no_reason(tmp_path: Path, stages: dict[str, Any]) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1)])
    write_lines(tmp_path / "b.jsonl", [])
    sources = (source("a"), source("b") | {"max_dropped": 0})
    with pytest.raises(UsageError, match="mix: source b has no document"):
        build(tmp_path, *sources, mix={"weights": {"a": 0.5, "b": 0.5}}, **stages)
    documents = audit(build(tmp_path, *sources, **stages))["sources"][1]["documents"]
    assert documents == {"in": 0, "kept": 0, "dropped": {}}


@pytest.mark.parametrize("stages", [*STAGES[1:], {"max_unreadable": 0.1}])
def test_a_document_above_the_limit_is_counted_by_its_own_name(
    tmp_path: Path,
    stages: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clean, "MAX_TEXT_CHARS", 1000)
    write_lines(tmp_path / "a.jsonl", ["short"])
    write_lines(tmp_path / "b.jsonl", ["short too", "x" * 4001])
    recipe = write_recipe(tmp_path, sources=[source("a"), source("b")], **stages)
    assert main(["build", str(recipe), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "source     a: 1 in, 1 kept, 0 dropped\n" in shown
    assert "source     b: 2 in, 1 kept, 1 dropped (1 over_64_mib)\n" in shown


def test_the_limit_is_the_64_mib_of_its_name() -> None:
    assert 4 * clean.MAX_TEXT_CHARS == 64 * 2**20


def test_a_source_has_rules_of_its_own(tmp_path: Path) -> None:
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [prose(1), "x = 1 # mail me@example.org"])
    sources = [source("a"), source("b") | {"clean": {"rules": []}}, source("c") | {"clean": {"pii": "drop"}}]
    counts = audit(build(tmp_path, *sources, clean=GOPHER | {"pii": "mask"}))["sources"]
    dropped = [count["documents"]["dropped"] for count in counts]
    assert dropped == [{"gopher_quality.words": 1}, {}, {"gopher_quality.words": 1}]
    assert [count["edits"]["masked"] for count in counts] == [0, 1, 0]


def test_one_source_alone_is_cleaned(tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", ["call me@example.org", "fine"])
    counts = audit(build(tmp_path, source("a") | {"clean": {"pii": "drop"}}, source("b")))["sources"]
    assert [count["documents"]["dropped"] for count in counts] == [{"pii": 1}, {}]


def test_a_change_of_one_source_cleans_no_other_again(tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [prose(1), "", prose(2)])
    strict = source("b") | {"max_dropped": 0}
    units = []
    for rules in ([], ["c4"]):
        with pytest.raises(DataError, match="source b"):
            build(tmp_path, source("a"), strict | {"clean": {"rules": rules}}, clean={"repair": False})
        units.append(done_units(tmp_path / "data"))
    assert len(units[0]) == 2
    assert len(units[1]) == 3
    assert units[0].items() <= units[1].items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": {"rule": ["c4"]}}, r"unknown key 'sources\[0\].clean.rule' \(did you mean 'rules'"),
        ({"clean": {"rules": ["gofer"]}}, r"clean.rules must be one of.*did you mean 'gopher'"),
        ({"clean": ["c4"]}, r"sources\[0\].clean must be a block"),
        ({"clean": {"lang": ["xx"]}}, "'xx' is not one of the"),
        ({"clean": {"pii": "mask"}, "kind": "traces"}, "clean works on texts, not on traces"),
        ({"max_dropped": "1%"}, r"sources\[0\].max_dropped must be float"),
    ],
)
def test_a_bad_key_of_a_source_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1)])
    with pytest.raises(UsageError, match=message):
        build(tmp_path, source("a") | change)
