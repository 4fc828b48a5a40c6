"""Parse a script and the local modules it imports, and resolve names through their imports. For look.py.

for module in modules_of(Path("train.py"), Path(".")):
    module.uses         # (node, full name): `import transformers as hf; hf.Trainer` is transformers.Trainer
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from r1hpc.base.errors import UsageError

_MOST_FILES = 200


class Module:
    """The script, or a local module."""

    def __init__(self, path: Path, root: Path) -> None:
        """Raise OSError, or SyntaxError or ValueError."""
        self.path, self.text = path, path.read_bytes()
        inside = path.is_relative_to(root)
        self.name = str(path.relative_to(root)) if inside else path.name
        self.tree = ast.parse(self.text, str(path))
        package = path.relative_to(root).parts[:-1] if inside else ()
        self.imports: dict[str, str] = {}
        """Name in this module -> full name, `module` or `module.name`."""
        self.wanted: set[str] = set()
        """Full names of everything that is imported."""
        nodes = list(ast.walk(self.tree))
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    self.imports[alias.asname or top] = alias.name if alias.asname else top
                    self.wanted.add(alias.name)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                start = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    full = f"{start}.{alias.name}" if start else alias.name
                    self.imports[alias.asname or alias.name] = full
                    self.wanted.add(full)
        self.packages = {name.partition(".")[0] for name in self.wanted}
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    @property
    def uses(self) -> Iterator[tuple[ast.expr, str]]:
        """Yield each name that is read, with its full name."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                yield node, self.name_of(node)

    def name_of(self, node: ast.AST) -> str:
        """Return the full name of an expression; of a call's attribute its end alone."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.name_of(node.value)}.{node.attr}"
        if isinstance(node, ast.Subscript):  # Trainer[Config]
            return self.name_of(node.value)
        return ""

    def at(self, node: ast.AST) -> str:
        return f"{self.name}, line {getattr(node, 'lineno', 0)}"


def modules_of(script: Path, root: Path) -> Iterator[Module]:
    """Yield the script and what it imports from `root`; such a module may have a syntax error."""
    waiting, seen = [script], {script}
    while waiting:
        path = waiting.pop()
        try:
            module = Module(path, root)
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
        for name in sorted(module.wanted):
            for file in _files_of(name, {root, script.parent}):
                if file not in seen and len(seen) < _MOST_FILES:
                    seen.add(file)
                    waiting.append(file)


def _files_of(name: str, roots: set[Path]) -> Iterator[Path]:
    """Yield the files that an import of a.b.c reads: the packages a and a.b, and the module c."""
    parts = name.split(".")
    for root in sorted(roots):
        for number in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:number])
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


@functools.cache
def installed_class(name: str) -> tuple[Module, ast.ClassDef] | None:
    """Return the class `package.….Name` of an installed package and its module; None if it is not found.

    Nothing is imported: the package's files are searched for the class of this name.
    """
    top, short = name.partition(".")[0], name.rpartition(".")[2]
    pattern = re.compile(rb"^class %s\b" % short.encode(), re.MULTILINE)
    for root in (Path(each) for each in sys.path if each):
        if not (root / top / "__init__.py").is_file():
            continue
        named = list(_files_of(name, {root}))[::-1]  # another file may define a class of the same name
        for file in [*named, *sorted((root / top).rglob("*.py"))]:
            try:
                if pattern.search(file.read_bytes()):
                    module = Module(file, root)
                    return module, module.classes[short]
            except (OSError, SyntaxError, ValueError, KeyError):
                continue
    return None
