"""A user's own code: which files a name stands for, frozen, named by content, and refused when it changed."""

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load, paths, plugins
from r1hpc.config.paths import files_in, with_absolute_paths
from r1hpc.config.schema.rl import EvaluateConfig, RewardConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.snapshot import freeze


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


_FILES = {
    "my_task.py": "import json, helper\nfrom tools.deep import f\n\nclass T: ...\n",
    "helper.py": "import further\n",
    "further.py": "import my_task\n",
    "tools/__init__.py": "",
    "tools/deep.py": "def f(): ...\n",
    "tools/words.txt": "a\n",
    "tools/__pycache__/deep.cpython-311.pyc": "x",
    "unrelated.py": "1 / 0\n",
    ".hidden.py": "",
}


def test_a_file_comes_with_what_it_imports_beside_it(tmp_path: Path) -> None:
    _write(tmp_path, _FILES)
    plugin = plugins.find(f"{tmp_path}/my_task.py:T")
    assert plugin.files == (
        *("further.py", "helper.py", "my_task.py"),
        *("tools/__init__.py", "tools/deep.py", "tools/words.txt"),
    )
    assert (plugin.root, plugin.module, plugin.name) == (tmp_path, "my_task", "T")


def test_of_a_file_in_a_clone_r1hpc_is_no_part(tmp_path: Path) -> None:
    """A run has it frozen, and after an update of the clone the file is still the same."""
    _write(
        tmp_path,
        {
            "r1hpc/__init__.py": "",
            "helper.py": "",
            "mine.py": "import helper\nfrom r1hpc.tasks import Task\n",
        },
    )
    assert plugins.find(f"{tmp_path}/mine.py:Task").files == ("helper.py", "mine.py")


def test_a_module_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {"pack_a/__init__.py": "1 / 0", "pack_a/inner.py": "1 / 0", "pack_a/data.json": "{}"})
    monkeypatch.chdir(tmp_path)
    plugin = plugins.find("pack_a.inner:score")
    assert plugin.files == ("pack_a/__init__.py", "pack_a/data.json", "pack_a/inner.py")
    assert plugin.module == "pack_a.inner"
    with pytest.raises(ConfigError, match=r"no module pack_a\.outer in this folder or on Python's path"):
        plugins.find("pack_a.outer:score")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.py:T", "there is no file .*nowhere.py"),
        ("my_task.py:9", "not a Python name"),
        ("my task:T", "neither FILE.py:NAME nor package.module:NAME"),
        ("json.py:T", "json is a module of Python's or ours: rename"),
        ("a-b.py:T", "'a-b' is no name of a module: rename"),
        ("big.py:T", "17 MiB of files, too many to freeze"),
    ],
)
def test_a_name_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, said: str) -> None:
    _write(tmp_path, {"my_task.py": "", "json.py": "", "a-b.py": "", "big.py": "#" * (17 << 20)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        plugins.find(spec)


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDir, RunConfig]:
    """A run frozen with a task and a reward of the folder `mine`."""
    _write(tmp_path / "mine", {**_FILES, "rewards.py": "def brevity(*a): return 1.0\n"})
    monkeypatch.chdir(tmp_path / "mine")
    config = replace(
        load.load("rl_smoke"),
        task=TaskConfig("my_task.py:T"),
        reward=RewardConfig(terms={"accuracy": 1.0, "rewards.py:brevity": 0.2}),
    )
    run = RunDir(tmp_path / "runs" / "one")
    run.create()
    config = with_absolute_paths(config)
    freeze(run, config, [], [])
    return run, load.read(run.config)


def test_it_is_frozen_with_the_run_and_found_there(frozen: tuple[RunDir, RunConfig], tmp_path: Path) -> None:
    run, config = frozen
    task, reward = paths.names_in(config)
    assert (task, reward) == (f"{tmp_path}/mine/my_task.py:T", f"{tmp_path}/mine/rewards.py:brevity")
    copy = plugins.locate(task, run.code)
    assert copy.root.is_relative_to(run.code / "plugins")
    assert (copy.files, copy.digest) == (plugins.find(task).files, plugins.find(task).digest)
    assert plugins.locate(task).root == tmp_path / "mine", "outside of the run nothing is frozen"
    assert not [path for path in run.path.rglob("*") if path.lstat().st_mode & 0o077]
    plugins.refuse_changes([task, reward], run.code)
    (tmp_path / "mine").rename(tmp_path / "moved")
    plugins.refuse_changes([task, reward], run.code)


def test_code_that_changed_is_refused_in_words(frozen: tuple[RunDir, RunConfig], tmp_path: Path) -> None:
    run, config = frozen
    task, reward = paths.names_in(config)
    (tmp_path / "mine" / "helper.py").write_text("# other\n")
    plugins.refuse_changes([reward], run.code)
    with pytest.raises(ConfigError, match=r"my_task.py:T has changed since this run began with it") as caught:
        plugins.refuse_changes([task, reward], run.code)
    assert "(further.py, helper.py in " in str(caught.value)
    assert str(run.code / "plugins") in str(caught.value)


def test_a_copy_that_was_edited_is_refused(frozen: tuple[RunDir, RunConfig]) -> None:
    run, config = frozen
    task = config.task.name
    copy = plugins.locate(task, run.code)
    (copy.root / "helper.py").write_text("# other\n")
    with pytest.raises(ConfigError, match=r"the run's own copy in .* is not what it was frozen as"):
        plugins.locate(task, run.code)


def test_a_secret_in_own_code_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"my_task.py": "TOKEN = 'hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYz01234567'\n"})
    run = RunDir(tmp_path / "runs" / "one")
    run.create()
    config = replace(load.load("rl_smoke"), task=TaskConfig(f"{tmp_path}/my_task.py:T"))
    with pytest.raises(ConfigError, match=r"plugins/.*/my_task.py holds what looks like a Hugging Face"):
        freeze(run, config, [], [])


