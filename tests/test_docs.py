"""Links of the pages lead somewhere, and the commands on them exist, with their flags, settings and files.

Examples of single pages: test_own_data_page.py and tasks/test_docs.py. `make docs` checks the site.
"""

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1hpc.__main__ import COMMANDS
from r1hpc.base.cli import ArgumentParser
from r1hpc.config import load
from r1hpc.config.load import known_keys
from r1hpc.corpus.recipe import parse_recipe
from tests.test_writing import PAGES, ROOT

_SITE_ONLY = {"commands.md", "recipes.md", "contributing.md"}  # made by research/docs_site.py
_PROGRAM = re.compile(r"([\w./-]*/)?(python3?(\.11)?|r1hpc|make|pip|sbatch)$")
_PLANNED = re.compile(r"submit (jobs/\w+\.yaml|--nodes \d)")
_CHEAP = re.compile(r"-m r1hpc\.(estimate (--params|jobs/)|settings jobs/|shard plan stdlib)")
_YOURS = re.compile(r"jobs/(mine|r1_a100)\.yaml|\$|/scratch|\bDIR\b")  # needs files of the reader


def blocks(page: Path) -> list[str]:
    """Return the code blocks of a page: fenced or indented."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)", text)
    return fenced + [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in indented]


def commands(page: Path) -> list[str]:
    """Return the lines of a page's code that call r1hpc, Python, make or pip, without prompt and comment."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"\s+#.*", "", line.removeprefix("$ ")).strip() for line in lines]
    return [line for line in lines if any(map(_PROGRAM.match, _leading(line)))]


def _leading(line: str) -> list[str]:
    """Return the first word that is no VARIABLE=VALUE; for salloc the words after it too."""
    words = [word for word in line.split() if not re.match(r"[A-Z_0-9]+=", word)]
    return words if words[:1] == ["salloc"] else words[:1]


ALL = sorted({(page.name, line) for page in PAGES for line in commands(page)})
SUBMITTED = sorted({line for _, line in ALL if _PLANNED.search(line) and not _YOURS.search(line)})


def test_there_are_commands_on_the_pages() -> None:
    assert len(ALL) > 100
    assert len(SUBMITTED) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not _exists(page, link)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    folders = "r1hpc|tests|research|benchmarks|experiments|configs|jobs|shards|sbatch"
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|yaml|sh|md))(?:::\w+)?`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists() and "mine" not in name] == []


def _exists(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    if path in _SITE_ONLY:
        return True
    target = (page.parent / path) if path else page
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in _anchors(target)


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("line", sorted({line for _, line in ALL}))
def test_a_command_has_what_it_names(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    program, *rest = words[next(i for i, word in enumerate(words) if _PROGRAM.match(word)) :]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program.endswith("pip") or rest[:2] == ["-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {each for found in re.findall(r"\[([\w,-]+)\]", line) for each in found.split(",")}
        assert named <= set(extras)
    elif program == "r1hpc":
        _parse(rest[0], rest[1:], monkeypatch)
    elif program == "sbatch":
        assert (ROOT / rest[-1]).exists()
    elif rest[0] == "-m" and rest[1].startswith("r1hpc."):
        _parse(rest[1].removeprefix("r1hpc."), rest[2:], monkeypatch)
    elif rest[0] == "-m" and rest[1].split(".")[0] in ("research", "benchmarks", "tests"):
        assert importlib.util.find_spec(rest[1])
    elif rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word.split("::")[0]).exists() for word in rest[2:] if word.startswith("tests"))
    elif rest[0].endswith(".py"):
        assert (ROOT / rest[0]).exists()


class _ParsedError(Exception):
    """The arguments are right; the command does not go on."""


def _parse(command: str, argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words as the command does; check job files and settings."""
    if command == "launch" or argv[:1] == ["…"]:
        return
    assert command in COMMANDS
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, name, _stop_after(getattr(ArgumentParser, name)))
    with pytest.raises(_ParsedError):
        importlib.import_module(f"r1hpc.{command.replace('-', '_')}").main(list(argv))
    for word in argv:
        if re.match(r"(jobs|configs)/.*\.yaml$", word) and "mine" not in word:
            assert (ROOT / word).exists()
        setting = re.match(r"(?:\w+:)?([a-z_]+(?:\.[a-z_0-9]+)*)=", word)
        if setting and command in ("submit", "drill", "settings"):
            assert any(f"{key}.".startswith(f"{setting[1]}.") for key in known_keys())


def _stop_after(parse: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*args: Any) -> Any:
        parse(*args)
        raise _ParsedError

    return stop


@pytest.mark.parametrize("line", SUBMITTED)
def test_a_job_on_the_pages_is_planned(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    argv = words[next(i for i, word in enumerate(words) if word.endswith("submit")) + 1 :]
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert importlib.import_module("r1hpc.submit").main([*argv, "--dry-run"]) == 0


@pytest.mark.parametrize("line", sorted({line for _, line in ALL if _CHEAP.search(line)}))
def test_a_cheap_command_on_the_pages_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path))
    monkeypatch.chdir(ROOT)
    module, *argv = shlex.split(line.partition("-m ")[2])
    assert importlib.import_module(module).main(argv) == 0
    assert capsys.readouterr().out


def test_recipes_on_the_pages_are_recipes(tmp_path: Path) -> None:
    found = [
        block
        for page in PAGES
        for block in blocks(page)
        if re.match(r"(name: \S+\n.*)?sources:\n", block, re.S)
    ]
    assert len(found) > 1
    for block in found:
        content = {"name": "example", "tokenizer": {"kind": "bytes"}} | yaml.safe_load(block)
        parse_recipe(content, tmp_path)


def test_settings_on_the_pages_are_settings(tmp_path: Path) -> None:
    """A block of YAML that starts with a section of a job file can be loaded."""
    sections = {key.split(".")[0] for key in known_keys()}
    tried = 0
    for page in PAGES:
        for block in blocks(page):
            try:
                content = yaml.safe_load(block)
            except yaml.YAMLError:
                continue
            if isinstance(content, dict) and set(content) <= sections:
                (tmp_path / "job.yaml").write_text(json.dumps(content))
                load.load(tmp_path / "job.yaml")
                tried += 1
    assert tried > 5
