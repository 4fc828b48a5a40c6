"""What is frozen into a run folder, and that no secret is."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import read_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.paths import with_absolute_paths
from r1hpc.config.schema.cluster import ClusterConfig
from r1hpc.config.schema.rl import EvaluateConfig, TaskConfig
from r1hpc.config.schema.run import DataConfig, ModelConfig, RunConfig
from r1hpc.config.schema.sections import DeepspeedConfig
from r1hpc.config.secrets import (
    find_secret,
    find_written_out,
    is_secret_key,
    redact,
    refuse_secrets,
    secret_values,
)
from r1hpc.config.snapshot import freeze

# Ten secrets, none of them real, each spelled in two parts so that this file holds none.
TOKEN = "hf" + "_AbCdEfGhIjKlMnOpQrStUvWx"
SECRETS = {
    "HF_TOKEN": TOKEN,
    "OPENAI_API_KEY": "sk" + "-proj-0123456789abcdefghij",
    "AWS_ACCESS_KEY_ID": "AKIA" + "IOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "GITHUB_TOKEN": "ghp" + "_0123456789abcdefghijABCDEFGHIJ",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "DB_PASSWORD": "correct-horse-battery",
    "SESSION_COOKIE": "sid-77aa88bb99cc",
    "NCCL_SECRET": "nccl-very-private",
    "R1HPC_CREDENTIAL": "r1hpc-very-private",
}
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "one")
    run.create()
    return run


def _everything(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_the_frozen_code_runs_on_its_own(run: RunDir, tmp_path: Path) -> None:
    freeze(run, load.load("smoke"), ["jobs/smoke.yaml"], [])
    environ = {**os.environ, "PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}
    code = "import r1hpc.config.load as l; print(l.__file__, l.find_job('smoke'), l.assets('configs'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert all(word.startswith(str(run.code)) for word in done.stdout.split())


def test_everything_is_private_and_the_configuration_comes_back(run: RunDir) -> None:
    config = load.load("smoke", ["train.num_steps=77"])
    freeze(run, config, [], ["train.num_steps=77"])
    assert load.read(run.config) == config
    assert not [path for path in run.path.rglob("*") if path.lstat().st_mode & 0o077]
    assert not list(run.code.rglob("*.pyc"))
    assert not [path for path in run.code.rglob("*") if path.is_file() and path.stat().st_nlink > 1]


def test_circumstances_are_recorded(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_APP", "not recorded")
    freeze(run, load.load("smoke"), ["jobs/smoke.yaml", "--nodes", "2"], ["resources.nodes=2"])
    about = read_json(run.environment)
    assert about["argv"] == ["jobs/smoke.yaml", "--nodes", "2"]
    assert about["packages"]["omegaconf"]
    assert about["environment"]["NCCL_DEBUG"] == "INFO"
    assert "MY_APP" not in json.dumps(about)


def test_ten_secrets_of_the_environment_are_in_no_file(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    argv = [f"--comment={TOKEN}", f"x={JWT}", "--url=https://me:hunter22@host/x", "api_key=plain-as-day"]
    freeze(run, load.load("smoke"), argv, argv)
    written = _everything(run.path)
    planted = [*SECRETS.values(), JWT, "hunter22", "plain-as-day"]
    assert [value for value in planted if value in written] == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout of the package with a remote that holds a password and a diff that holds secrets."""
    root = tmp_path / "checkout"
    package = Path(load.__file__).resolve().parents[1]
    root.mkdir()
    subprocess.run(["cp", "-r", str(package), str(root)], check=True)
    for name in ("jobs", "configs"):
        subprocess.run(["cp", "-r", str(load.assets(name)), str(root)], check=True)
    (root / "notes.md").write_text("one\n")
    _git(root, "init", "-q")
    _git(root, "remote", "add", "origin", f"https://me:{TOKEN}@github.example/x.git")
    _git(root, "add", ".")
    _git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    (root / "notes.md").write_text(
        f'one\nDB_PASSWORD = "swordfish-9"\n{SECRETS["GITHUB_TOKEN"]}\n{JWT}\ntwo\n'
    )
    return root


