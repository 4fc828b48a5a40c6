"""A chain file: what each stage is, what it needs, and the errors of a file that cannot be."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config import load
from r1hpc.config.assets import find_job
from r1hpc.config.schema.run import Precision
from r1hpc.config.yaml_files import write_yaml
from r1hpc.submission.chain.file import (
    Definition,
    by_its_first_path,
    digest_of,
    open_definition,
    override,
    read_definition,
    save_definition,
    split_overrides,
)
from r1hpc.submission.chain.folder import ChainDir
from tests.submission.chains import COMMON, write_chain


def read(root: Path, stages: str, *overrides: str) -> Definition:
    return read_definition(write_chain(root, stages), ChainDir(root / "runs" / "c"), overrides)


def test_a_stage_needs_the_one_before_it_or_those_it_names(tmp_path: Path) -> None:
    chain = read(
        tmp_path,
        """
  - name: a
  - name: b
  - name: c
    needs: []
  - name: d
    needs: [b]
    model: {path: "${stage:a}/model"}
  - name: e
    model: {path: "${stage:c}/model"}
""",
    )
    needs = {stage.name: stage.needs for stage in chain.stages}
    assert needs == {"a": (), "b": ("a",), "c": (), "d": ("b", "a"), "e": ("c",)}


def test_a_reference_is_the_folder_of_the_stage(tmp_path: Path) -> None:
    stages = """
  - name: a
  - name: b
    model: {path: "${stage:a}/model"}
    data: {traces: ["${stage:a}/traces.jsonl", "x"]}
"""
    config = read(tmp_path, stages, "b:task.options.path=${stage:a}/q.jsonl").stage("b").config
    folder = f"{tmp_path}/runs/c/a"
    assert config.model.path == f"{folder}/model"
    assert config.data.traces == [f"{folder}/traces.jsonl", str(Path("x").absolute())]
    assert config.task.options["path"] == f"{folder}/q.jsonl"


def test_later_layers_win_and_overrides_reach_all_stages_or_one(tmp_path: Path) -> None:
    stages = """
  - name: a
    include: [deepspeed/zero3]
  - name: b
    train: {lr: 5e-4}
"""
    chain = read(tmp_path, stages, "train.num_steps=9", "b:train.seed=3", "a:train.num_steps=11")
    a, b = chain.stage("a").config, chain.stage("b").config
    assert (a.deepspeed.zero_stage, b.deepspeed.zero_stage) == (3, 1)
    assert (a.train.lr, b.train.lr) == (3e-3, 5e-4)
    assert (a.train.num_steps, b.train.num_steps) == (11, 9)
    assert (a.train.seed, b.train.seed) == (0, 3)


@pytest.mark.parametrize("term", ["rewards.py:brevity", "my.rewards:brevity"])
def test_a_reward_of_ones_own_is_no_stage(term: str) -> None:
    item = f"reward.terms.{term}=0.5"
    assert split_overrides([item, f"b:{item}"], ["a", "b"]) == {"a": [item], "b": [item, item]}
    with pytest.raises(UsageError, match="there is no stage 'c'"):
        split_overrides([f"c:{item}"], ["a", "b"])


def test_what_is_frozen_comes_back_and_takes_overrides(tmp_path: Path) -> None:
    chain = ChainDir(tmp_path / "runs" / "c")
    stages = "  - name: a\n  - name: b\n    cluster: {setup: ['export X=${Y:-1}']}\n"
    definition = read(tmp_path, stages)
    chain.path.mkdir(parents=True)
    save_definition(definition, chain)
    assert open_definition(chain) == definition
    changed = override(definition, ["b:resources.nodes=4"], chain)
    assert [stage.config.resources.nodes for stage in changed.stages] == [1, 4]
    assert changed.stage("b").config.cluster.setup == ["export X=${Y:-1}"]


def test_an_override_for_all_may_not_cut_a_stage_off_from_another(tmp_path: Path) -> None:
    """Else RL would begin with the model as it was fetched, and nobody would be told."""
    stages = """
  - {name: a, model: {path: "/base"}}
  - {name: b, model: {path: "${stage:a}/model"}}
  - {name: c, model: {path: "${stage:b}/model"}, data: {traces: ["${stage:a}/t", "/own"]}}
