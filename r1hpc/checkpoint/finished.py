"""Record the digests of a run's results in FINISHED, and check them before they are read.

    FINISHED   {"digest": of the rest, "global_step": 24, "time": ...,
                "files": [{"name": "model/model.safetensors", "size": 81, "digest": "xxh3_128:..."}],
                "inputs": [{"path": "../sft/model", "digest": "xxh3_128:...", "step": 900}]}

Names and contents count; times and the place of the run do not. FINISHED of earlier versions has no `files`:
its run reads "not verified".
"""

import json
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, read_json, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.manifest import digest_bytes, digest_fd
from r1hpc.config.schema.run import RunConfig

_RESULTS = ("traces.jsonl", "evaluation.json")
"""Results beside model/ and parts/."""
_IS_READ = re.compile(r".*\.(json|jinja|model|safetensors|bin|py|txt)")
"""Names in a model folder that transformers or vLLM may read: an added one can change the model."""
OLD = "old"
_SMALL = 2**20
"""Bytes of a file that is hashed at every look."""
_THREADS = 8
"""xxhash releases the GIL, and weights come in files of 4 GiB."""


class _Record(TypedDict):
    name: str
    size: int
    digest: str


class _Input(TypedDict):
    path: str
    digest: str
    step: int | None


class Finished(TypedDict):
    """Contents of FINISHED. Those of earlier versions lack `digest` and what it covers."""

    global_step: NotRequired[int]
    time: NotRequired[float]
    digest: NotRequired[str]
    files: NotRequired[list[_Record]]
    inputs: NotRequired[list[_Input]]


class Checked(NamedTuple):
    problems: list[str]
    num_bytes: int
    """Bytes on record."""
    is_on_record: bool
    """False: FINISHED is missing, or of an earlier version."""


def write_finished(run: RunDir, step: int | None) -> None:
    """Write FINISHED with the digests of the run's results. Reads the model once, back from the disk."""
    value: dict[str, Any] = {} if step is None else {"global_step": step}
    value["time"] = time.time()
    value["files"] = _digests(run.path, _names(run))
    value["inputs"] = read_json(run.inputs) if run.inputs.exists() else []
    write_json(run.finished, {"digest": _own_digest(value), **value})


def read_finished(run: RunDir) -> Finished | None:
    """Return FINISHED, None if there is none. Raise StateError if it is damaged."""
    try:
        value: Finished = read_json(run.finished, Finished)
    except FileNotFoundError:
        return None
    if "digest" in value or "files" in value:
        body = {key: each for key, each in value.items() if key != "digest"}
        if _own_digest(body) != value.get("digest"):
            raise StateError(f"{run.finished} does not match its own digest: restore it")
    return value


def check_results(run: RunDir, *, by_content: bool) -> Checked:
    """Compare a run's results with FINISHED: names, sizes, and digests of small files, or of all."""
    finished = read_finished(run)
    if finished is None or "files" not in finished:
        return Checked([], 0, is_on_record=False)
    records = {record["name"]: record for record in finished["files"]}
    found = _names(run)
    problems = [f"{name} was not there when the run finished" for name in sorted({*found} - {*records})]
    hashed = []
    for name, record in records.items():
        path = run.path / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != record["size"]:
            problems.append(f"{name} has {size:,} of {record['size']:,} bytes")
        elif by_content or size <= _SMALL:
            hashed.append(name)
    if not problems:
        for now in _digests(run.path, hashed):
            if now["digest"] != records[now["name"]]["digest"]:
                problems.append(f"{now['name']} has another content")
    return Checked(problems, sum(record["size"] for record in records.values()), is_on_record=True)