@pytest.fixture
def with_template(tmp_path: Path) -> tuple[RunDir, RunConfig, Path]:
    """A run frozen with a chat template of the user's own, and that file."""
    file = tmp_path / "mine" / "short:er.jinja"
    _write(tmp_path / "mine", {file.name: "{{ messages[0].content }}"})
    run = RunDir(tmp_path / "runs" / "one")
    run.create()
    smoke = load.load("rl_smoke")
    config = with_absolute_paths(replace(smoke, model=replace(smoke.model, chat_template=str(file))))
    freeze(run, config, [], [])
    return run, load.read(run.config), file


def test_a_chat_template_is_frozen_by_content(with_template: tuple[RunDir, RunConfig, Path]) -> None:
    run, config, file = with_template
    assert plugins.template_file(config.model) == file
    copy = plugins.template_file(config.model, run.code)
    assert copy.is_relative_to(run.code / "plugins")
    was = file.read_text()
    plugins.refuse_changes(paths.names_in(config), run.code)
    file.write_text("{{ messages[-1].content }}")
    assert copy.read_text() == was
    with pytest.raises(ConfigError, match=r"short:er\.jinja has changed since this run began with it"):
        plugins.refuse_changes(paths.names_in(config), run.code)
    file.unlink()
    plugins.refuse_changes(paths.names_in(config), run.code)
    assert plugins.template_file(config.model, run.code) == copy
    copy.write_text("other")
    with pytest.raises(ConfigError, match=r"the run's own copy in .* is not what it was frozen as"):
        plugins.template_file(config.model, run.code)


def test_the_tokenizers_own_template_and_none_are_no_files(tmp_path: Path) -> None:
    smoke = load.load("rl_smoke")
    for word in ("auto", "none"):
        config = with_absolute_paths(replace(smoke, model=replace(smoke.model, chat_template=word)))
        assert config.model.chat_template == word
        assert paths.names_in(config) == []
    missing = replace(smoke, model=replace(smoke.model, chat_template=f"{tmp_path}/no.jinja"))
    with pytest.raises(ConfigError, match=r"there is no file .*no\.jinja; give a Jinja file, auto or none"):
        plugins.template_file(missing.model)


def test_a_text_among_the_options_is_no_file_however_long(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("{}")
    options = {"path": str(questions), "template": "{question}" + "x" * 5000}
    config = replace(RunConfig(), task=TaskConfig("file", options=options))
    assert files_in(config) == {str(questions): [questions]}


@pytest.mark.parametrize("named", ["", "part-*.jsonl"])
def test_the_files_of_a_folder_or_pattern_are_held_to_their_content(tmp_path: Path, named: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    paths = [data / f"part-{number}.jsonl" for number in (0, 1)]
    for path in (*paths, data / "README.md"):
        path.write_text("{}")
    config = replace(RunConfig(), task=TaskConfig("file", options={"path": str(data / named)}))
    assert files_in(config) == {str(data / named): paths}
    plugins.freeze_files(files_in(config), tmp_path)
    (data / "README.md").write_text("what is no question may change")
    plugins.refuse_changed_files(tmp_path)
    paths[1].write_text("{} ")
    with pytest.raises(ConfigError, match=r"\(part-1\.jsonl\) has changed since this run began"):
        plugins.refuse_changed_files(tmp_path)
    paths[1].rename(data / "part-2.jsonl")
    with pytest.raises(ConfigError, match=r"\(part-1\.jsonl, part-2\.jsonl\) has changed"):
        plugins.refuse_changed_files(tmp_path)


def test_the_folders_of_an_own_task_are_its_own_affair(tmp_path: Path) -> None:
    (tmp_path / "cache.bin").touch()
    for path in (str(tmp_path), "", f"{tmp_path}/**.bin"):
        config = replace(RunConfig(), task=TaskConfig("my.py:Mine", options={"path": path}))
        assert files_in(config) == {}
        assert with_absolute_paths(config).task.options == {"path": path}
    part = {"options": {"path": str(tmp_path)}}
    (tmp_path / "a.jsonl").touch()
    mixed = replace(RunConfig(), task=TaskConfig("file", mix={"a": part, "b": {"name": "chain_sum"}}))
    assert files_in(mixed) == {str(tmp_path): [tmp_path / "a.jsonl"]}, "an entry takes the name above it"
    own = replace(RunConfig(), task=TaskConfig("my.py:Mine", options={"list": f"{tmp_path}/cache.bin"}))
    assert list(files_in(own)) == [f"{tmp_path}/cache.bin"]


def test_the_test_files_of_a_stage_that_asks_them_are_held_to_their_content(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    for path in paths:
        path.write_text("{}")
    several = EvaluateConfig(sets={path.stem: {"path": str(path)} for path in paths})
    config = RunConfig(stage="rl", evaluate=several)
    assert list(files_in(config)) == [str(path) for path in paths]
    assert list(files_in(replace(config, evaluate=EvaluateConfig(path=str(paths[1]))))) == [str(paths[1])]
    assert files_in(replace(config, stage="sft")) == {}
    plugins.freeze_files(files_in(config), tmp_path)
    plugins.refuse_changed_files(tmp_path)
    paths[1].write_text("{} ")
    with pytest.raises(ConfigError, match=r"two\.jsonl has changed since this run began"):
        plugins.refuse_changed_files(tmp_path)