"""
    with pytest.raises(UsageError) as caught:
        read(tmp_path, stages, "train.lr=2e-3", "model.path=/mine")
    assert str(caught.value) == (
        "model.path=/mine is for every stage, but model.path comes from another stage in b, c: "
        "say which stages it is for, as in a:model.path=/mine"
    )
    with pytest.raises(UsageError, match=r"but data.traces comes .* in c: .* as in c:data.traces=\[/x\]"):
        read(tmp_path, stages, "data.traces=[/x]")

    meant = read(tmp_path, stages, "a:model.path=/mine", "c:data.traces=[/x]")
    assert meant.stage("a").config.model.path == "/mine"
    assert meant.stage("b").config.model.path == str(tmp_path / "runs" / "c" / "a" / "model")
    folder = ChainDir(tmp_path / "runs" / "c")
    with pytest.raises(UsageError, match=r"but model.path comes .* in b, c: .* as in a:model.path=/other"):
        override(meant, ["model.path=/other"], folder)
    assert override(meant, ["b:model.path=/other"], folder).stage("b").config.model.path == "/other"
    # What says nothing of the path, or what is there already, cuts nothing.
    for item in ("model={attn_implementation: eager}", "data={seq_len: 64}"):
        assert read(tmp_path, stages, item).stage("b").config.model.path
        assert override(meant, [item], folder).stage("b").config.model.path
    with pytest.raises(UsageError, match=r"but model.path comes"):
        read(tmp_path, stages, "model={path: /mine}")
    inside = f"evaluate.trained_on=[{folder.path}/a/t]"
    again = override(override(meant, [inside], folder), [inside], folder)
    assert again.stage("c").config.evaluate.trained_on == [f"{folder.path}/a/t"]


def test_the_digest_sees_every_change_of_the_file(tmp_path: Path) -> None:
    path = write_chain(tmp_path, "  - name: a\n")
    before = digest_of(path)
    assert digest_of(path) == before == read(tmp_path, "  - name: a\n", "train.lr=1").digest
    write_chain(tmp_path, "  - name: a\n    train: {lr: 1}\n")
    assert digest_of(path) != before


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            "  - name: a\n    needs: [c]\n  - name: b\n    needs: [a]\n  - name: c\n",
            "a needs c, which does not come before it",
        ),
        ("  - name: a\n    needs: [a]\n", "a needs a, which does not come before it"),
        (
            "  - name: a\n    needs: [b]\n  - name: b\n    needs: []\n",
            "come before it: write b first",
        ),
        ("  - name: sft\n  - name: b\n    needs: [stf]\n", "no stage 'stf' (did you mean 'sft'?)"),
        ("  - name: a\n    model: {path: '${stage:q}/model'}\n", "no stage 'q'; there are: a"),
        ("  - name: a\n  - name: a\n", "two stages are called 'a'"),
        ("  - stage: sft\n", "a stage has no name"),
        ("  - name: datasets\n", "a stage cannot be called 'datasets'"),
        ("  - name: ../x\n", "not a usable name"),
        ("  - name: a\n    needs: b\n", "must be a list of stages"),
        ("  - name: a\n    trian: {}\n", "stage a: unknown key 'trian' (did you mean 'train'?)"),
        ("  - name: a\n    train: {lr: -1}\n", "stage a: train.lr is -1"),
        ("  a: 1\n", "`stages` must be a list of stages"),
        ("  []\n", "`stages` must be a list of stages"),
    ],
)
def test_a_file_that_cannot_be_gets_one_clear_error(tmp_path: Path, stages: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, stages)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("x:train.lr=1", "there is no stage 'x'"),
        ("b:model.path=${stage:q}/m", "there is no stage 'q'"),
        ("b:model.path=${stage:c}/m", "which b does not need"),
        ("train.lrr=1", "did you mean 'train.lr'"),
    ],
)
def test_an_override_that_cannot_be_gets_one_too(tmp_path: Path, item: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, "  - name: a\n  - name: b\n  - name: c\n", item)
    assert said in str(caught.value)


@pytest.mark.parametrize("job", ["r1", "r1_a100"])
def test_the_chains_that_come_with_it_can_be_read(tmp_path: Path, job: str) -> None:
    path = Path(__file__).parents[2] / "jobs" / f"{job}.yaml"
    chain = read_definition(path, ChainDir(tmp_path / job))
    assert chain.names[:6] == ("traces", "sft", "grpo", "reject", "sft2", "distil")
    kinds = [stage.config.stage for stage in chain.stages]
    assert kinds[:6] == ["traces", "sft", "rl", "generate", "sft", "sft"]
    assert set(kinds[6:]) == {"evaluate"}
    assert "sft" in chain.stage("grpo").needs


@pytest.mark.parametrize("job", ["smollm2", "countdown", "distill"])
def test_the_other_chains_ask_the_same_held_out_questions_in_every_stage(tmp_path: Path, job: str) -> None:
    """And train on different ones: their tasks have one seed, and RL begins after what was shown."""
    path = Path(__file__).parents[2] / "jobs" / f"{job}.yaml"
    stages = read_definition(path, ChainDir(tmp_path / job)).stages
    configs = {stage.name: stage.config for stage in stages}
    assert len({config.task.seed for config in configs.values()}) == 1
    for config in configs.values():
        assert config.stage != "rl" or config.task.first_item


def test_what_the_file_says_for_all_wins_over_the_preset_of_a_stage(tmp_path: Path) -> None:
    common = "train: {precision: fp16, lr: 1e-4}\nrollout: {num_generations: 4}\nmodel: {path: mine}\n"
    stages = "stages:\n  - {name: a, stage: rl, include: [rl/r1, model/tiny_gpt2], train: {lr: 2e-4}}\n"
    (tmp_path / "x.yaml").write_text(common + stages)
    config = read_definition(tmp_path / "x.yaml", ChainDir(tmp_path / "x")).stage("a").config
    assert (config.train.precision, config.train.lr) == (Precision.fp16, 2e-4)
    assert config.rollout.num_generations == 4
    assert config.rl.kl_coef == load.load(find_job("rl_smoke")).rl.kl_coef  # the preset's, left alone
    assert not config.model.config, "of another model than the one in model.path"


def test_by_another_path_a_chain_is_the_same(tmp_path: Path) -> None:
    """As under a home that is a link: its stages name one another by the path of its beginning."""
    real, link = tmp_path / "scratch" / "me", tmp_path / "me"
    (real / "c").mkdir(parents=True)
    link.symlink_to(real)
    begun = ChainDir(link / "c")
    save_definition(read(tmp_path, "\n  - name: a\n"), begun)
    assert by_its_first_path(ChainDir(real / "c")).path == begun.path
    link.unlink()
    assert by_its_first_path(ChainDir(real / "c")).path == real / "c"


def test_common_keys_need_a_stage(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(COMMON + "  -\n")
    with pytest.raises(UsageError, match="`stages` must be a list"):
        read_definition(tmp_path / "x.yaml", ChainDir(tmp_path / "x"))


def test_a_chain_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a path means is settled where the chain was begun; the same override again changes nothing."""
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ("a:model.path=model", "a:task.options.path=q*.jsonl")
    (tmp_path / "q1.jsonl").touch()
    made = read(tmp_path, "\n  - name: a\n", *words)
    chain = ChainDir(tmp_path / "runs" / "c")
    chain.path.mkdir(parents=True)
    save_definition(made, chain)
    assert override(open_definition(chain), words, chain) == made
    monkeypatch.chdir(tmp_path / "elsewhere")
    frozen = open_definition(chain)
    assert override(frozen, (), chain) == made
    assert frozen.stage("a").config.model.path == str(tmp_path / "model")
    assert frozen.stage("a").config.task.options["path"] == str(tmp_path / "q*.jsonl")


