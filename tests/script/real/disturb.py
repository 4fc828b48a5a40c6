# mypy: ignore-errors
"""Run real scripts undisturbed and disturbed, and compare their weights after every step to the last bit.

    python -m tests.script.real.inputs INPUTS
    python -m tests.script.real.disturb SOURCES INPUTS FOLDER [NAME …]

The rows are in scripts.yaml: `words` are the script's own, `ours` those of submit. SOURCES holds the
repositories of docs/real-scripts.md.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import read
from r1hpc.script.loop import seen
from r1hpc.script.rank import _for_a_fresh_start
from tests.runs import CHECKOUT, run_environment, tail, wait_over

TRACE = Path(__file__).parent / "trace"
ROWS = yaml.safe_load((Path(__file__).parent / "scripts.yaml").read_text())
HITS = "stop:6 kill:13 stop:18 kill:26"
_LIMIT_S = 240


@dataclass
class Result:
    """One script, undisturbed and disturbed."""

    promise: str = ""
    loop: str = ""
    causes: list[str] = field(default_factory=list)
    steps: int = 0
    is_equal: bool = False
    is_as_plain: bool | None = None
    """None: it was not run by plain python."""
    detail: str = ""


def run_row(row: dict, sources: Path, inputs: Path, folder: Path) -> Result:
    """Run one row: plain, under r1hpc, and under r1hpc with hits."""
    below = Path(sysconfig.get_path("purelib")) if row.get("installed") else sources
    script, row = str(below / row["path"]), row | {"words": shlex.split(row["words"])}
    result = Result()
    plain = None
    if row.get("plain", True):
        plain = _plain(script, row, inputs, folder / "plain")
        if plain[:1] == ["failed"]:
            result.detail = f"plain python fails: {(folder / 'plain/log').read_text()[-700:]}"
            return result
    ours, _ = _submitted(script, row, inputs, folder / "ours", "", result)
    if result.detail:
        return result
    hit, _run = _submitted(script, row, inputs, folder / "hit", row.get("hits", HITS), result)
    result.steps = len(ours)
    result.is_equal = set(hit) == set(ours) and hit[-1:] == ours[-1:] and bool(ours)
    files = [weights_of(folder / name / "out") for name in ("ours", "hit")]
    if files[0] != files[1]:
        result.is_equal = False
        result.detail = f"files differ: {sorted(set(files[0].items()) ^ set(files[1].items()))[:4]}"
    if len(set(ours)) < max(2, len(ours) // 2):  # then equal weights prove nothing
        result.is_equal, result.detail = False, f"the weights have only {len(set(ours))} values"
    if set(hit) != set(ours):
        first = next((n for n, line in enumerate(hit) if line not in set(ours)), len(hit))
        missing = len(set(ours) - set(hit))
        result.detail += f" line {first + 1} of {len(hit)} differs; {missing} of {len(set(ours))} missing"
    if plain is not None:
        result.is_as_plain = plain == ours
    return result


def _plain(script: str, row: dict, inputs: Path, folder: Path) -> list[str]:
    place = place_for(inputs, folder)
    words = _for_a_fresh_start(row["words"])
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=place, env=_environment(folder, ""), capture_output=True, text=True, timeout=_LIMIT_S,
    )  # fmt: skip
    (folder / "log").write_text(done.stdout + done.stderr)
    return steps_of(folder) if done.returncode == 0 else ["failed", *steps_of(folder)]


def _submitted(
    script: str, row: dict, inputs: Path, folder: Path, hits: str, result: Result
) -> tuple[list[str], RunDir | None]:
    place = place_for(inputs, folder)
    options = ["resources.gpus_per_node=0", "limits.max_crashes=5", "checkpoint.save_every=5"]
    options.append("limits.max_attempts_without_checkpoint=9")
    where = ["--executor", "local", "--run-root", str(folder / "runs"), "--run-name", "run"]
    words = ["-m", "r1hpc.submit", script, *where, *options, *row.get("ours", []), "--", *row["words"]]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place, env=_environment(folder, hits), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    (folder / "log").write_text(text)
    result.promise = "; ".join(re.findall(rf"{re.escape(Path(script).name)}.*", text)) or text.strip()[-300:]
    if done.returncode:
        result.detail = f"refused: {text.strip()[-400:]}"
        return [], None
    run = RunDir(folder / "runs/run")
    try:
        attempts = wait_over(run, _LIMIT_S)
    except AssertionError as error:
        result.detail = str(error)[-1500:]
        subprocess.run([sys.executable, "-m", "r1hpc.cancel", str(run.path)], cwd=CHECKOUT, check=False)
        return [], run
    result.causes = [str(attempt.cause) for attempt in attempts]
    result.loop = seen(run, read(run.config), attempts[-1].attempt)
    if not run.path.joinpath("FINISHED").exists():
        result.detail = tail(run, 12)[-1500:]
    return steps_of(folder), run


def place_for(inputs: Path, folder: Path) -> Path:
    """Return a folder for one run to start in, with links to the inputs."""
    place = folder / "place"
    place.mkdir(parents=True)
    for each in inputs.iterdir():
        (place / each.name).symlink_to(each)
    return place


def _environment(folder: Path, hits: str) -> dict[str, str]:
    paths = [str(TRACE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    traced = {"R1HPC_TEST_STEPS": str(folder / "steps"), "R1HPC_TEST_HITS": hits}
    cache = {"HF_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    return run_environment() | offline | traced | cache | {"CUDA_VISIBLE_DEVICES": ""}


def steps_of(folder: Path) -> list[str]:
    """Return the digests of the weights after each step that was taken."""
    file = folder / "steps"
    return file.read_text().split() if file.exists() else []


def weights_of(folder: Path) -> dict[str, str]:
    """Return the digests of the models that a script wrote last."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        for file in folder.rglob("*.safetensors")
        if not re.search(r"(checkpoint|step|epoch)[-_]?\d", str(file.relative_to(folder)))
    }


def main() -> None:
    sources, inputs, folder = map(Path, sys.argv[1:4])
    for name in sys.argv[4:] or ROWS:
        result = run_row(ROWS[name], sources.resolve(), inputs.resolve(), (folder / name).resolve())
        print(f"{name}: {'equal' if result.is_equal else 'DIFFERS'}, as plain: {result.is_as_plain}")
        for line in (result.promise, result.loop, f"{result.steps} steps; {result.causes}", result.detail):
            print(f"    {line}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
