"""Write a job file for your model, questions and reward, and a profile of your cluster.

    python -m r1hpc.init                                  # asks
    python -m r1hpc.init --model MODEL --data questions.jsonl --reward rewards.py:brevity --cluster mine

The job trains the model with GRPO. Both files are plain YAML, to be changed by hand. The profile goes to
~/.config/r1hpc/cluster/, where --cluster and R1HPC_CLUSTER find it by its name.
"""

from __future__ import annotations

import ast
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.files import parse_object, read_json
from r1hpc.base.names import at_home, check_name

_T = TypeVar("_T")
_NO_CLUSTER = "none"
_COLUMNS = (("question", "problem", "prompt", "query"), ("answer", "solution", "expected", "label"))
_JOB = """\
# yaml-language-server: $schema={schema}
# GRPO on your questions. Every setting: r1hpc settings {name}
include: [rl/r1, deepspeed/zero1]
stage: rl
model: {{path: {model}{changes}}}
task: {{name: file, question: {question}, answer: {answer}, options: {{path: {data}}}}}
reward: {{terms: {{{terms}}}}}    # weights
rollout: {{num_prompts: {prompts}, num_generations: 8, {lengths}}}
train: {{num_steps: 100, global_batch_size: {batch}, micro_batch_size: 4, lr: 1e-6, precision: {precision}}}
evaluate: {{every: 20, num_items: {held_out}, num_samples: 4}}    # on held-out questions
checkpoint: {{save_every: 20}}
resources: {{nodes: 1, gpus_per_node: {gpus}, time: "04:00:00"}}
"""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    from r1hpc.config.assets import assets, cluster_profiles, own_profiles
    from r1hpc.config.schema.rl import TaskConfig
    from r1hpc.plan.model.shape import canonical, dropouts
    from r1hpc.tasks.problems.registry import make_task

    job = Path(arguments.out)
    if job.exists():
        raise UsageError(f"{job} exists: name another file with --out")
    if not job.parent.is_dir():
        raise UsageError(f"there is no folder {job.parent}: make it, or name another file with --out")
    model = _answer(arguments, "model", "Model, a Hugging Face folder", _folder)
    data = _answer(arguments, "data", "Questions, a JSONL or Parquet file", _existing)
    hf_config = read_json(model / "config.json", dict[str, Any])
    question, answer = _columns(data, arguments)
    reward = _answer(arguments, "reward", "Reward, accuracy or FILE.py:NAME", _reward, "accuracy")
    checked = partial(check_name, what="--cluster")
    cluster = _answer(arguments, "cluster", "Cluster, a name of your choice, or none", checked, _NO_CLUSTER)
    gpus = _answer(arguments, "gpus_per_node", "GPUs per node, 0 for CPUs", _number, _gpus(cluster))
    task = make_task(TaskConfig("file", question=question, answer=answer, options={"path": str(data)}))
    written = [job]
    if cluster not in (_NO_CLUSTER, *cluster_profiles()):
        written.append(own_profiles() / f"{cluster}.yaml")
        _write_profile(written[-1], arguments, gpus)
    terms = {"accuracy": 1.0, "format": 0.1}  # the prompt asks for tags
    terms |= {} if reward == "accuracy" else {reward: 0.1}
    prompts, batch, precision = (32, 256, "bf16") if gpus else (8, 64, "fp32")
    drops = ", ".join(f"{key}: 0" for key in dropouts(hf_config))
    text = _JOB.format(
        schema=assets("jobs") / "schema.json",
        name=job,
        model=_quoted(str(model)),
        changes=f", config: {{{drops}}}" if drops else "",  # sampler and trainer must run the same policy
        lengths="max_prompt_length: {}, max_completion_length: {}".format(*_lengths(canonical(hf_config))),
        question=_quoted(question),
        answer=_quoted(answer),
        data=_quoted(str(data)),
        held_out=min(16, task.num_questions(held_out=True) or 16),
        terms=", ".join(f"{_quoted(name)}: {weight}" for name, weight in terms.items()),
        prompts=prompts,
        batch=batch,
        precision=precision,
        gpus=gpus,
    )
    job.write_text(text, encoding="utf-8")
    submit = f"  r1hpc submit {job}" + ("" if cluster == _NO_CLUSTER else f" --cluster {cluster}")
    print(*(f"wrote {path}" for path in written), "next:", sep="\n")
    print(f"{submit} --dry-run    # plan, memory, GPU-hours", submit, sep="\n")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.init", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--data", metavar="FILE", help="questions with answers: JSONL or Parquet")
    parser.add_argument("--question", metavar="COLUMN", help="default: question, problem, prompt or query")
    parser.add_argument("--answer", metavar="COLUMN", help="default: answer, solution, expected or label")
    parser.add_argument("--reward", metavar="NAME", help="accuracy, or your own FILE.py:NAME beside it")
    parser.add_argument("--cluster", metavar="NAME", help="its profile is written if there is none; or none")
    parser.add_argument("--gpus-per-node", metavar="N", help="0: a CPU run")
    parser.add_argument("--partition", metavar="NAME", help="for a new profile; default: Slurm's")
    parser.add_argument("--account", metavar="NAME", help="for a new profile; default: Slurm's")
    parser.add_argument("--out", default="job.yaml", metavar="FILE", help="the job file (job.yaml)")
    return parser


