"""Understand a launcher's command: `submit torchrun --nproc_per_node 4 train.py --lr 1`.

    words, overrides = split_command(argv)

The launcher is not run: r1hpc starts one process per rank itself. Each of its settings becomes one of ours,
is dropped because r1hpc chooses it (the meeting place), or is refused with what to write instead.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.cli import LAUNCHERS, split_script_words
from r1hpc.base.errors import UsageError

MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
}
_NODES = {"nnodes", "num_nodes", "num_machines"}
_PER_NODE = {"nproc_per_node", "num_gpus", "num_accelerators"}
_OURS = {
    "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "node_rank", "master_addr", "master_port",
    "monitor_interval", "start_method", "local_addr", "main_process_ip", "main_process_port",
    "machine_rank", "same_network", "deepspeed_multinode_launcher", "ssh_port", "standalone", "multi_gpu",
    "no_ssh", "no_ssh_check", "force_multi", "q", "quiet", "no_local_rank",
}  # fmt: skip
"""Settings that r1hpc chooses by itself, or that have no effect here."""
_DEFAULTS = {"compute_environment": "LOCAL_MACHINE", "main_training_function": "main"}
"""Values of `accelerate config` that ask for nothing, beside those of _OFF."""
_OFF: tuple[Any, ...] = (None, "", "no", "NO", "false", [], {})
_SWITCHES = {
    "standalone", "multi_gpu", "module", "m", "no_python", "cpu", "use_cpu", "use_deepspeed", "use_fsdp",
    "no_local_rank", "no_ssh", "no_ssh_check", "force_multi", "run_path", "virtual_local_rank", "q",
    "quiet", "bind_cores_to_rank", "use_megatron_lm", "use_xpu", "tpu", "save_pid", "debug",
    "same_network",
}  # fmt: skip
_VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
    "num_cpu_threads_per_process": "OMP_NUM_THREADS",
    "debug": "ACCELERATE_DEBUG_MODE",
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
}
"""Setting of accelerate -> the variable by which `accelerate launch` hands it on (accelerate 1.16)."""
_IN_LOGS = "nothing: each rank's output is in the run folder's logs/"
_INSTEAD = {
    "max_restarts": "limits.max_crashes=N, which r1hpc counts over attempts",
    **dict.fromkeys(("log_dir", "redirects", "tee"), _IN_LOGS),
    "include": "--nodelist NAMES",
    "exclude": "--exclude NAMES before the launcher",
    "gpu_ids": "--gpus-per-node N",
    "no_python": "the program itself: submit PROGRAM",
    "launcher": "nothing: r1hpc starts the ranks by srun",
}
_SHORT = {"r": "redirects", "t": "tee", "H": "hostfile", "i": "include", "e": "exclude", "m": "module"}


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for us, and overrides from a launcher's command and from the words after `--`."""
    before, own = split_script_words(argv)
    for place, word in enumerate(before):
        name = _launcher(before, place)
        if name is None:
            continue
        command = list(argv[place + 1 :])  # a launcher's `--` is the script's
        if name == "accelerate" and word != "-m":
            if command[:1] != ["launch"]:
                raise UsageError(
                    f"accelerate {' '.join(command[:1])}: submit understands `accelerate launch`"
                )
            command = command[1:]
        elif word == "-m" and before[place + 1 : place + 2] and before[place + 1] in MODULES:
            command = command[1:]
        elif word == "-m":
            command = ["-m", *command]
        words = before[:place]
        while words and Path(words[-1]).name.startswith("python"):
            words.pop()
        return _understood(name, words, command)
    return before, own


def _launcher(words: Sequence[str], place: int) -> str | None:
    """Return the launcher whose command begins at this word: a name of LAUNCHERS, or python."""
    word, before = words[place], words[place - 1] if place else ""
    if word == "-m" and place + 1 < len(words):
        return MODULES.get(words[place + 1], "python")
    if before.startswith("-") and "=" not in before:  # -J torchrun is a name
        return None
    name = Path(word).name
    if name in LAUNCHERS:
        return name
    is_python = name.startswith("python") and "=" not in name
    return "python" if is_python and words[place + 1 : place + 2] not in ([], ["-m"]) else None


