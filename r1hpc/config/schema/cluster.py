"""What a run asks of Slurm, the image of its ranks, and what a site needs (configs/cluster/<name>.yaml)."""

from dataclasses import dataclass, field

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import parse_time
from r1hpc.config.schema.ranges import ranged


@dataclass(frozen=True)
class ResourcesConfig:
    """What is asked of Slurm, under sbatch's own names. `None` is left to the cluster profile."""

    nodes: int = ranged(1, least=1)
    """sbatch --nodes."""
    gpus_per_node: int | None = ranged(None, least=0)
    """GPUs, and so ranks, per node. 0: a CPU run with `ranks_per_node`. None: the profile's, then probed."""
    gpu_type: str | None = None
    """What Slurm calls the GPUs to be had (sinfo -o %G), as in sbatch --gpus-per-node=a100:4. Where that is
    a card's name, memory and hours are planned for it. None: any."""
    ranks_per_node: int = ranged(1, least=1)
    """Ranks per node of a CPU run."""
    time: str | None = None
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
    """sbatch --mem, of a node; 0: all of it."""
    constraint: str | None = None
    """sbatch --constraint."""
    exclude: str | None = None
    """sbatch --exclude: nodes not to be used."""
    nodelist: str | None = None
    """sbatch --nodelist: nodes to be used."""
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

    def __post_init__(self) -> None:
        if self.time is not None and parse_time(self.time) == 0:
            raise ConfigError("resources.time is 0: give a time limit such as 12:00:00")


@dataclass(frozen=True)
class ContainerConfig:
    """The image the ranks run in. The job itself begins and ends on the host, where Slurm's commands are."""

    image: str | None = None
    """A .sif file, or what the runtime takes: docker://…; with pyxis nvcr.io#nvidia/pytorch:25.01-py3."""
    runtime: str = ranged("apptainer", choices=("apptainer", "singularity", "pyxis"))
    """What starts it. On GPUs the first two are given --nv."""
    python: str = "python3"
    """The interpreter in the image, with the packages of r1hpc; its code is the run's own."""
    binds: list[str] = field(default_factory=list)
    """Folders beside the run root, data.path and model.path that the ranks see: DIR or FROM:TO."""
    options: list[str] = field(default_factory=list)
    """Further words for `apptainer exec`, or for srun with pyxis."""


@dataclass(frozen=True)
class ClusterConfig:
    """What a site needs, from configs/cluster/<name>.yaml. What it leaves out is probed."""

    name: str = "default"
    """A label of the profile, for people."""
    partition: str | None = None
    """Where resources.partition is not given."""
    account: str | None = None
    """Where resources.account is not given."""
    qos: str | None = None
    """Where resources.qos is not given."""
    gpus_per_node: int | None = ranged(None, least=0)
    """Where resources.gpus_per_node is not given."""
    gpu_type: str | None = None
    """With its memory, for example a100-40gb: what memory and hours are planned for, where
    resources.gpu_type names no other card, and MFU is of. None: an A100 of 80 GB is planned for; MFU asks the
    GPU itself."""
    cpus_per_task: int | None = ranged(None, least=1)
    """Where resources.cpus_per_task is not given."""
    mem: str | None = None
    """Where resources.mem is not given."""
    network_interface: str | None = None
    """For NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME. None: the interface that leads to rank 0."""
    network_gbit_s: float | None = ranged(None, above=0)
    """Of a node's links to the other nodes, together: the plan then says what a step's gradients take on
    them, and whether train.gradient_compression pays. None: not known."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before anything else in the job: `module load …`, `source …/activate`.
    They are shell on purpose and come only from a profile file you wrote, never from a flag."""
    python: str | None = None
    """The interpreter on the nodes, or words that start one (uv run python). None: the one that submits."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    cpu_bind: str | None = None
    """srun --cpu-bind: cores, sockets, none … None: Slurm's own."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to the job."""
    trust_shared_run_root: bool = False
    """Accept a run root below folders that another user owns or a group may write, such as a project folder.
    These users could replace your runs and so run code as you. Folders that every user may write stay
    refused unless they have the sticky bit."""
