"""The toolkit asks a workload what it does, not what its stage is called; this reads strings too."""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.attempt.workload import Workload
from r1hpc.config import stages
from r1hpc.config.load import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import STAGES, find_workload
from r1hpc.plan.run import make_plan
from tests.test_imports import PACKAGE, TOOLKIT, WORKLOADS

_ALLOWED = {"config/stages.py"}
"""The registry."""

_LEFT = {
    "attempt/state/unended.py": 1,
    "config/paths.py": 2,
    "config/schema/run.py": 8,
    "plan/hours/estimate_run.py": 2,
    "plan/topology/parts.py": 3,
    "preflight/run_all.py": 1,
    "slurm/defaults.py": 1,
    "submission/chain_steps.py": 5,
    "submission/text.py": 3,
    "telemetry/diagnosis/evidence.py": 1,
}
"""Comparisons with stage names that are still to go. Take a number down where you remove one; add none."""

_MODULES_LEFT = {"attempt/__init__.py": {"r1hpc.client.run"}}
"""Modules of workloads that the toolkit still names in a string."""


def _stage_names(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each stage name that is compared, looked for, or matched."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and part.value in STAGES and _is_about_a_stage(node):
                    yield part.lineno
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
            if node.value.value in STAGES:
                yield node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Tuple | ast.Set):
            words = [part.value for part in node.value.elts if isinstance(part, ast.Constant)]
            if words and set(words) <= set(STAGES):  # a list of stages to compare with
                yield node.lineno


def _is_about_a_stage(node: ast.Compare) -> bool:
    return "stage" in ast.unparse(node)


def _modules_named(tree: ast.AST) -> Iterator[str]:
    """Yield modules of workloads in strings and in imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.partition(":")[0]]
        dotted = [name for name in names if name.startswith("r1hpc.")]
        yield from (name for name in dotted if name.split(".")[1] in WORKLOADS)


def _toolkit_files() -> Iterator[tuple[str, ast.Module]]:
    for package in TOOLKIT:
        for path in sorted(Path(PACKAGE, package).rglob("*.py")):
            name = path.relative_to(PACKAGE).as_posix()
            if name not in _ALLOWED:
                yield name, ast.parse(path.read_text())


def test_the_toolkit_compares_no_stage_names_but_those_that_are_left() -> None:
    found = Counter({name: len(list(_stage_names(tree))) for name, tree in _toolkit_files()})
    assert {name: number for name, number in found.items() if number} == _LEFT


def test_the_toolkit_names_no_module_of_a_workload() -> None:
    found = {name: set(_modules_named(tree)) for name, tree in _toolkit_files()}
    assert {name: modules for name, modules in found.items() if modules} == _MODULES_LEFT


def test_the_walk_sees_what_it_should() -> None:
    source = (
        'if config.stage == "rl": pass\n'
        'if stage in ("sft", "pretrain"): pass\n'
        '_MINE = ("traces", "evaluate")\n'
        "match stage:\n"
        '    case "serve": pass\n'
        'if algorithm == "grpo": pass\n'
        "def f():\n    from r1hpc.train import rank\n"
        'g = "r1hpc.client.run"\n'
    )
    tree = ast.parse(source)
    assert sorted(_stage_names(tree)) == [1, 2, 2, 3, 5]
    assert set(_modules_named(tree)) == {"r1hpc.train.rank", "r1hpc.client.run"}


class _Training(Workload):
    """A stage of another package that trains a model by our sections."""

    counts, trains, loads_model = "steps", True, True

    def steps(self, config: RunConfig) -> int:
        return config.train.num_steps


class _Parts(Workload):
    """A stage of another package that writes parts."""

    counts = "parts"


_NINTH = {"training": _Training(), "parts": _Parts()}


@pytest.mark.parametrize(("ninth", "ours"), [("training", "pretrain"), ("parts", "traces")])
def test_a_stage_of_another_package_is_planned_as_ours(
    monkeypatch: pytest.MonkeyPatch, ninth: str, ours: str
) -> None:
    monkeypatch.setattr(stages, "find_workload", lambda name: _NINTH.get(name) or find_workload(name))
    monkeypatch.setattr("r1hpc.plan.run.find_workload", stages.find_workload)
    job = load("smoke", [f"stage={ours}", "generate.num_items=100", "train.global_batch_size=32"])
    expected = make_plan(job, gpus_per_node=8, vocab_size=512, time_limit_s=3600)
    plan = make_plan(replace(job, stage=ninth), gpus_per_node=8, vocab_size=512, time_limit_s=3600)
    assert plan == expected
    assert plan.num_steps > 1
