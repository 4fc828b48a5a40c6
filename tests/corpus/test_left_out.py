"""What teachers wrote and stage generate left out, counted for the source that has it now."""

from pathlib import Path

from r1hpc.corpus.build.generated import left_out
from r1hpc.corpus.engine.work_dir import publish_unit


def test_a_unit_made_for_an_earlier_form_of_the_recipe_counts_for_todays_source(tmp_path: Path) -> None:
    def write(folder: Path) -> dict[str, object]:
        return {"dropped": {"generate.cut_off": 3}}

    unit = publish_unit(tmp_path, "generate", "k" * 32, write)
    assert left_out({(0, "prompts.jsonl:0"): unit, (0, "prompts.jsonl:8"): unit}) == {
        0: {"generate.cut_off": 6}
    }
