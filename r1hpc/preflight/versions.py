"""Check that installed versions fit one another and the NVIDIA driver, without importing torch.

`ask_versions` runs this file in the interpreter of the jobs, if that is another one.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r1hpc.base.package import how_to_install
from r1hpc.preflight.findings import SiteFinding, fail, ok, unknown, warn

_WATCHED = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "peft", "vllm", "r1hpc")
_REQUIRED = ("torch", "deepspeed", "transformers", "submitit", "omegaconf", "zarr")
_TIMEOUT_S = 60.0
_VERSION_PY = re.compile(r"^cuda\b[^=]*=\s*'([\d.]+)'", re.MULTILINE)

# CUDA Compatibility guide, "Minor Version Compatibility": the oldest driver of each major version, on Linux.
_OLDEST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


@dataclass(frozen=True)
class VersionFacts:
    """Installed versions. None: not installed, or not stated."""

    python: str
    executable: str
    packages: dict[str, str] = field(default_factory=dict)
    """Installed version by distribution, for those that training needs."""
    clashes: Sequence[str] = ()
    """Their requirements that are not met, a sentence each."""
    torch_cuda: str | None = None
    """The CUDA version torch was built for; None for a CPU build."""
    toolkit_cuda: str | None = None
    """Version of the CUDA toolkit in CUDA_HOME, with which DeepSpeed compiles its operators."""
    foreign_nccl: str | None = None
    """A libnccl that is loaded before torch's own."""
    no_answer: str | None = None
    """Why this interpreter could not be asked; all else is empty then."""


def collect_versions(environ: Mapping[str, str] = os.environ) -> VersionFacts:
    """Inspect the packages of this interpreter, and CUDA_HOME, LD_PRELOAD and LD_LIBRARY_PATH."""
    installed = {name: v for name in (*_WATCHED, *_REQUIRED) if (v := _installed(name)) is not None}
    return VersionFacts(
        python=platform.python_version(),
        executable=sys.executable,
        packages=installed,
        clashes=tuple(clash for name in _WATCHED if name in installed for clash in _unmet(name)),
        torch_cuda=_cuda_of_torch(),
        toolkit_cuda=_cuda_of_toolkit(environ),
        foreign_nccl=_foreign_nccl(environ),
    )