def _understood(launcher: str, words: list[str], command: list[str]) -> tuple[list[str], list[str]]:
    """Return our words and overrides for a launcher's flags, script and arguments."""
    flags: dict[str, Any] = {}
    at = 0
    while at < len(command) and command[at].startswith("-"):
        key, sign, value = command[at].lstrip("-").partition("=")
        key = key.replace("-", "_")
        key = _SHORT.get(key, key)
        if key in ("u", "OO", "O"):  # python's own
            at += 1
            continue
        if not sign and key not in _SWITCHES:
            at += 1
            value = command[at] if at < len(command) else ""
        flags[key] = value if sign or key not in _SWITCHES else True
        at += 1
        if key == "module":
            break
    if at >= len(command):
        raise UsageError(f"{launcher}: its command names no script")
    script, arguments = command[at], command[at + 1 :]
    overrides: list[str] = []

    def put(key: str, value: Any) -> None:
        overrides.append(f"{key}={json.dumps(value)}")

    if flags.pop("module", None):
        put("script.module", script)
        script = str(_file_of(script))
    if launcher == "accelerate":
        flags = _with_config_file(flags)
    if launcher == "deepspeed" and not flags.get("no_local_rank"):
        arguments = ["--local_rank={local_rank}", *arguments]
    if launcher != "python":
        put("script.distributed", launcher != "accelerate")
    _place(launcher, flags, words, put)
    for key, value in flags.items():
        _carry(launcher, key, value, put)
    put("script.args", arguments)
    print(
        f"{launcher}: {script} becomes one process per rank of r1hpc; the launcher does not run",
        file=sys.stderr,
    )
    return [*words, script], overrides


def _with_config_file(flags: dict[str, Any]) -> dict[str, Any]:
    """Return accelerate's flags over those of its config file."""
    file = flags.pop("config_file", None)
    if file is None:
        return flags
    from r1hpc.config.yaml_files import read_yaml  # deferred: --help needs no YAML

    settings: dict[str, Any] = {}
    for key, value in read_yaml(Path(file)).items():
        settings |= value if isinstance(value, dict) else {key: value}
    return {key: value for key, value in settings.items() if value not in (None, "no", "")} | flags


def _place(
    launcher: str, flags: dict[str, Any], words: Sequence[str], put: Callable[[str, Any], None]
) -> None:
    """Turn numbers of nodes and processes into ours; `words` may say that there are no GPUs."""
    nodes = next((flags.pop(key) for key in sorted(_NODES & flags.keys())), 1)
    ranks = next((flags.pop(key) for key in sorted(_PER_NODE & flags.keys())), None)
    is_cpu = bool(flags.pop("cpu", False) or flags.pop("use_cpu", False))
    kind = str(flags.pop("distributed_type", "")).upper()
    is_cpu |= "resources.gpus_per_node=0" in words or " --gpus-per-node 0" in " " + " ".join(words)
    is_cpu |= ranks == "cpu" or "CPU" in kind
    if kind in ("FSDP", "DEEPSPEED"):
        flags[f"use_{kind.lower()}"] = True
    elif kind in ("XLA", "TPU", "MEGATRON_LM"):
        raise UsageError(f"accelerate's distributed_type {kind} is not supported")
    try:
        nodes = int(nodes)
        total = flags.pop("num_processes", None)
        left = 0
        if total is not None:
            ranks, left = divmod(int(total), nodes)
        ranks = None if ranks in (None, "auto", "gpu", "cpu", "-1") else int(ranks)
    except ValueError:
        raise UsageError(f"{launcher}: {nodes} nodes, {ranks} processes: give fixed whole numbers") from None
    if left:
        raise UsageError(f"num_processes={total} does not divide over {nodes} nodes")
    if nodes > 1 or launcher == "torchrun":
        put("resources.nodes", nodes)
    if is_cpu:
        put("resources.gpus_per_node", 0)
    if ranks is not None:
        put("resources.ranks_per_node" if is_cpu else "resources.gpus_per_node", ranks)
    if launcher == "accelerate" and is_cpu:
        put("script.env.ACCELERATE_USE_CPU", "true")


def _carry(launcher: str, key: str, value: Any, put: Callable[[str, Any], None]) -> None:
    """Hand one setting on by its variable, drop it if it is ours, or refuse it."""
    is_off = value is False or value in _OFF or value == _DEFAULTS.get(key)
    variable = _VARIABLES.get(key, key.upper() if key.startswith("fsdp_") else "")
    if key in _OURS or (is_off and (key == "debug" or not variable)):
        return
    if launcher == "accelerate" and key in ("use_deepspeed", "use_fsdp"):
        put(f"script.env.ACCELERATE_{key.upper()}", "true")
        return
    if launcher == "accelerate" and variable:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        put(f"script.env.{variable}", text.upper() if key == "dynamo_backend" else text)
        return
    instead = _INSTEAD.get(key, "its effect in the script, or in script.env")
    raise UsageError(f"{launcher} {key}={value} is not carried over: leave it out, and write {instead}")


def _file_of(module: str) -> Path:
    """Return the file of `pkg.train`, below this folder; nothing is imported."""
    place = Path(*module.split("."))
    for root in ("", *filter(None, sys.path)):
        for file in (root / place.with_suffix(".py"), root / place / "__main__.py"):
            if file.is_file():
                return file
    raise UsageError(f"-m {module}: there is no {place.with_suffix('.py')} in {Path.cwd()}")
