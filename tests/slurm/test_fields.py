"""No field of a job can end a line, open a quote, start an option or be expanded by a shell."""

import argparse
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.cluster import ClusterConfig, ContainerConfig, ResourcesConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm import fields, flags
from r1hpc.slurm.script import make_script, render

HOSTILE = {
    "newline": "\n",
    "carriage return": "\r",
    "semicolon": ";",
    "command substitution": "$()",
    "variable": "$HOME",
    "backtick": "`",
    "double quote": '"',
    "single quote": "'",
    "NUL": "\0",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "next line": "\x85",
    "redirection": ">",
    "backslash": "\\",
    "hash": "#",
    "escape": "\x1b",
}
GOOD = {
    "job_name": "train-1.b",
    "partition": "gpu,gpu-scavenger",
    "account": "my.group@site",
    "qos": "long",
    "constraint": "[rack1*2&a100|(h100,ib)]",
    "exclude": "n1,cpu[01-08]",
    "nodelist": "gpu[01-08,11]",
    "dependency": "afterok:12:13_4,afterany:99",
    "reservation": "maintenance_1",
    "comment": "run 3: lr=1e-4, see wiki/x",
    "mail_type": "END,FAIL",
    "mail_user": "me+r1@uni.example",
    "mem": "120G",
    "time": "1-12:00:00",
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def _script(config: RunConfig, tmp_path: Path) -> str:
    resources = replace(config.resources, gpus_per_node=8)
    return render(make_script(RunDir(tmp_path / "run"), replace(config, resources=resources)))


@pytest.mark.parametrize("name", sorted(GOOD))
@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_characters_are_refused_in_every_field(name: str, what: str) -> None:
    good, bad = GOOD[name], HOSTILE[what]
    for value in (good + bad, bad + good, good[:1] + bad + good[1:]):
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            fields.check(name.replace("_", "-"), value)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_value_cannot_start_an_option_or_be_empty(name: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(UsageError, match="begins with '-'"):
        fields.check(option, "--wrap=x")
    with pytest.raises(UsageError, match="is empty"):
        fields.check(option, "")


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_characters_are_refused_in_other_options(what: str) -> None:
    bad = HOSTILE[what]
    for key, value in ((f"wckey{bad}", "x"), ("wckey", f"x{bad}"), ("wckey", f"x{bad}y")):
        with pytest.raises(UsageError, match="--sbatch"):
            fields.check_extra({key: value})


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_characters_are_refused_in_paths_and_profiles(what: str) -> None:
    bad = HOSTILE[what]
    with pytest.raises(UsageError, match="--run-root"):
        fields.check_path(Path(f"/scratch/{bad}x"), "--run-root")
    for profile in (
        ClusterConfig(python=f"/usr/bin/python{bad}"),
        ClusterConfig(environment={"A": f"x{bad}y"}),
        ClusterConfig(environment={f"A{bad}": "x"}),
        ClusterConfig(network_interface=f"ib0{bad}"),
        ClusterConfig(partition=f"gpu{bad}"),
    ):
        with pytest.raises(UsageError, match="cluster"):
            fields.check_cluster(profile)


@pytest.mark.parametrize("part", ["%j", "a:b", "%"])
def test_paths_that_slurm_or_python_would_read_otherwise(part: str) -> None:
    with pytest.raises(UsageError, match="--run-root"):
        fields.check_path(Path("/scratch") / part, "--run-root")


@pytest.mark.parametrize("key", ["output", "export", "wrap", "gpus", "requeue", "array", "signal"])
def test_options_that_are_ours_are_refused_with_the_reason(key: str) -> None:
    with pytest.raises(UsageError, match=f"--sbatch {key}: not possible"):
        fields.check_extra({key: "x"})


def test_options_that_have_a_flag_name_it() -> None:
    with pytest.raises(UsageError, match="use the flag --partition"):
        fields.check_extra({"partition": "x"})


@pytest.mark.parametrize(
    "item", ["cluster.setup=[touch /tmp/x]", "cluster.setup.0=x", "cluster={setup: [x]}"]
)
def test_shell_lines_come_from_a_file_only(item: str) -> None:
    with pytest.raises(UsageError, match=r"configs/cluster/NAME\.yaml"):
        fields.refuse_shell_overrides([item])


def test_good_values_are_written_as_they_are_and_run_nothing(tmp_path: Path, canary: Path) -> None:
    resources = ResourcesConfig(nodes=2, **GOOD, exclusive=True, sbatch={"wckey": "a b", "spread-job": ""})  # type: ignore[arg-type]
    cluster = ClusterConfig(environment={"NCCL_IB_HCA": "^mlx5_0:1,mlx5_1", "HINT": "~ * [a] touch"})
    text = _script(RunConfig(resources=resources, cluster=cluster), tmp_path)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    head = text.partition("\n# --")[0]
    assert "#SBATCH --comment='run 3: lr=1e-4, see wiki/x'" in head.splitlines()
    assert "#SBATCH --spread-job" in head.splitlines()
    assert "export HINT='~ * [a] touch'" in text.splitlines()
    assert not canary.exists()


def test_a_placeholder_in_a_value_is_not_filled(tmp_path: Path) -> None:
    config = RunConfig(resources=ResourcesConfig(comment="x@COMMAND@y"), cluster=ClusterConfig())
    assert "#SBATCH --comment=x@COMMAND@y" in _script(config, tmp_path)


def test_what_is_refused_names_the_character() -> None:
    with pytest.raises(UsageError, match=r"--comment 'a;b' is refused because of ';'"):
        fields.check("comment", "a;b")


def test_time_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="--time is 0"):
        fields.check("time", "0:00")


def test_what_sbatch_does_not_know_is_refused_here() -> None:
    with pytest.raises(UsageError, match="sbatch has no such option"):
        fields.check_extra({"hetjob": "1"})
    with pytest.raises(UsageError, match="did you mean 'licenses'"):
        fields.check_extra({"license": "x"})
    with pytest.raises(UsageError, match="sbatch has no such option"):
        fields.check_extra({"signa": "USR2@5"})


@pytest.mark.parametrize("name", ["cores-per-socket", "gpu-freq", "oom-kill-step", "tres-per-task", "nice"])
def test_what_sbatch_knows_is_not_refused(name: str) -> None:
    fields.check_extra({name: "1"})


def test_a_folder_anybody_may_rename_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UsageError.__bases__[0], match=r"chmod \+t"):
        fields.check_parents(shared / "runs" / "x")
    shared.chmod(0o1777)
    fields.check_parents(shared / "runs" / "x")