def ask_versions(python: str, setup: bool = False) -> VersionFacts:
    """Ask another interpreter: `-m r1hpc.preflight.versions`, with nothing of this environment but r1hpc.

    `python` are the words that start it. With `setup`, lines of the profile run before it in a job, so PATH
    here says nothing about a bare name.
    """
    words = python.split()
    if setup and "/" not in words[0]:
        return VersionFacts("", python, no_answer="the lines of cluster.setup decide which one that is")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "r1hpc").symlink_to(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        environ = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [*words, "-m", __name__]
        try:
            done = subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
            return VersionFacts(**json.loads(done.stdout))
        except (OSError, subprocess.SubprocessError) as error:
            why = str(error)
        except (ValueError, TypeError, KeyError):
            why = (done.stderr.strip().splitlines() or ["it printed no versions"])[-1]
    return VersionFacts("", python, no_answer=why)


def judge_versions(facts: VersionFacts, driver: str | None, num_gpus: int | None) -> list[SiteFinding]:
    """Check packages against one another, torch's CUDA against driver and toolkit, and NCCL.

    Args:
        driver: NVIDIA's version on the node; None if there is none.
        num_gpus: GPUs seen on the node; None: unknown, as on a login node.
    """
    if facts.no_answer is not None:
        fix = "look on the nodes with --nodes, inside an allocation; or correct `python` in the profile"
        return [unknown("packages", f"{facts.executable} cannot be asked here: {facts.no_answer}", fix)]
    found = [_judge_packages(facts)]
    if "torch" in facts.packages:
        found.append(_judge_cuda(facts, driver, num_gpus))
    if facts.toolkit_cuda is not None and facts.torch_cuda is not None:
        detail = f"CUDA toolkit {facts.toolkit_cuda}, torch built for CUDA {facts.torch_cuda}"
        major = facts.torch_cuda.split(".")[0]
        if facts.toolkit_cuda.split(".")[0] == major:
            found.append(ok("CUDA toolkit", detail))
        else:  # DeepSpeed refuses to compile then (op_builder/builder.py)
            fix = f"module load a CUDA {major} toolkit (profile key `setup`): DeepSpeed compiles with it"
            found.append(warn("CUDA toolkit", detail, fix))
    if facts.foreign_nccl is not None:
        detail = f"{facts.foreign_nccl} is loaded in place of the NCCL that torch was tested with"
        fix = "unload that module, or take it out of LD_LIBRARY_PATH and LD_PRELOAD"
        found.append(warn("NCCL", detail, fix))
    return found


def _judge_packages(facts: VersionFacts) -> SiteFinding:
    missing = [name for name in _REQUIRED if name not in facts.packages]
    if missing:
        fix = (
            f"{how_to_install('torch')} in its environment, or name the nodes' interpreter that has them "
            "(profile key `python`)"
        )
        return fail("packages", f"{facts.executable} lacks {', '.join(missing)}", fix)
    if facts.clashes:
        fix = "pip install -U the named packages until pip check reports nothing"
        return fail("packages", "; ".join(facts.clashes), fix)
    shown = ", ".join(f"{name} {facts.packages[name]}" for name in _WATCHED if name in facts.packages)
    return ok("packages", f"{facts.executable}: python {facts.python}, {shown}: requirements are met")


def _judge_cuda(facts: VersionFacts, driver: str | None, num_gpus: int | None) -> SiteFinding:
    check, cuda = "torch and driver", facts.torch_cuda
    if cuda is None:
        if num_gpus:
            detail = f"torch {facts.packages['torch']} is a CPU build, and the node has {num_gpus} GPUs"
            return fail(check, detail, "install the CUDA build of torch (https://pytorch.org/get-started)")
        return ok(check, "torch is a CPU build, and no GPU is asked of it here")
    if driver is None:
        return unknown(check, f"torch is built for CUDA {cuda}; no driver here to compare")
    oldest = _OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    version = tuple(int(part) for part in re.findall(r"\d+", driver)[:3])
    if oldest is None or not version:
        return unknown(check, f"torch for CUDA {cuda}, driver {driver}: no rule for these")
    if version < oldest:
        needed = ".".join(map(str, oldest))
        detail = f"driver {driver} is too old for torch's CUDA {cuda}, which needs {needed}"
        return fail(check, detail, "install a torch built for an older CUDA, or ask for a newer driver")
    return ok(check, f"driver {driver} serves torch's CUDA {cuda}")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet(name: str) -> list[str]:
    """Return requirements of a distribution that the installed packages do not meet; extras left out."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # packaging comes with DeepSpeed and transformers
        return []
    found = []
    for text in importlib.metadata.requires(name) or ():
        try:
            needed = Requirement(text)
        except InvalidRequirement:
            continue
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _installed(needed.name)
        if version is None:
            found.append(f"{name} needs {needed.name}{needed.specifier}, which is not installed")
        elif not needed.specifier.contains(version, prereleases=True):
            found.append(f"{name} needs {needed.name}{needed.specifier}, and {version} is installed")
    return found


def _cuda_of_torch() -> str | None:
    """Read the version from torch/version.py as text: importing torch takes seconds and gigabytes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        found = _VERSION_PY.search((Path(spec.submodule_search_locations[0]) / "version.py").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _cuda_of_toolkit(environ: Mapping[str, str]) -> str | None:
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if not home:
        return None
    try:
        return str(json.loads((Path(home) / "version.json").read_text())["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _foreign_nccl(environ: Mapping[str, str]) -> str | None:
    preloaded = re.findall(r"[^\s:]*libnccl[^\s:]*", environ.get("LD_PRELOAD", ""))
    folders = [Path(part) for part in environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    in_path = [str(folder / "libnccl.so.2") for folder in folders if (folder / "libnccl.so.2").exists()]
    return next(iter([*preloaded, *(path for path in in_path if "site-packages" not in path)]), None)


if __name__ == "__main__":
    print(json.dumps(asdict(collect_versions())))
