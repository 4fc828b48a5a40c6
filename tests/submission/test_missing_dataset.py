"""GPUs do not wait while a large dataset is built: the run is refused, and told how to build it first."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.train.checks.data import refuse_long_build
from tests.corpus.corpus import write_recipe, write_texts


def test_a_large_dataset_is_built_first(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    config = load.load("train", [f"data.recipe={recipe}"])
    run = RunDir(tmp_path / "runs" / "a")
    refuse_long_build(run, config)  # small: the job may build it
    with (tmp_path / "docs" / "large.txt").open("w") as file:
        file.truncate(65 << 20)
    with pytest.raises(
        UsageError, match=r"65(\.0)? MiB[\s\S]*shard build .*recipe.yaml --out .*--engine slurm"
    ):
        refuse_long_build(run, config)
    (tmp_path / "runs" / "datasets" / "recipe").mkdir(parents=True)
    refuse_long_build(run, config)