def _answer(
    arguments: Namespace, name: str, question: str, checked: Callable[[str], _T], usual: str = ""
) -> _T:
    """Return the flag's value, else the answer of a person, else the usual one. A person is asked again.

    Raise UsageError if it is refused or missing, and there is nobody to ask.
    """
    flag, given = f"--{name.replace('_', '-')}", getattr(arguments, name)
    while True:
        answer = _ask(f"{question}{f' [{usual}]' if usual else ''}") if given is None else given
        try:
            if not (answer or usual):
                raise UsageError(f"{flag} is missing: {question[:1].lower()}{question[1:]}")
            return checked(answer or usual)
        except UsageError as error:
            if given is not None or answer is None:
                raise
            print(f"{error}. Once more:", file=sys.stderr)


def _ask(question: str) -> str | None:
    """Return a person's answer; None if there is nobody to ask."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    try:
        return input(f"{question}: ").strip()
    except EOFError:
        return None


def _existing(given: str) -> Path:
    path = Path(at_home(given)).resolve()
    if not path.exists():
        raise UsageError(f"there is no {path}")
    return path


def _folder(given: str) -> Path:
    path = Path(at_home(given)).resolve()
    if not (path / "config.json").exists():
        raise UsageError(f"there is no {path / 'config.json'}: name a Hugging Face folder")
    return path


def _number(given: str) -> int:
    if not (given.isascii() and given.isdecimal() and len(given) < 4):
        raise UsageError(f"--gpus-per-node {given} is not a number of GPUs")
    return int(given)


def _columns(data: Path, arguments: Namespace) -> tuple[str, str]:
    """Return the columns of questions and answers; of JSONL, by the keys of its first line."""
    keys: list[str] = []
    if data.suffix == ".jsonl":
        with data.open("rb") as file:
            row = parse_object(file.readline())
        if row is None:
            raise UsageError(f"{data}: its first line is no JSON object")
        keys = list(row)
    found = []
    for name, usual in zip(("question", "answer"), _COLUMNS, strict=True):
        given = getattr(arguments, name) or next((each for each in usual if each in keys), usual[0])
        if keys and given not in keys:
            raise UsageError(f"{data} has no column {given}, but {', '.join(keys)}: give --{name} COLUMN")
        found.append(given)
    return found[0], found[1]


def _lengths(model: dict[str, Any]) -> tuple[int, int]:
    """Return the tokens of a prompt and of a completion: 256 and 512, or what fits the model's positions."""
    positions = model.get("max_position_embeddings")
    if not isinstance(positions, int) or positions >= 768:
        return 256, 512
    return positions // 3, positions - positions // 3


def _reward(given: str) -> str:
    file, _, name = given.rpartition(":") if ".py:" in given else (given, "", "")
    if not file.endswith(".py"):
        return given
    path = _existing(file)
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is no Python: {error}") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if name not in functions:
        raise UsageError(f"{given} names no function: write {file}:NAME, with one of {', '.join(functions)}")
    return f"{path}:{name}"


def _gpus(cluster: str) -> str:
    from r1hpc.config.assets import cluster_profiles
    from r1hpc.config.load import profile_layer

    if cluster == _NO_CLUSTER:
        return "0"
    known = profile_layer(cluster) if cluster in cluster_profiles() else None
    return str((known and known[1]["cluster"].get("gpus_per_node")) or 4)


def _write_profile(path: Path, arguments: Namespace, gpus: int) -> None:
    from r1hpc.preflight.profile import write_profile

    answers: dict[str, Any] = {"name": path.stem, "gpus_per_node": gpus, "python": sys.executable}
    for name in ("partition", "account"):
        given = getattr(arguments, name)
        answers[name] = _ask(f"{name.capitalize()}, empty for Slurm's default") if given is None else given
    write_profile(path, {key: value for key, value in answers.items() if value})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    run_command(main)
