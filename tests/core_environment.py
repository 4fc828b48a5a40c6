"""An environment with the core packages alone, as `pip install r1hpc` makes it: of links, without a download.

python = make_core_environment(tmp_path / "core")
subprocess.run([python, "-m", "r1hpc.status"])
"""

import importlib.metadata
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]


def make_core_environment(folder: Path) -> str:
    """Link what pyproject.toml's `dependencies` need, directly or not; return the interpreter."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "r1hpc.pth").write_text(f"{CHECKOUT}\n")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted, linked = [Requirement(text) for text in project["dependencies"]], set()
    while wanted:
        needed = wanted.pop()
        name = canonicalize_name(needed.name)
        if name in linked or (needed.marker is not None and not needed.marker.evaluate({"extra": ""})):
            continue
        linked.add(name)
        found = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(found.locate_file(top))))
        wanted += map(Requirement, found.requires or ())
    python, program = folder / "bin" / "python", folder / "bin" / "r1hpc"
    program.write_text(f"#!{python}\nfrom r1hpc.__main__ import main\n\nmain()\n")
    program.chmod(0o755)
    return str(python)
