"""What a build on Slurm asks for: GPUs for teachers alone, and refusals before anything is submitted."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.load import merge_layers
from r1hpc.corpus.build.slurm_jobs import DatasetOrder, _scripts
from r1hpc.shard import main
from tests.corpus.corpus import write_recipe, write_texts


def test_only_the_jobs_of_a_teacher_take_gpus(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2="}\n' * 5)
    generate = {"teacher": "teacher", "prompts": "prompts.jsonl", "prompts_per_unit": 2}
    recipe = write_recipe(tmp_path, sources=[{"name": "taught", "generate": generate}])
    asked = ("resources.gpus_per_node=2", 'resources.gpu_type="a100"', "resources.cpus_per_task=8")
    order = DatasetOrder(recipe, tmp_path / "out", shares=8, overrides=asked)
    scripts = {
        name: (options, text)
        for name, options, text in _scripts(order, merge_layers([], asked, None), tmp_path)
    }
    assert list(scripts) == ["teacher", "generate", "tokenizer", "tokens", "publish"]
    assert scripts["generate"][0]["array"] == "0-2"
    for name, (_, text) in scripts.items():
        assert " --after-others --recipe-hash " in text
        is_taught = name == "generate"
        assert ("#SBATCH --gpus-per-node=a100:2" in text) == is_taught
        assert ('--workers "${SLURM_GPUS_ON_NODE:-1}"' in text) == is_taught


def test_gpus_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    words = ["build", str(write_recipe(tmp_path)), "--out", str(tmp_path / "out"), "--engine", "slurm"]
    with pytest.raises(UsageError, match="no source of this recipe has generate"):
        main([*words, "--gpus-per-node", "2"])