def test_a_run_root_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("runs")
    with pytest.raises(StateError, match="leads back to itself: choose another --run-root"):
        fields.check_parents(tmp_path / "runs" / "x")


def test_the_jobs_that_come_along_pass(tmp_path: Path) -> None:
    for job in ("smoke", "train"):
        config = load.load(job, cluster="example_a100")
        subprocess.run(["bash", "-n"], input=_script(config, tmp_path), text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpus-per-node", "4"], (4, None, {})),
        (["--gpus-per-node", "a100:4"], (4, "a100", {})),
        (["--gpus-per-node", "1g.10gb:7"], (7, "1g.10gb", {})),
        (["--gres", "gpu:a100:4"], (4, "a100", {})),
        (["--gres=gpu:2"], (2, None, {})),
        (["--gres=gpu:h100"], (1, "h100", {})),
        (["--sbatch", "gres=lscratch:100,gpu:a100:4"], (4, "a100", {"gres": "lscratch:100"})),
    ],
)
def test_gpus_by_number_and_type(words: list[str], expected: object) -> None:
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    resources = load.load(None, flags.overrides_from_flags(parser.parse_args(words))).resources
    assert (resources.gpus_per_node, resources.gpu_type, resources.sbatch) == expected
    fields.check_resources(resources)


@pytest.mark.parametrize(
    "text", ["a100", "a100:", ":4", "4:a100", "a100:\u0667", "a b:4", "-1", "a100:4:2", ""]
)
def test_gpus_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--gpus-per-node"):
        fields.read_gpus(text, "--gpus-per-node")
    with pytest.raises(UsageError, match="two kinds of GPU"):
        fields.read_gres("gpu:a100:1,gpu:h100:1", "--gres")


def test_gpus_are_not_asked_for_twice() -> None:
    with pytest.raises(UsageError, match=r"resources\.sbatch\.gres names GPUs"):
        fields.check_resources(ResourcesConfig(sbatch={"gres": "gpu:4"}))


@pytest.mark.parametrize(
    ("container", "said"),
    [
        (ContainerConfig(image="x.sif"), "absolute path of an image that exists"),
        (ContainerConfig(image="/no/such.sif"), "absolute path of an image that exists"),
        (ContainerConfig(image="docker://x;y"), "container.image .* because of ';'"),
        (ContainerConfig(image="docker://x", options=["--cleanenv"]), "variables that Slurm sets"),
        (ContainerConfig(image="docker://x", binds=["/a b"]), r"container\.binds"),
    ],
)
def test_containers_that_cannot_be(container: ContainerConfig, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fields.check_cluster(ClusterConfig(container=container))


def test_an_interpreter_in_an_image_is_pointed_to_the_container_section() -> None:
    with pytest.raises(UsageError, match=r"cluster\.container\.image"):
        fields.check_cluster(ClusterConfig(python="apptainer exec --nv image.sif python"))
    fields.check_cluster(ClusterConfig(python="conda run -n env --no-capture-output python"))


def test_ranks_in_a_container(tmp_path: Path) -> None:
    image = tmp_path / "x.sif"
    image.touch()
    inside = ContainerConfig(image=str(image), binds=["/scratch"], options=["--writable-tmpfs"])
    cluster = ClusterConfig(container=inside, python="uv run python", cpu_bind="cores")
    text = _script(RunConfig(cluster=cluster, resources=ResourcesConfig(gpu_type="a100")), tmp_path)
    lines = text.splitlines()
    assert "#SBATCH --gpus-per-node=a100:8" in lines
    assert "PYTHON=(uv run python)" in lines
    assert f"RANK=(apptainer exec --nv --bind {tmp_path},/scratch --writable-tmpfs {image} python3)" in lines
    assert "STEP=(--cpu-bind=cores)" in lines
    assert "submitit" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_ranks_by_pyxis(tmp_path: Path) -> None:
    """Pyxis is a plugin that is not here: the words are those of its README, not run."""
    inside = ContainerConfig(image="nvcr.io#nvidia/pytorch:25.01-py3", runtime="pyxis", binds=["/a:/b"])
    lines = _script(RunConfig(cluster=ClusterConfig(container=inside)), tmp_path).splitlines()
    assert "RANK=(python3)" in lines
    mounts = f"--container-mounts={tmp_path}:{tmp_path},/a:/b"
    assert f"STEP=('--container-image=nvcr.io#nvidia/pytorch:25.01-py3' {mounts})" in lines


def test_a_node_that_is_asked_for_and_excluded_is_refused(tmp_path: Path) -> None:
    """Such a job would wait for ever."""
    resources = ResourcesConfig(nodelist="gpu[01-03]", exclude="gpu[03-09],n1")
    with pytest.raises(UsageError, match="--nodelist asks for gpu03, which --exclude forbids"):
        _script(RunConfig(resources=resources), tmp_path)