def _git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True)


def _freeze_in(checkout: Path, run: RunDir) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys; from r1hpc.base.run_dir import RunDir;"
        "from r1hpc.config import load, snapshot as freeze;"
        f"freeze.freeze(RunDir({str(run.path)!r}), load.load('smoke'), [], [])"
    )
    environ = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)


def test_secrets_of_a_diff_and_a_remote_are_in_no_file(run: RunDir, checkout: Path) -> None:
    (checkout / "new.txt").touch()
    done = _freeze_in(checkout, run)
    assert done.returncode == 0, done.stderr
    diff = (run.code / "diff.patch").read_text()
    assert "+two" in diff.splitlines()
    about = read_json(run.environment)["git"]
    assert about["dirty"] is True
    assert about["remote"] == "https://[redacted]@github.example/x.git"
    asked = ["git", "-C", str(checkout), "rev-parse", "HEAD", "--abbrev-ref", "HEAD"]
    assert subprocess.check_output(asked, text=True).split() == [about["commit"], about["branch"]]
    assert "new.txt" in about["untracked"]
    written = _everything(run.path)
    assert [s for s in (TOKEN, "swordfish-9", SECRETS["GITHUB_TOKEN"], JWT) if s in written] == []


def test_a_secret_in_the_code_itself_is_refused(run: RunDir, checkout: Path) -> None:
    (checkout / "r1hpc" / "mine.py").write_text(f"LOGIN = {TOKEN!r}\n")
    done = _freeze_in(checkout, run)
    assert "r1hpc/mine.py holds what looks like a Hugging Face token" in done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("item", [f"model.path=/m/{TOKEN}", "data.path=https://me:hunter22@host/x"])
def test_an_override_that_holds_a_secret_is_refused_without_saying_it(item: str) -> None:
    with pytest.raises(ConfigError, match="looks like") as raised:
        refuse_secrets(load.load("smoke", [item]), [item])
    assert TOKEN not in str(raised.value)
    assert "hunter22" not in str(raised.value)


def test_secret_variables_of_a_profile_are_refused() -> None:
    config = RunConfig(cluster=ClusterConfig(environment={"WANDB_API_KEY": "x"}))
    with pytest.raises(ConfigError, match=r"~/\.netrc"):
        refuse_secrets(config, [])


def test_secretly_named_keys_of_a_model_are_refused_but_not_the_usual_ones() -> None:
    usual = {"model_type": "qwen2", "eos_token": "<|endoftext|>", "num_key_value_heads": 2}
    refuse_secrets(RunConfig(model=ModelConfig(config=usual)), [])
    with pytest.raises(ConfigError, match=r"model\.config\.auth_token"):
        refuse_secrets(RunConfig(model=ModelConfig(config={**usual, "auth_token": "zzzzzz"})), [])


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    config = RunConfig(data=DataConfig(path="d", recipe="mine.yaml"), model=ModelConfig(path="m"))
    absolute = with_absolute_paths(config)
    assert (absolute.data.path, absolute.model.path) == (str(tmp_path / "d"), str(tmp_path / "m"))
    assert absolute.data.recipe == str(tmp_path / "mine.yaml")
    assert with_absolute_paths(RunConfig()).data.recipe == "smoke"


def test_traces_tokenizers_and_files_of_tasks_are_paths_where_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").touch()
    (tmp_path / "tokenizer.json").touch()
    config = RunConfig(
        data=DataConfig(traces=["later.jsonl"]),
        model=ModelConfig(tokenizer="tokenizer.json"),
        task=TaskConfig(options={"path": "q.jsonl", "seed": 1}),
    )
    absolute = with_absolute_paths(config)
    assert absolute.data.traces == [f"{tmp_path}/later.jsonl"]
    assert absolute.model.tokenizer == f"{tmp_path}/tokenizer.json"
    assert absolute.task.options == {"path": f"{tmp_path}/q.jsonl", "seed": 1}
    pattern = {"path": "q*.jsonl", "template": "*{question}"}
    parts = {"a": {"name": "file", "options": pattern}}
    absolute = with_absolute_paths(
        replace(config, task=TaskConfig(mix=parts), evaluate=EvaluateConfig(sets={"b": {"path": "q*"}}))
    )
    assert absolute.task.mix["a"]["options"] == {**pattern, "path": f"{tmp_path}/q*.jsonl"}
    assert absolute.evaluate.sets["b"] == {"path": f"{tmp_path}/q*"}
    named = RunConfig(model=ModelConfig(tokenizer="characters"))
    assert with_absolute_paths(named).model.tokenizer == "characters"


