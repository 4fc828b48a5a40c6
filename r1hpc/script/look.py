"""Look at a script without running it: which library leads its training, what a resume cannot reproduce.

workload.py calls it at submission and at the start of each attempt; hours.py compares the digest.

found = look_at(Path("train.py"))
found.library       # "transformers", "lightning", "accelerate", "r1hpc" (its client); empty: none of these
found.doubts        # reasons not to promise that r1hpc leads the loop, each with file and line
"""

import ast
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.script.modules import Module, installed_class, modules_of
from r1hpc.script.traps import traps_in

_TRAINERS = {"transformers.Trainer", "transformers.Seq2SeqTrainer"}
_FITS = {
    f"{top}.{name}" for top in ("lightning", "pytorch_lightning") for name in ("Trainer", "LightningCLI")
}
_CHILDREN = ("spawn", "start_processes", "notebook_launcher", "elastic_launch", "debug_launcher")
"""Functions that train in processes of their own, where r1hpc is not."""
_MOST_BASES = 8
_ORDER = ("r1hpc", "lightning", "transformers", "accelerate")


@dataclass
class Look:
    """Training loop and traps of the script and the local modules that it imports."""

    library: str = ""
    """The library that r1hpc attaches to, or "r1hpc" if the script uses its client; empty: none."""
    doubts: list[str] = field(default_factory=list)
    """Why r1hpc may not lead this training though the library is used."""
    notes: list[str] = field(default_factory=list)
    saves_alone: str = ""
    """File and line of a save_state that only the main process calls."""
    joins_ranks: str = ""
    """File and line of a call of init_process_group."""
    digest: str = ""
    """SHA-256 over the script and the local modules that it imports."""


def digest_file(run: RunDir) -> Path:
    """Return the file with the digest of the run's script."""
    return run.path / "script.json"


def look_at(script: Path, root: Path | None = None) -> Look:
    """Read a Python script and the local modules and packages that it imports.

    `root` is where imports begin; None: the script's folder. For `-m pkg.train` the working folder. Raise
    UsageError for a syntax error in the script.
    """
    modules = list(modules_of(script, root or script.parent))
    digest = hashlib.sha256()
    for module in modules:
        digest.update(module.text)
    libraries, doubts = _libraries(modules)
    found = Look(doubts=doubts, digest=digest.hexdigest(), notes=traps_in(modules))
    found.library = next((name for name in _ORDER if name in libraries), "")
    found.saves_alone = next(filter(None, map(_saves_alone, modules)), "")
    for module in modules:
        for call in module.calls:
            name = module.name_of(call.func).rpartition(".")[2]
            if name in _CHILDREN and found.library not in ("", "r1hpc"):
                found.doubts.append(f"{module.at(call)}: {name} trains in processes of its own")
            if name == "init_process_group":
                found.joins_ranks = found.joins_ranks or module.at(call)
    return found


def _libraries(modules: list[Module]) -> tuple[set[str], list[str]]:
    """Return the libraries that train in these modules, and the doubts about them."""
    libraries, doubts, fits = set[str](), list[str](), False
    local = {name for module in modules for name in module.classes}
    for module in modules:
        for node, name in module.uses:
            short = name.rpartition(".")[2]
            if name.startswith("r1hpc.") and short == "attempt":
                libraries.add("r1hpc")
            fits = fits or short in ("fit", "LightningCLI")
            if _short(name) in _FITS:
                libraries.add("lightning")
            elif short == "save_state":
                libraries.add("accelerate")
            elif short not in local and "." in name and "Trainer" in short and short[0].isupper():
                is_trainer, doubt = _trainer(name)
                libraries |= {"transformers"} if is_trainer else set()
                doubts += [f"{module.at(node)}: {doubt}"] if doubt else []
        for owner in module.classes.values():
            bases = {_short(module.name_of(base)) for base in owner.bases}
            trains = _own_train(owner)
            if trains is not None and any(base.endswith("Trainer") for base in bases - _FITS):
                doubts.append(f"{module.at(trains)}: {owner.name} has a train() of its own")
    if not fits:
        libraries.discard("lightning")  # seed_everything alone, Fabric
    return libraries, list(dict.fromkeys(doubts))


def _own_train(owner: ast.ClassDef) -> ast.AST | None:
    """Return the class's method `train`, unless it calls that of its base."""
    method = next((each for each in owner.body if getattr(each, "name", "") == "train"), None)
    return None if method is None or "super().train(" in ast.unparse(method) else method


def _short(name: str) -> str:
    """Return package.Class for package.inner.module.Class."""
    return f"{name.partition('.')[0]}.{name.rpartition('.')[2]}"


def _trainer(name: str) -> tuple[bool, str]:
    """Return whether an imported class may be transformers' Trainer, and the doubt about it if there is one.

    Follows its base classes through the installed packages.
    """
    imported = name
    for _ in range(_MOST_BASES):
        if _short(name) in _TRAINERS:
            return True, ""
        if _short(name) in _FITS or (found := installed_class(name)) is None:
            break
        if _own_train(found[1]):
            return True, f"{name.rpartition('.')[2]} has a train() of its own"
        above = [found[0].name_of(base) for base in found[1].bases]
        following = next((base for base in above if base.endswith("Trainer")), "")
        if not following:
            break
        name = following if "." in following else f"{name.rpartition('.')[0]}.{following}"
    is_likely = imported.startswith(("trl.", "sentence_transformers."))
    return is_likely, f"{imported} cannot be read here" if is_likely else ""


def _saves_alone(module: Module) -> str:
    for node in ast.walk(module.tree):
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        if "main_process" in test and "DEEPSPEED" not in test:
            calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
            alone = [each for each in calls if ast.unparse(each.func).endswith(".save_state")]
            if alone:
                return module.at(alone[0])
    return ""
