"""Serve a model behind OpenAI's interface as a job: the workload, and its checks before the queue."""

import subprocess
from pathlib import Path

from r1hpc.attempt.workload import Checked, Facts, Outcome, RankJob, Workload
from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config.schema.run import OWN_ATTENTIONS, RunConfig
from r1hpc.plan.model.shape import canonical, load_model_config
from r1hpc.plan.model.weights import check_headers, read_tensors
from r1hpc.slurm.script import interpreter

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TIMEOUT_S = 30.0
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


class Serving(Workload):
    """One server on one node."""

    is_server = loads_model = True

    def vocab_size(self, config: RunConfig) -> int | None:
        from r1hpc.tasks.text.tokenizer import load_tokenizer, vocabulary_size  # tokenizers

        try:
            return vocabulary_size(load_tokenizer(config.model))
        except UsageError:  # refused later, when it is needed
            return None

    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        if config.model.path is None:
            raise UsageError("no model to serve: use python -m r1hpc.serve RUN|DIR, or model.path=DIR")
        return Checked(config)

    def check(self, config: RunConfig, facts: Facts) -> list[str]:
        if facts.expected_model is None:
            check_served(config, facts.gpus_per_node, facts.executor)
        return []

    def run(self, job: RankJob) -> Outcome:
        from r1hpc.serving.life import serve

        return serve(job)


def check_served(config: RunConfig, gpus_per_node: int, executor: str) -> None:
    """Refuse what vLLM would refuse.

    Raise UsageError for unsupported attention, no tokenizer, heads that do not divide over the GPUs, or an
    interpreter without vLLM.
    """
    folder = Path(config.model.path or "")
    model = load_model_config(config, None)
    check_headers(folder, model)
    if model.get("attn_implementation") in OWN_ATTENTIONS:
        raise UsageError(
            f"{folder} was trained with attention {model['attn_implementation']}, and vLLM computes softmax "
            f"attention: use `python -m r1hpc.chat {folder}`"
        )
    if model.get("model_type") == "mixtral" and any(".mlp.experts." in name for name in read_tensors(folder)):
        raise UsageError(
            f"{folder} calls Mixtral's experts as transformers 5 does, which vLLM does not know: use "
            f"`python -m r1hpc.chat {folder}`"
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UsageError(
            f"{folder} has no tokenizer, and clients send text: copy its tokenizer.json and "
            "tokenizer_config.json there"
        )
    heads = canonical(model).get("num_attention_heads")
    if gpus_per_node > 1 and isinstance(heads, int) and heads % gpus_per_node:
        few = [n for n in range(1, gpus_per_node) if heads % n == 0]
        raise ConfigError(
            f"{heads} attention heads cannot be divided over {gpus_per_node} GPUs: take --gpus {few[-1]}"
        )
    _check_vllm(config, executor)


def _check_vllm(config: RunConfig, executor: str) -> None:
    """Refuse an interpreter without vLLM; one that only the nodes have is assumed to have it."""
    if config.cluster.container.image is not None and config.serve.python is None:
        return
    words = list(interpreter(config.cluster)) if config.serve.python is None else config.serve.python.split()
    if not words:
        raise UsageError("serve.python (or --python) is empty: name a python that has vLLM, or leave it out")
    if not Path(words[0]).is_absolute():  # cluster.setup may decide which python it is
        return
    try:
        status = subprocess.run([*words, "-c", _HAS_VLLM], timeout=_TIMEOUT_S, check=False).returncode
    except FileNotFoundError:
        if executor == "slurm":
            return
        raise UsageError(f"there is no {words[0]}: name a python that has vLLM by serve.python") from None
    except PermissionError:
        raise UsageError(f"{words[0]} is no program: name a python that has vLLM by serve.python") from None
    except (OSError, subprocess.SubprocessError):
        return
    if status:
        raise UsageError(
            f"{' '.join(words)} has no vLLM: pip install 'r1hpc[vllm]' in an environment (`make vllm-env` "
            "makes one for CPUs), and name its python by --python or serve.python"
        )


SERVING = Serving()
