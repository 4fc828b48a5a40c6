"""Rollouts by vLLM on the training GPUs: one engine inside each rank, handed the weights after each update.

NEVER RUN. Written on a machine without a GPU, against vLLM's documented interface as of 0.20: LLM(
distributed_executor_backend="external_launcher", load_format="dummy", enable_sleep_mode, logprobs_mode),
LLM.apply_model, sleep, wake_up, reset_prefix_cache, and LLMEngine.add_request, step, abort_request. TRL
places vLLM in the same way (its "colocate" mode). The tests drive a stand-in that only records the calls.

    sampler = VllmSampler(job, ids)       # rollout.engine=vllm; the optional extra `vllm`
    policy_id = sampler.sync_weights(network)
    samples = sampler.sample(request, should_stop)
    sampler.release()                     # weights and cache leave the GPU until the next sync_weights

Each completion is a request with its own seed. That fixes its random numbers, not its logits: vLLM computes
them in batches whose make-up it chooses, so a rollout sampled again after a preemption can differ in places
where the draw lies near a boundary. What was finished is kept and not sampled again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.tasks.tokenizer import SpecialIds
from r1hpc.train.attention import OURS
from r1hpc.train.export import exported_config, weights_of
from r1hpc.train.loop import Job
from r1hpc.train.sampling import Request, Samples, fingerprint

_MEMORY_SHARE = 0.3
"""Share of the GPU for vLLM's weights and cache, beside the trainer's (TRL's default for colocation)."""


class VllmSampler:
    """The RolloutEngine of train/sampling.py over vLLM."""

    def __init__(self, job: Job, ids: SpecialIds) -> None:
        """Loads nothing yet: vLLM starts at the first sync_weights, when it sees what memory is left.

        Raises:
            R1hpcError: vLLM is not installed, or this is a CPU run.
            ConfigError: an attention that vLLM does not have.
        """
        attention = job.config.model.attn_implementation
        if attention in OURS:
            raise ConfigError(
                f"rollout.engine=vllm computes softmax attention, not model.attn_implementation={attention}: "
                "use rollout.engine=sampler"
            )
        self._vllm = _import_vllm()
        if job.group.device.type != "cuda":
            raise R1hpcError("rollout.engine=vllm needs GPUs: use rollout.engine=sampler on a CPU run")
        self._config = job.config
        self._ids = ids
        self._llm: Any = None
        self._asleep = False
        self._num_calls = 0

    def sync_weights(self, network: torch.nn.Module) -> str:
        """Hand the weights over one by one, adapters merged, all ranks together; names them by their bits."""
        if self._llm is None:
            self._llm = self._start(network)
        elif self._asleep:
            self._llm.wake_up(tags=["weights"])
        names = hashlib.sha256()
        for weight in weights_of(network):
            # Tensor by tensor: a second whole copy would not fit beside two engines that share a GPU.
            with weight.whole() as value:
                names.update(fingerprint(torch.nn.ParameterList([value])).encode())
                pair = (weight.name, value)
                self._llm.apply_model(lambda model, pair=pair: len(model.load_weights([pair])))
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()  # what it holds was computed by the weights before
        return names.hexdigest()[:16]

    def sample(self, request: Request, should_stop: Callable[[], bool]) -> Samples | None:
        """Polls after every `rollout.poll_every` steps of vLLM, each about one token of all completions."""
        assert not self._asleep, "sample without sync_weights"
        engine = self._llm.llm_engine
        self._num_calls += 1
        rows = {f"{self._num_calls}-{row}": row for row in range(len(request.streams))}
        for name, row in rows.items():
            engine.add_request(name, self._prompt(request, row), self._sampling(request, row))
        finished, steps = {}, 0
        while engine.has_unfinished_requests():
            if steps % self._config.rollout.poll_every == 0 and should_stop():
                engine.abort_request([name for name, row in rows.items() if row not in finished])
                return None
            for output in engine.step():
                if output.finished:
                    finished[rows[output.request_id]] = output.outputs[0]
            steps += 1
        return self._samples([finished[row] for row in range(len(rows))])

    def release(self) -> None:
        """Level 2: the weights are dropped, not kept on the host; sync_weights brings newer ones anyway."""
        if self._llm is not None and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def _start(self, network: torch.nn.Module) -> Any:
        # The engine must live in this process, or the weights would have to be sent to another one.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM reads these even where torch.distributed is up already, and then does not use them.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        rollout = self._config.rollout
        options = {
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "max_model_len": rollout.max_prompt_length + rollout.max_completion_length,
            "seed": self._config.train.seed,
            "distributed_executor_backend": "external_launcher",
            "enable_sleep_mode": True,
            "gpu_memory_utilization": _MEMORY_SHARE,
            "generation_config": "vllm",  # not the sampling defaults of the model's folder
            "logprobs_mode": "processed_logprobs",  # after the temperature
            **rollout.vllm_options,
        }
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(exported_config(network)))
            return self._vllm.LLM(model=folder, **options)

    def _prompt(self, request: Request, row: int) -> Any:
        prompt = request.prompts[row // request.num_generations]
        return self._vllm.TokensPrompt(prompt_token_ids=list(prompt))

    def _sampling(self, request: Request, row: int) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=request.temperature,
            seed=int(request.streams[row]) >> 1,  # a signed 64-bit number in vLLM
            max_tokens=request.max_completion_length,
            stop_token_ids=[self._ids.eos],
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )

    def _samples(self, outputs: list[Any]) -> Samples:
        longest = max(len(output.token_ids) for output in outputs)
        tokens = np.full((len(outputs), longest), self._ids.pad, np.int32)
        logprobs = np.zeros((len(outputs), longest), np.float32)
        for row, output in enumerate(outputs):
            ids = list(output.token_ids)
            tokens[row, : len(ids)] = ids
            logprobs[row, : len(ids)] = [
                at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)
            ]
        lengths = np.array([len(output.token_ids) for output in outputs], np.int32)
        ended = np.array([output.finish_reason == "stop" for output in outputs], np.bool_)
        return Samples(tokens, logprobs, lengths, ended)


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError:
        raise R1hpcError(
            "rollout.engine=vllm needs vLLM, which needs GPUs: pip install 'r1hpc[vllm]', or use "
            "rollout.engine=sampler"
        ) from None
    return vllm
