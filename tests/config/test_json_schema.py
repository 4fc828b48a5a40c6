"""The JSON Schema of job files: up to date, named by every job file, and true of each."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1hpc import settings
from r1hpc.config.yaml_files import read_yaml

_JOBS = Path(__file__).parents[2] / "jobs"
_SCHEMA = json.loads((_JOBS / "schema.json").read_text())


def wrong(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Return the places where a job file is not as its schema says: keys and choices."""
    schema = _SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        unknown = [f"{place}{key}: unknown" for key in value if key not in known]
        inner = [wrong(each, known[key], f"{place}{key}.") for key, each in value.items() if key in known]
        return [*unknown, *(line for lines in inner for line in lines)]
    if isinstance(value, list):
        return [line for each in value for line in wrong(each, schema["items"], place)]
    return [f"{place}: {value}"] if "enum" in schema and value not in schema["enum"] else []


def test_the_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.main(["--schema"]) == 0
    printed = capsys.readouterr().out
    assert printed == (_JOBS / "schema.json").read_text(), "run: r1hpc settings --schema > jobs/schema.json"


@pytest.mark.parametrize("job", sorted(_JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_file_names_it_and_holds_to_it(job: Path) -> None:
    assert job.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert wrong(read_yaml(job), _SCHEMA) == []


def test_it_knows_types_ranges_and_meanings() -> None:
    train = _SCHEMA["definitions"]["train"]
    assert wrong({"train": {"lrr": 1, "precision": "fp7"}}, _SCHEMA) == [
        "train.lrr: unknown", "train.precision.: fp7",
    ]  # fmt: skip
    lr = train["properties"]["lr"]
    assert (lr["type"], lr["exclusiveMinimum"], lr["default"]) == ("number", 0, 3e-4)
    assert lr["description"].startswith("Peak learning rate")
    assert train["properties"]["gradient_accumulation_steps"]["type"] == ["integer", "null"]
    assert "needs" in _SCHEMA["properties"]["stages"]["items"]["properties"]