def test_a_chain_that_goes_on_keeps_to_the_keys_its_frozen_code_knows(tmp_path: Path) -> None:
    """A stage's job reads chain.yaml with the code it was frozen with."""
    chain = ChainDir(tmp_path / "runs" / "c")
    chain.path.mkdir(parents=True)
    save_definition(read(tmp_path, "\n  - name: a\n"), chain)
    older = load.read_yaml(chain.definition)
    config = older["stages"][0]["config"]
    del config["notify"]
    config["data"]["mix"]["online"] = "odm"
    write_yaml(chain.definition, older)
    save_definition(override(open_definition(chain), ["train.num_steps=9"], chain), chain)
    config["train"]["num_steps"] = 9
    assert load.read_yaml(chain.definition) == older


def test_a_chain_of_before_is_of_the_folder_it_is_submitted_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chain.yaml has paths as they were given."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    made = read(tmp_path, "\n  - name: a\n    model: {path: model}\n")
    chain = ChainDir(tmp_path / "runs" / "c")
    chain.path.mkdir(parents=True)
    save_definition(made, chain)
    chain.definition.write_text(chain.definition.read_text().replace(f"{tmp_path}/model", "model"))
    assert f"{tmp_path}/model" not in chain.definition.read_text()
    assert override(open_definition(chain), (), chain) == open_definition(chain) == made
