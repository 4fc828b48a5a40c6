"""Where a value came from, and the reference of every setting."""

from pathlib import Path

import pytest

from r1hpc.config.load import known_keys
from r1hpc.config.origins import DEFAULT, Setting, resolved
from r1hpc.config.reference import reference

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file that includes a preset of its own."""
    (tmp_path / "preset.yaml").write_text("train: {lr: 0.1, num_steps: 7}\ndeepspeed: {extra: {a: 1}}\n")
    path = tmp_path / "job.yaml"
    path.write_text("include: [preset]\ntrain: {num_steps: 9}\nresources: {sbatch: {}}\n")
    return path


def of(settings: list[Setting]) -> dict[str, tuple[object, str]]:
    return {each.key: (each.value, each.source) for each in settings}


def test_the_last_to_set_a_value_is_its_source(job: Path) -> None:
    found = of(resolved(job, ["train.beta1=0.5"]))
    assert found["train.lr"] == (0.1, str(job.parent / "preset.yaml"))
    assert found["train.num_steps"] == (9, str(job))
    assert found["train.beta1"] == (0.5, "train.beta1=0.5")
    assert found["train.beta2"] == (0.95, DEFAULT)


def test_a_mapping_names_all_that_wrote_into_it(job: Path) -> None:
    found = of(resolved(job, ["deepspeed.extra.b=2"]))
    assert found["deepspeed.extra"] == (
        {"a": 1, "b": 2},
        f"{job.parent / 'preset.yaml'} + deepspeed.extra.b=2",
    )


def test_what_was_replaced_is_no_source(job: Path) -> None:
    found = of(resolved(job, ["deepspeed.extra={b: 2}"]))
    assert found["deepspeed.extra"] == ({"b": 2}, "deepspeed.extra={b: 2}")
    assert of(resolved("smoke", ["model.path=mine"]))["model.config"] == ({}, DEFAULT)


def test_the_cluster_profile_wins_over_the_job(job: Path, tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("partition: gpu\n")
    assert of(resolved(job, cluster=str(profile)))["cluster.partition"] == ("gpu", str(profile))


def test_every_key_is_answered_once(job: Path) -> None:
    assert [each.key for each in resolved(job)] == known_keys()


def test_the_reference_has_every_key_with_a_meaning_and_is_the_page_in_docs() -> None:
    page = reference()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(row[1].strip(" `") for row in rows) == sorted(known_keys())
    assert all(row[-2].strip() for row in rows), "a setting without a meaning: write it below the field"
    assert page == (DOCS / "settings.md").read_text(), "run: r1hpc settings --reference > docs/settings.md"
