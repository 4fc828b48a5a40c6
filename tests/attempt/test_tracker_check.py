"""Trackers that cannot work are refused before anything is submitted."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.trackers import check_trackers
from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig


def config(*overrides: str) -> RunConfig:
    return load.load("jobs/smoke.yaml", overrides)


def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    asked = config("monitor.trackers=[wandb,prometheus]")
    with pytest.raises(UsageError, match=r"needs the package wandb .*pip install 'r1hpc\[trackers\]'"):
        check_trackers(asked, "slurm")
    check_trackers(config("monitor.trackers=[prometheus]"), "slurm")


def test_the_packages_are_looked_for_in_the_interpreter_of_the_nodes(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o700)
    with pytest.raises(UsageError, match=f"tensorboard on the nodes.*{bare}"):
        check_trackers(config("monitor.trackers=[tensorboard]", f"cluster.python={bare}"), "slurm")
    # Which one this is, the nodes' own set-up lines decide.
    check_trackers(config("monitor.trackers=[tensorboard]", "cluster.python=python3"), "slurm")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("monitor.trackers=[wandbb]", "did you mean 'wandb'"),
        ("monitor.trackers=[mlflow]", "one of tensorboard, wandb, prometheus"),
        ("monitor.wandb.mode=live", "one of offline, online"),
        ("monitor.wandb.project=a/b", "none of /"),
        ("monitor.wandb.project=" + "x" * 129, "1 to 128 characters"),
    ],
)
def test_a_tracker_that_is_none_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(override)


def test_wandb_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    online = ("monitor.trackers=[wandb]", "monitor.wandb.mode=online")
    refused: dict[str, Any] = {"match": "wandb login"}
    with pytest.raises(UsageError, **refused):
        check_trackers(config(*online), "slurm")
    netrc.write_text("machine git.example.org login a password b\n")
    with pytest.raises(UsageError, **refused):
        check_trackers(config(*online), "slurm")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    with pytest.raises(UsageError, match="not passed to jobs"):
        check_trackers(config(*online), "slurm")
    check_trackers(config(*online), "local")
    netrc.write_text("machine api.wandb.ai login user password c\n")
    check_trackers(config(*online), "slurm")
    check_trackers(config("monitor.trackers=[wandb]"), "slurm")
