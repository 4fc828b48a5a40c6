"""Freeze a user's custom code and chat template with a run, and refuse to resume if they have changed.

Custom code is `FILE.py:NAME` or `package.module:NAME`. A file is frozen with the modules beside it that it
imports, a package complete, a template alone; question files are not copied, only their digests are kept.
Custom code is imported only in a process that can be killed (tasks/sandbox/user_code.py), never here.
"""

import ast
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.names import printable
from r1hpc.config.paths import is_own, of_one_kind
from r1hpc.config.schema.run import ModelConfig

FOLDER = "plugins"
"""In a run's frozen code, beside the package."""
_INDEX = "plugins.json"
_FILES = "files.json"
_MAX_BYTES = 16 << 20
_GENERATED = (".pyc", ".pyo", "~")
_CODE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plugin:
    """One name of custom code or a template, and its files."""

    spec: str
    """As written in the configuration."""
    root: Path
    """The folder for importing `module`."""
    module: str
    """Empty for a template."""
    files: tuple[str, ...]
    """Relative to `root`, sorted."""

    @property
    def name(self) -> str:
        """The name taken from the module."""
        return self.spec.rpartition(":")[2]

    @property
    def digest(self) -> str:
        """Return a digest of the content of all files, wherever they are."""
        total = hashlib.sha256()
        for name in self.files:
            content = hashlib.sha256((self.root / name).read_bytes()).hexdigest()
            total.update(f"{name}\0{content}\n".encode())
        return total.hexdigest()[:16]


def template_file(model: ModelConfig, code: Path | None = None) -> Path:
    """Return the user's chat template: the run's copy if there is one, like `locate`."""
    plugin = locate(model.chat_template, code)
    return plugin.root / plugin.files[0]


def find(spec: str) -> Plugin:
    """Return the current files of a name; raise ConfigError if there are none or it cannot be imported."""
    target, _, attribute = spec.rpartition(":")
    if not is_own(spec) or (Path(spec).is_absolute() and not target.endswith(".py")):
        template = Path(spec).absolute()
        if not template.is_file():
            raise ConfigError(
                f"model.chat_template: there is no file {printable(str(template))}; give a Jinja file, auto "
                "or none"
            )
        return Plugin(spec, template.parent, "", (template.name,))
    if not attribute.isidentifier():
        raise ConfigError(f"{printable(spec)}: the part after the colon is not a Python name")
    if target.endswith(".py"):
        path = Path(target).absolute()
        if not path.is_file():
            raise ConfigError(f"{printable(spec)}: there is no file {printable(str(path))}")
        return _checked(Plugin(spec, path.parent, path.stem, _with_imports(path.parent, path.name)))
    if not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(
            f"{printable(spec)} is neither FILE.py:NAME nor package.module:NAME: mend the name of the code"
        )
    return _checked(_find_module(spec, target))


def locate(spec: str, code: Path | None = None) -> Plugin:
    """Return the verified frozen copy in `code`/plugins; if nothing is frozen, the current files.

    Without `code` it looks beside this package, which in a job is the frozen code. Raise ConfigError like
    `find`, or if the copy was changed.
    """
    folder = (code or _CODE) / FOLDER
    entry = _index(folder).get(spec)
    if entry is None:
        return find(spec)
    plugin = Plugin(spec, folder / entry["digest"], entry["module"], tuple(entry["files"]))
    if not all((plugin.root / name).is_file() for name in plugin.files) or plugin.digest != entry["digest"]:
        raise ConfigError(
            f"{printable(spec)}: the run's own copy in {plugin.root} is not what it was frozen as: put it "
            "back, or begin a new run (--run-name)"
        )
    return plugin


def freeze_plugins(specs: Iterable[str], code: Path, copy: Callable[[str, str], object]) -> None:
    """Copy the files of each name into `code`/plugins/<digest>/, with an index by name."""
    index: dict[str, Any] = {}
    for plugin in map(find, specs):
        digest = plugin.digest
        for name in plugin.files:
            target = code / FOLDER / digest / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # a task and a reward may share a file
                copy(str(plugin.root / name), str(target))
        index[plugin.spec] = {"module": plugin.module, "digest": digest, "files": list(plugin.files)}
    if index:
        write_json(code / FOLDER / _INDEX, index)


def refuse_changes(specs: Iterable[str], code: Path) -> None:
    """Refuse to continue a run if its custom code changed since it was frozen (ConfigError)."""
    for spec in specs:
        entry = _index(code / FOLDER).get(spec)
        if entry is None:
            continue
        frozen = locate(spec, code)
        try:
            now = find(spec)
        except ConfigError:  # moved away: the run has its copy
            continue
        if now.digest != frozen.digest:
            changed = ", ".join(_differences(frozen, now))
            raise ConfigError(
                f"{printable(spec)} has changed since this run began with it ({changed} in {now.root}): "
                "with another content it is another run. Begin one with a new --run-name (model.path="
                "CHAIN/STAGE/model starts it from what an earlier stage left); or, to go on with "
                f"this one, put the old files back, of which the run has a copy in {frozen.root}"
            )


