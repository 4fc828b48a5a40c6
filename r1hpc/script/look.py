"""Look at a script without running it: which library trains in it, and what a resume could not reproduce.

workload.py calls it at submission and at the start of each attempt; hours.py compares the digest.

found = look_at(Path("train.py"))
found.library       # "transformers", "lightning", "accelerate", "r1hpc" (its client); empty: none of these
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir

_LIBRARIES = {
    "r1hpc": "r1hpc",
    "trl": "transformers",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "accelerate": "accelerate",
}
_TRAINERS = ("Trainer", "Seq2SeqTrainer")
_LOADERS = ("DataLoader", "TrainingArguments", "SFTConfig", "GRPOConfig")
_RANDOM = {"random", "numpy", "torchvision", "albumentations"}
_MOST_FILES = 50


@dataclass
class Look:
    """Imports and traps of the script and the modules beside it."""

    library: str = ""
    """The library that r1hpc attaches to, or "r1hpc" if the script uses its client; empty: none."""
    notes: list[str] = field(default_factory=list)
    saves_alone: str = ""
    """File and line of a save_state that only the main process calls."""
    digest: str = ""
    """SHA-256 over the script and the modules beside it that it imports."""


def digest_file(run: RunDir) -> Path:
    """Return the file with the digest of the run's script."""
    return run.path / "script.json"


def look_at(script: Path) -> Look:
    """Read a Python script and the modules of its folder that it imports.

    Raise UsageError for a syntax error in the script.
    """
    found, digest, libraries = Look(), hashlib.sha256(), set[str]()
    for module in _modules(script):
        digest.update(module.text)
        libraries |= _libraries(module)
        if b"Fabric(" in module.text:  # no fit() to attach to
            libraries.discard("lightning")
        found.saves_alone = found.saves_alone or _saves_alone(module)
        found.notes += [*_traps_in_calls(module), *_traps_in_data_sets(module)]
    order = ("r1hpc", "lightning", "transformers", "accelerate")
    found.library = next((name for name in order if name in libraries), "")
    found.digest = digest.hexdigest()
    return found


class _Module:
    """The script, or a module beside it."""

    def __init__(self, path: Path) -> None:
        """Raise OSError, or SyntaxError or ValueError."""
        self.name, self.text = path.name, path.read_bytes()
        self.tree = ast.parse(self.text, str(path))
        self.imports = _imports(self.tree)
        """Imported names, `module` or `module.name`."""
        self.packages = {name.partition(".")[0] for name in self.imports}


def _modules(script: Path) -> Iterator[_Module]:
    """Yield the script and what it imports from its folder; such a module may have a syntax error."""
    waiting, seen = [script], {script}
    while waiting and len(seen) <= _MOST_FILES:
        path = waiting.pop()
        try:
            module = _Module(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (SyntaxError, ValueError) as error:
            if path != script:
                continue
            line = getattr(error, "lineno", None)
            raise UsageError(
                f"{path}{f', line {line}' if line else ''}: {getattr(error, 'msg', error)}"
            ) from None
        yield module
        for name in sorted(module.imports):
            beside = script.parent / f"{name.partition('.')[0]}.py"
            if beside.is_file() and beside not in seen:
                seen.add(beside)
                waiting.append(beside)


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _libraries(module: _Module) -> set[str]:
    """Return the libraries that may train in this module."""
    found = {_LIBRARIES[name] for name in module.packages & _LIBRARIES.keys()}
    if any(name.startswith("transformers.") and name.endswith(_TRAINERS) for name in module.imports):
        found.add("transformers")
    return found


def _traps_in_calls(module: _Module) -> Iterator[str]:
    """Note what a resume cannot reproduce, and handlers that would answer a preemption in place of r1hpc."""
    for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        words = {each.arg: ast.unparse(each.value) for each in call.keywords}
        where = f"{module.name}, line {call.lineno}"
        if name == "SLURMEnvironment" and words.get("auto_requeue") != "False":
            yield f"{where}: Lightning requeues too: take SLURMEnvironment out"
        workers = words.get("num_workers", words.get("dataloader_num_workers", "0"))
        if name in _LOADERS and workers != "0" and _RANDOM & module.packages:
            yield (
                f"{where}: random numbers drawn in workers are not resumed to the bit; draw them by the "
                "item's index"
            )
        if name == "hyperparameter_search":
            yield f"{where}: it trains many times, and a run is one training: submit a run for each trial"
        if "environment_factory" in words:
            yield f"{where}: environments are not saved: a resume inside a generation may differ"
        if name == "signal" and call.args and ast.unparse(call.args[0]).endswith(("SIGTERM", "SIGUSR2")):
            yield f"{where}: it handles {ast.unparse(call.args[0])} itself, in place of r1hpc"


def _traps_in_data_sets(module: _Module) -> Iterator[str]:
    if {"lightning", "pytorch_lightning"} & module.packages:
        return
    for node in ast.walk(module.tree):
        if not (isinstance(node, ast.FunctionDef) and node.name == "__getitem__"):
            continue
        source = ast.unparse(node)
        if "rand" in source and not any(by in source for by in ("generator=", "seed", "default_rng")):
            yield (
                f"{module.name}, line {node.lineno}: random numbers that a data set draws are not resumed to "
                "the bit; draw them by the item's index"
            )


def _saves_alone(module: _Module) -> str:
    for node in ast.walk(module.tree):
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        if "main_process" in test and "DEEPSPEED" not in test:
            calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
            alone = [each for each in calls if ast.unparse(each.func).endswith(".save_state")]
            if alone:
                return f"{module.name}, line {alone[0].lineno}"
    return ""
