"""Which cards a run gets: the type that it asks Slurm for, or the one that its cluster has.

gpu_type_of(config)       # "h100" of `--gpus-per-node h100:8`; else cluster.gpu_type
"""

from r1hpc.config.schema import RunConfig
from r1hpc.plan.hardware import Gpu, UnknownGpuError, find_gpu, is_named, is_slice


def gpu_type_of(config: RunConfig) -> str | None:
    """What memory and hours are planned for; None: nobody says.

    resources.gpu_type goes before cluster.gpu_type where it is the name of a card, or of a slice of one, and
    another one than the cluster's: sites give cards names of their own too.
    """
    asked, usual = config.resources.gpu_type, config.cluster.gpu_type
    if asked is None or not (is_slice(asked) or _card(asked)):
        return usual
    card = _card(usual)
    # The cluster's own may say more of the same card: its memory.
    return usual if card is not None and is_named(card, asked) else asked


def other_card(config: RunConfig) -> list[str]:
    """A note where a run asks Slurm for another card than the cluster is said to have."""
    found, usual = gpu_type_of(config), config.cluster.gpu_type
    if usual is None or found == usual:
        return []
    return [
        f"memory and hours are planned for {found}, which resources.gpu_type asks Slurm for; "
        f"cluster.gpu_type says {usual}"
    ]


def _card(name: str | None) -> Gpu | None:
    try:
        return find_gpu(name) if name else None
    except UnknownGpuError:
        return None