def freeze_files(named: Mapping[str, Sequence[Path]], code: Path) -> None:
    """Record the digests of the question files. They are not copied: they may be large."""
    found = {path: _digests(path, files) for path, files in named.items()}
    if found:
        (code / FOLDER).mkdir(mode=0o700, exist_ok=True)
        write_json(code / FOLDER / _FILES, found)


def refuse_changed_files(code: Path) -> None:
    """Refuse to continue a run if its question files changed since it was frozen (ConfigError)."""
    record = code / FOLDER / _FILES
    for path, digests in (read_json(record) if record.is_file() else {}).items():
        files = of_one_kind(Path(path))
        if files and (now := _digests(path, files)) != digests:
            what = path
            if isinstance(digests, dict) and isinstance(now, dict):
                changed = sorted(name for name in {*digests, *now} if digests.get(name) != now.get(name))
                what = f"{path} ({', '.join(changed[:3])})"
            raise ConfigError(
                f"{printable(what)} has changed since this run began with it: other questions are another "
                "run. Begin one with a new --run-name; or, to go on with this one, put the old file back"
            )


def _digests(path: str, files: Sequence[Path]) -> str | dict[str, str]:
    """Return a file's digest, or a folder's or pattern's digests by file name."""
    if list(files) == [Path(path)]:
        return _digest_of(files[0])
    return {file.name: _digest_of(file) for file in files}


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(frozen: Plugin, now: Plugin) -> Iterator[str]:
    for name in sorted({*frozen.files, *now.files}):
        both = name in frozen.files and name in now.files
        if not both or (frozen.root / name).read_bytes() != (now.root / name).read_bytes():
            yield name


class _Entry(TypedDict):
    module: str
    digest: str
    files: list[str]


def _index(folder: Path) -> Mapping[str, Any]:
    path = folder / _INDEX
    return read_json(path, dict[str, _Entry]) if path.is_file() else {}


def _checked(plugin: Plugin) -> Plugin:
    top = plugin.module.split(".")[0]
    if not top.isidentifier():
        raise ConfigError(f"{plugin.spec}: {top!r} is no name of a module: rename the file")
    if top in sys.stdlib_module_names or top == "r1hpc":
        raise ConfigError(f"{plugin.spec}: {top} is a module of Python's or ours: rename the file")
    size = sum((plugin.root / name).stat().st_size for name in plugin.files)
    if size > _MAX_BYTES:
        raise ConfigError(
            f"{plugin.spec} comes with {size >> 20} MiB of files, too many to freeze with a run (at most "
            f"{_MAX_BYTES >> 20}): put what you need of it into a FILE.py that imports the rest"
        )
    return plugin


def _find_module(spec: str, module: str) -> Plugin:
    """Find a module by its files alone: importing a parent package would run it here."""
    top, *inner = module.split(".")
    for root in dict.fromkeys([Path.cwd(), *map(Path, filter(None, sys.path))]):
        place = root.joinpath(top, *inner)
        if not any(path.is_file() for path in (place.with_suffix(".py"), place / "__init__.py")):
            continue
        if inner or (place / "__init__.py").is_file():
            return Plugin(spec, root, module, _below(root, root / top))
        return Plugin(spec, root, module, _with_imports(root, f"{top}.py"))
    raise ConfigError(
        f"{printable(spec)}: no module {module} in this folder or on Python's path; a file is named "
        "FILE.py:NAME"
    )


def _with_imports(root: Path, name: str) -> tuple[str, ...]:
    """Return a file and the modules and packages beside it that it imports, directly or indirectly.

    Leaves out r1hpc if the file is in a clone of it: a run freezes that anyway.
    """
    found, open_ = {name}, [name]
    while open_:
        for top in _imported(root / open_.pop()) - {"r1hpc"}:
            more = [f"{top}.py"] if (root / f"{top}.py").is_file() else []
            if (root / top / "__init__.py").is_file():
                more = list(_below(root, root / top))
            fresh = [each for each in more if each not in found]
            found.update(fresh)
            open_ += [each for each in fresh if each.endswith(".py")]
    return tuple(sorted(found))


def _imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports; empty if it cannot be parsed (its import will fail)."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def _below(root: Path, folder: Path) -> tuple[str, ...]:
    paths = (path.relative_to(root) for path in folder.rglob("*") if path.is_file())
    hidden = (".", "__pycache__")
    shown = (path for path in paths if not any(part.startswith(hidden) for part in path.parts))
    return tuple(sorted(str(path) for path in shown if not path.name.endswith(_GENERATED)))