def refuse_damaged(run: RunDir, *, by_content: bool = True) -> Checked:
    """Raise StateError, which says what differs and what to do, if the run's results are not as it left
    them."""
    checked = check_results(run, by_content=by_content)
    if checked.problems:
        shown = "; ".join(checked.problems[:3]) + (" ..." if len(checked.problems) > 3 else "")
        again = "restore it from a copy, or run it again under another --run-name"
        if any(run.checkpoints.glob("step-*")):
            steps = max(int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*[0-9]"))
            again = (
                f"restore it, or make it of the checkpoint: r1hpc export {run.path} --step {steps} --out DIR"
            )
        raise StateError(f"{run.path} is not as it finished: {shown}. {again[0].upper()}{again[1:]}")
    return checked


def refuse_copy(run: RunDir, copy: Path) -> None:
    """Raise StateError if `copy` of the run's model differs from FINISHED."""
    finished = read_finished(run) or Finished()
    records = {r["name"].removeprefix("model/"): r["digest"] for r in finished.get("files", ())}
    names = [str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()]
    if records and (
        wrong := [r["name"] for r in _digests(copy, names) if records.get(r["name"]) != r["digest"]]
    ):
        raise StateError(f"the copy of {wrong[0]} differs from {run.model}: export it again")


def check_folder(folder: str | Path | None, *, by_content: bool = True) -> None:
    """Refuse a damaged `model/` or `traces.jsonl` of a run; any other path is not on record."""
    if run := _run_of(folder):
        refuse_damaged(run, by_content=by_content)


def check_inputs(config: RunConfig, *, by_content: bool) -> None:
    """Refuse damaged results of other runs that this one reads."""
    for path in _inputs_of(config):
        check_folder(path, by_content=by_content)


def inputs_now(run: RunDir, config: RunConfig) -> list[_Input]:
    """Return what `run` reads of other runs, by the digests in their FINISHED."""
    found: list[_Input] = []
    for path in _inputs_of(config):
        source = _run_of(path)
        finished = read_finished(source) if source else None
        if source and finished and "files" in finished:
            name = os.path.relpath(path, run.path) if Path(path).parents[1] == run.path.parent else str(path)
            digest = _digest_of(finished["files"], Path(path).name)
            found.append({"path": name, "digest": digest, "step": finished.get("global_step")})
    return found


def why_old(run: RunDir, old: Collection[str] = ()) -> str:
    """Return why a finished run is old: an input has changed since, or is one of the stages `old`. Return why
    FINISHED cannot be read if it is damaged. Empty: neither."""
    try:
        finished = read_finished(run) or Finished()
        for was in finished.get("inputs", ()):
            # A stage that another chain reuses is a link.
            path = Path(os.path.normpath(run.path.resolve() / was["path"]))
            if path.parent.name in old:
                return f"{OLD}: its input {path.parent.name} is old"
            now = read_finished(RunDir(path.parent))
            if now is not None and _digest_of(now.get("files", ()), path.name) != was["digest"]:
                step = now.get("global_step")
                is_at = "has changed" if step in (None, was["step"]) else f"is now step {step}"
                had = "" if step in (None, was["step"]) else f", it had step {was['step']}"
                return f"{OLD}: its input {path.parent.name} {is_at}{had}"
    except StateError as error:
        return str(error)
    return ""


def _inputs_of(config: RunConfig) -> list[str]:
    return [path for path in (config.model.path, config.rl.teacher, *config.data.traces) if path]


def _run_of(path: str | Path | None) -> RunDir | None:
    """Return the finished run whose result `path` is."""
    if path is None or Path(path).name not in ("model", *_RESULTS):
        return None
    run = RunDir(Path(path).absolute().parent)
    return run if run.finished.exists() else None


def _names(run: RunDir) -> list[str]:
    paths = [path for path in run.model.rglob("*") if path.is_file() and _IS_READ.fullmatch(path.name)]
    paths += [path for name in _RESULTS if (path := run.path / name).is_file()]
    return sorted(str(path.relative_to(run.path)) for path in [*paths, *run.all_parts])


def _digests(root: Path, names: Iterable[str]) -> list[_Record]:
    def digest(name: str) -> _Record:
        with open_plain(root / name) as file:
            size, value = digest_fd(file.fileno())
        return {"name": name, "size": size, "digest": value}

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest, names))


def _digest_of(records: Iterable[_Record], result: str) -> str:
    """Return one digest of `model` or of another result."""
    of_it = sorted((r["name"], r["digest"]) for r in records if r["name"].split("/")[0] == result)
    return digest_bytes(json.dumps(of_it).encode())


def _own_digest(value: Mapping[str, Any]) -> str:
    return digest_bytes(json.dumps(value, sort_keys=True).encode())
