"""Find what a resume cannot reproduce in a script, by its source. look.py calls it.

traps_in(modules)       # ["train.py, line 12: …", …]
"""

import ast
from collections.abc import Iterator, Sequence

from r1hpc.script.modules import Module

_LOADERS = ("DataLoader", "TrainingArguments", "SFTConfig", "GRPOConfig")
_RANDOM = {"random", "numpy", "torchvision", "albumentations"}
_ENTROPY = ("random.Random", "random.SystemRandom")
_POSITIONS = ("iter", "itertools.cycle", "itertools.count", "itertools.chain")
_KEEPERS = ("Callback", "Collator", "Sampler", "LightningModule", "Trainer")
"""Ends of the names of classes whose objects live as long as the training."""
_CHANGES = ("append", "add", "update", "extend", "pop", "setdefault", "clear", "insert", "remove")


def traps_in(modules: Sequence[Module]) -> list[str]:
    """Return a note for each trap, with its file and line."""
    notes: list[str] = []
    for module in modules:
        notes += [*_in_calls(module), *_in_data_sets(module), *_in_randomness(module)]
        for owner in module.classes.values():
            bases = [module.name_of(base) for base in owner.bases]
            if any(name.endswith(_KEEPERS) for name in (*bases, owner.name)):
                notes += [*_globals_changed(module, owner), *_positions_held(module, owner)]
    return list(dict.fromkeys(notes))


def _in_calls(module: Module) -> Iterator[str]:
    """Note what a resume cannot reproduce, and handlers that would answer a preemption in place of r1hpc."""
    for call in module.calls:
        name = ast.unparse(call.func).rpartition(".")[2]
        words = {each.arg: ast.unparse(each.value) for each in call.keywords}
        where = module.at(call)
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


def _in_data_sets(module: Module) -> Iterator[str]:
    if {"lightning", "pytorch_lightning"} & module.packages:
        return
    for node in ast.walk(module.tree):
        if not (isinstance(node, ast.FunctionDef) and node.name == "__getitem__"):
            continue
        source = ast.unparse(node)
        if "rand" in source and not any(by in source for by in ("generator=", "seed", "default_rng")):
            yield (
                f"{module.at(node)}: random numbers that a data set draws are not resumed to "
                "the bit; draw them by the item's index"
            )


def _in_randomness(module: Module) -> Iterator[str]:
    """Note generators that begin from the machine's entropy; client/start.py seeds the others."""
    for call in module.calls:
        name = module.name_of(call.func)
        is_seeded = name != "random.SystemRandom" and (call.args or call.keywords)
        if name in _ENTROPY and not is_seeded:
            yield f"{module.at(call)}: {name}() differs in each attempt: random.Random(SEED) does not"


def _globals_changed(module: Module, owner: ast.ClassDef) -> Iterator[str]:
    """Note variables of the module that a method changes: no checkpoint holds them."""
    targets = [node.targets for node in module.tree.body if isinstance(node, ast.Assign)]
    names = {each.id for group in targets for each in group if isinstance(each, ast.Name)}
    for node in ast.walk(owner):
        changed: list[str] = []
        if isinstance(node, ast.Global):
            changed = node.names
        elif isinstance(node, ast.Assign | ast.AugAssign):
            parts = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = [part.value for part in parts if isinstance(part, ast.Subscript | ast.Attribute)]
            changed = [each.id for each in inner if isinstance(each, ast.Name) and each.id in names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            value = node.func.value
            if node.func.attr in _CHANGES and isinstance(value, ast.Name) and value.id in names:
                changed = [value.id]
        for name in changed:
            yield (
                f"{module.at(node)}: {owner.name} changes the global {name}, which no checkpoint holds: make "
                f"it an attribute, self.{name.lower()}"
            )


def _positions_held(module: Module, owner: ast.ClassDef) -> Iterator[str]:
    """Note iterators kept as attributes: their position is inside an object of C."""
    for node in ast.walk(owner):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        is_call = isinstance(node.value, ast.Call) and module.name_of(node.value.func) in _POSITIONS
        if is_call or isinstance(node.value, ast.GeneratorExp):
            yield (
                f"{module.at(node)}: {ast.unparse(node.targets[0])} is an iterator, whose position no "
                "checkpoint holds: keep a number, and begin from it"
            )
