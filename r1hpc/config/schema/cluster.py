"""Define Slurm resources, the ranks' container, and a site's profile (configs/cluster/<name>.yaml)."""

from dataclasses import dataclass, field

from r1hpc.base.units import parse_time
from r1hpc.config.schema.ranges import ranged


@dataclass(frozen=True)
class ResourcesConfig:
    """Slurm resources, named like sbatch's options. `None` takes the cluster profile's value."""

    nodes: int = ranged(1, least=1)
    """sbatch --nodes."""
    gpus_per_node: int | None = ranged(None, least=0)
    """GPUs per node, one rank each. 0: a CPU run with `ranks_per_node`. None: the profile's, then probed."""
    gpu_type: str | None = None
    """Slurm's name for the GPU type (sinfo -o %G), as in sbatch --gpus-per-node=a100:4. If it is a card's
    name, memory and hours are planned for that card. None: any."""
    ranks_per_node: int = ranged(1, least=1)
    """Ranks per node of a CPU run."""
    time: str | None = ranged(None, above=0, measure=parse_time)
    """Slurm's notation, D-HH:MM:SS. None: the partition's limit."""
    job_name: str | None = None
    """sbatch --job-name. None: the name of the run."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    cpus_per_task: int | None = ranged(None, least=1)
    """sbatch --cpus-per-task: cores of a rank."""
    mem: str | None = None
    """sbatch --mem, per node; 0: all of it."""
    constraint: str | None = None
    """sbatch --constraint."""
    exclude: str | None = None
    """sbatch --exclude: nodes to avoid."""
    nodelist: str | None = None
    """sbatch --nodelist: nodes to use."""
    dependency: str | None = None
    """sbatch --dependency."""
    reservation: str | None = None
    """sbatch --reservation."""
    comment: str | None = None
    """sbatch --comment."""
    mail_type: str | None = None
    """sbatch --mail-type."""
    mail_user: str | None = None
    """sbatch --mail-user."""
    exclusive: bool = False
    """sbatch --exclusive: whole nodes."""
    signal_lead_s: int | None = ranged(None, least=1)
    """Seconds before the time limit at which the run is warned. None: from the expected save time."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Any other sbatch option, by its long name without dashes; an empty value is a bare flag."""


@dataclass(frozen=True)
class ContainerConfig:
    """The container image of the ranks. The job itself runs on the host, which has Slurm's commands."""

    image: str | None = None
    """A .sif file, or what the runtime takes: docker://…; with pyxis nvcr.io#nvidia/pytorch:25.01-py3."""
    runtime: str = ranged("apptainer", choices=("apptainer", "singularity", "pyxis"))
    """The program that starts it. On GPUs the first two get --nv."""
    python: str = "python3"
    """The interpreter in the image, with r1hpc's dependencies; r1hpc's code comes from the run folder."""
    binds: list[str] = field(default_factory=list)
    """Folders that the ranks see beside the run root, data.path and model.path: DIR or FROM:TO."""
    options: list[str] = field(default_factory=list)
    """Further words for `apptainer exec`, or for srun with pyxis."""


@dataclass(frozen=True)
class ClusterConfig:
    """A site's values, from configs/cluster/<name>.yaml. Missing ones are probed."""

    name: str = "default"
    """A label of the profile, for people."""
    partition: str | None = None
    """Default of resources.partition."""
    account: str | None = None
    """Default of resources.account."""
    qos: str | None = None
    """Default of resources.qos."""
    gpus_per_node: int | None = ranged(None, least=0)
    """Default of resources.gpus_per_node."""
    gpu_type: str | None = None
    """The GPU with its memory, for example a100-40gb: used to plan memory and hours unless resources.gpu_type
    names another card, and for MFU. None: plans for an 80 GB A100; MFU asks the GPU itself."""
    cpus_per_task: int | None = ranged(None, least=1)
    """Default of resources.cpus_per_task."""
    mem: str | None = None
    """Default of resources.mem."""
    network_interface: str | None = None
    """For NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME. None: the interface that leads to rank 0."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run first in the job: `module load …`, `source …/activate`. They run as shell code and
    come only from a profile file you wrote, never from a flag."""
    python: str | None = None
    """The interpreter on the nodes, or words that start one (uv run python). None: the submitting one."""
    container: ContainerConfig = ContainerConfig()
    cpu_bind: str | None = None
    """srun --cpu-bind: cores, sockets, none … None: Slurm's own."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to the job."""
    trust_shared_run_root: bool = False
    """Accept a run root below folders that another user owns or a group may write, such as a project folder.
    These users could replace your runs and so run code as you. Folders that every user may write stay
    refused unless they have the sticky bit."""
