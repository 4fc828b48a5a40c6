"""Ranks of real DeepSpeed on the CPU that say what they hold, between the passes and inside the optimizer's
step: run by test_states.py.

python -m tests.plan.deepspeed_states RANK WORLD_SIZE FOLDER     # writes FOLDER/states.json (rank 0)
"""

import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore  # torch.distributed hides it from type checkers
from torch.profiler import ProfilerActivity, profile

from r1hpc.train.parallel.distributed import join, leave

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 688, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 128},
    "qwen3": {
        "hidden_size": 320,
        "intermediate_size": 960,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
_COMMON = {"num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 128}
_IDS = {"vocab_size": 4000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BUCKET_ELEMENTS = 100_000
"""Small beside the models: what buckets hold is told apart from the states."""


def model_config(name: str) -> dict[str, Any]:
    own = MODELS[name] if name == "gpt2" else {**_COMMON, **MODELS[name]}
    return {"model_type": name, **own, **_IDS}


def wait_for_threads(timeout_s: float = 60.0) -> None:
    """Wait until every other thread of this process sleeps.

    A collective of gloo returns when its result is there. The thread that ran it drops the tensors after that
    (ProcessGroupGloo::runLoop). On busy cores this can take a while, and the gathered weights, which nobody
    else holds any more, would count. It needs Python's lock for that, so this function sleeps to release it.
    """
    deadline = time.monotonic() + timeout_s
    while any(state != "S" for state in _states_of_other_threads()):
        assert time.monotonic() < deadline, "a thread is still at work"
        time.sleep(0.01)


def _states_of_other_threads() -> list[str]:
    time.sleep(0.001)
    states = []
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states


def held_bytes() -> int:
    """Bytes of every tensor that is alive, each storage once. A gradient that nobody asked for is no object
    of Python's yet: it is found through its parameter."""
    wait_for_threads()
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages.pop(0, None)
    return sum(storages.values())


def allocated_bytes(call: Callable[[], object]) -> int:
    """The most that tensors take while `call` runs, over what they take before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as traced:
        call()
    assert traced.profiler is not None
    events = [event for event in traced.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(name: str, zero_stage: int, world_size: int, offload: bool = False) -> tuple[int, int, int]:
    """(parameters, most bytes held between the passes of two steps of two micro batches, and inside a step).

    Args:
        offload: the optimizer, to the host's memory: here the same as the device's.
    """
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    before = held_bytes()
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(name)))
    count = sum(p.numel() for p in network.parameters())
    engine, *_ = deepspeed.initialize(
        model=network,
        model_parameters=list(network.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 2 * world_size,
            "steps_per_print": 10**12,
            # As r1hpc has it on a GPU: fused.
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "stage3_param_persistence_threshold": 0,
                "offload_optimizer": {"device": "cpu" if offload else "none"},
            },
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    del network
    most = inside = 0
    for _ in range(4):
        ids = torch.randint(3, 4000, (1, 16))
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        held = held_bytes() - before
        most = max(most, held)
        inside = max(inside, held + allocated_bytes(engine.step))
    engine.destroy()
    return count, most, inside


def main(rank: str, world_size: str, folder: str) -> None:
    world = int(world_size)
    store = FileStore(f"{folder}/store", world)
    group = join(int(rank), int(rank), world, store, use_gpu=False)
    found = []
    # gloo gathers updated weights through a copy of them, which would hide an offloaded step's own.
    offloaded = [(name, stage, True) for name in MODELS for stage in (1, 2, 3) if world == 1]
    plain = [(name, stage, False) for name in MODELS for stage in (0, 1, 2, 3)]
    for name, stage, offload in plain + offloaded:
        count, most, inside = measure(name, stage, world, offload)
        found.append(
            {
                "model": name,
                "zero_stage": stage,
                "offload": offload,
                "parameters": count,
                "bytes": most,
                "step_bytes": inside,
            }
        )
    if group.rank == 0:
        (Path(folder) / "states.json").write_text(json.dumps(found))
    leave()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the engines and abort


if __name__ == "__main__":
    main(*sys.argv[1:])