@pytest.mark.parametrize(
    "text",
    [
        "x = cache[key]",
        "key: int",
        "num_key_value_heads=2",
        "pad_token = None",
        "PWD",
        "task-sk-learn",
        "hf_overrides=x",
        "def key():",
    ],
)
def test_ordinary_code_is_left_alone(text: str) -> None:
    assert redact(text) == text
    assert find_secret(text) is None


def test_values_of_secret_variables_are_known() -> None:
    assert secret_values({"A_TOKEN": "abcdefgh", "B_KEY": "short", "PWD": "/long/enough"}) == ["abcdefgh"]


def test_modes_do_not_depend_on_the_umask(run: RunDir) -> None:
    os.umask(0)
    try:
        freeze(run, load.load("smoke"), [], [])
    finally:
        os.umask(0o022)
    assert not [p for p in run.path.rglob("*") if stat.S_IMODE(p.lstat().st_mode) & 0o077]


NETRC = "machine host.example\n  login me\n  password swordfish-9"


@pytest.mark.parametrize(
    ("text", "is_code", "name"),
    [
        ('DB_PASSWORD = "swordfish-9"', True, "PASSWORD ="),
        ("config = {'api_key': 'abcdef'}", True, "api_key':"),
        ("password: swordfish-9  # mine", False, "password:"),
        ("export WANDB_API_KEY=0123456789abcdef", False, "API_KEY="),
        ("passphrase='correct horse battery'", True, "passphrase="),
        ("password = read_password(path)", True, None),
        ("password = value", True, None),
        ('export HF_TOKEN="$(cat ~/.token)"', False, None),
        ("api_key: <yours>", False, None),
        ("password: null", False, None),
        ("eos_token: abcdef", False, None),
    ],
)
def test_a_secret_that_is_written_out(text: str, is_code: bool, name: str | None) -> None:
    assert find_written_out(text, is_code) == name


def test_a_netrc_line_and_a_pass_phrase() -> None:
    assert find_secret(NETRC) == "a line of a .netrc"
    assert "swordfish" not in redact(NETRC) + redact("KEY_PASSPHRASE=swordfish")
    assert secret_values({"OMP_PASSPHRASE": "swordfish"}) == ["swordfish"]
    assert is_secret_key("deepspeed.extra.token")
    assert not is_secret_key("model.config.eos_token")


@pytest.mark.parametrize("line", ['PASSWORD = "swordfish-9"', f"NOTE = '''{NETRC}'''"])
def test_code_with_a_secret_in_it_is_not_frozen(checkout: Path, run: RunDir, line: str) -> None:
    module = checkout / "r1hpc" / "base" / "units.py"
    module.write_text(f"{module.read_text()}\n{line}\n")
    done = _freeze_in(checkout, run)
    assert done.returncode == 1
    assert "base/units.py holds what looks like a" in done.stderr
    assert "swordfish" not in done.stderr


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (RunConfig(deepspeed=DeepspeedConfig(extra={"token": "swordfish"})), "deepspeed.extra.token"),
        (
            RunConfig(deepspeed=DeepspeedConfig(extra={"a": [{"password": 123456}]})),
            "deepspeed.extra.a.password",
        ),
        (RunConfig(cluster=ClusterConfig(environment={"OMP_PASSPHRASE": "x"})), "OMP_PASSPHRASE"),
        (RunConfig(cluster=ClusterConfig(setup=["export WANDB_API_KEY=0123456789abcdef"])), "cluster.setup"),
    ],
)
def test_a_configuration_with_a_secret_is_refused(config: RunConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        refuse_secrets(config, [])
    assert "swordfish" not in str(caught.value)
