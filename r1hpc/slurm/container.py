"""How ranks are started inside a container: by Apptainer or Singularity, or by Pyxis, a plugin of srun.

    rank_words(container, binds=["/scratch/runs"], has_gpus=True)
        # ["apptainer", "exec", "--nv", "--bind", "/scratch/runs", "image.sif", "python3"]
    step_words(container, binds=["/scratch/runs"])       # Pyxis: --container-image=... for srun

Only the ranks run in it. The begin and the end of an attempt call scontrol and sacct, which an image does not
have: they run on the host, with cluster.python or the python that submits.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from r1hpc.config.cluster import ContainerConfig
from r1hpc.config.question_paths import files_in
from r1hpc.config.schema import RunConfig


def rank_words(container: ContainerConfig, binds: Sequence[str], has_gpus: bool) -> list[str]:
    """What stands before `-m r1hpc.launch rank`; empty where ranks run on the host."""
    if container.image is None:
        return []
    if container.runtime == "pyxis":
        return [container.python]
    gpus = ["--nv"] if has_gpus else []
    bind = ["--bind", ",".join(binds)]
    return [
        *(container.runtime, "exec", *gpus, *bind, *container.options),
        *(container.image, container.python),
    ]


def step_words(container: ContainerConfig, binds: Sequence[str]) -> list[str]:
    """Options of srun that Pyxis reads; empty without it."""
    if container.image is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
    return [f"--container-image={container.image}", f"--container-mounts={mounts}", *container.options]


def binds_of(config: RunConfig, run_root: Path) -> list[str]:
    """The folders the ranks need, then those of the profile: run root (with its datasets), data, models, and
    where questions lie."""
    models = (config.model.path, config.model.tokenizer, config.rl.teacher)
    needed: Iterable[str | None] = (
        *(str(run_root), config.data.path, *models),
        *(folder for model in models for folder in _linked_to(model)),
        *(_folder_of(path) for path in (*files_in(config), *config.evaluate.trained_on)),
    )
    folders = [name for name in needed if name is not None and name.startswith("/")]
    return list(dict.fromkeys([*folders, *config.cluster.container.binds]))


def _folder_of(path: str) -> str:
    """Itself, or of a file or a pattern the folder it lies in."""
    return path if Path(path).is_dir() else str(Path(path).parent)


def _linked_to(model: str | None) -> list[str]:
    """Where the files of a model's folder lie: those of the Hub's cache are links."""
    if model is None or not Path(model).is_dir():
        return []
    return sorted({str(file.resolve().parent) for file in Path(model).iterdir() if file.is_symlink()})
