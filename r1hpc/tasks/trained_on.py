"""What a model was trained on, as files that an evaluation searches for its questions: evaluate.trained_on.

check_trained_on(config, to_come)           # before hours are spent, and before they wait in a queue
tables, files = training_files(path)        # Parquet and Arrow; files of lines
"""

from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.files import files_of_lines, matching
from r1hpc.config.schema import RunConfig
from r1hpc.tasks.question_file import table_batches, tables_in


def check_trained_on(config: RunConfig, to_come: Sequence[Path] = ()) -> None:
    """Refuse what cannot be searched.

    Args:
        to_come: folders that other runs have yet to fill: what lies below them is not looked for.

    Raises:
        UsageError: no test file whose questions are looked for, or names the file or folder that is not there
            or cannot be read.
    """
    evaluate = config.evaluate
    given = [name for name in ("trained_on", "not_searched") if getattr(evaluate, name)]
    has_tests = evaluate.path is not None or bool(evaluate.sets)
    if given and (config.stage == "rl" or (config.stage == "evaluate" and not has_tests)):
        why = "reports nothing of it" if config.stage == "rl" else "asks no test file here"
        raise UsageError(
            f"evaluate.{given[0]} is for stage evaluate with evaluate.path or evaluate.sets, whose questions "
            f"are looked for in it, and stage {config.stage} {why}: take it out; in a chain file give it to "
            f"the stages that it is for, on the command line as STAGE:evaluate.{given[0]}"
        )
    if config.stage != "evaluate":
        return
    for path in evaluate.trained_on:
        if not any(Path(path).is_relative_to(folder) for folder in to_come):
            tables, _ = training_files(path)
            for table in tables:
                next(table_batches(table), None)


def training_files(path: str) -> tuple[list[Path], list[Path]]:
    """(tables, files of lines) that a path of evaluate.trained_on stands for: a file, those of a folder, or
    those that fit a pattern in its last part.

    Raises:
        UsageError: it stands for none.
    """
    whole = Path(path)
    tables = tables_in(whole)
    found = files_of_lines(whole) if whole.is_dir() else matching(whole)
    lines = sorted(file for file in found if file.is_file() and file not in tables)
    if not (tables or lines):
        what = "holds no *.jsonl, *.parquet or *.arrow" if whole.is_dir() else "is not there"
        raise UsageError(f"evaluate.trained_on: {path} {what}; name files, or folders of them")
    return tables, lines
