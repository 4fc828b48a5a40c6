"""rollout.engine=vllm on SmolLM2-135M-Instruct, which has a tied head, in fp32: `make test-vllm`.

The model is fetched once from the package index; skipped where that is out of reach.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from r1hpc.config.schema.run import ModelConfig, Precision, RunConfig
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.model.model import build_model
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.quantize.model_folders import convert_gguf
from r1hpc.train.rollout import vllm_engine
from r1hpc.train.rollout.vllm_engine import VllmSampler
from tests.fetched import SMOLLM2, wheel_member
from tests.train.test_vllm_runs import BATCH, ORIGINAL, SPOILED, job, largest, serve
from tests.train.two_ranks import engine_around, run_on_two_ranks, train

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

_IDS = SpecialIds(pad=2, eos=2)
_LR = 5e-5
"""That of GRPO in jobs/smollm2.yaml: after one such step a policy of before must show."""


def _handed_over(group: Group, folder: Path) -> None:
    """At steps 0, 1 and 10; then each thing that a hand-over can leave behind."""
    settings = ModelConfig(path=str(folder / "model"))
    hf_config = load_model_config(RunConfig(stage="rl", model=settings), vocab_size=None)
    network: Any = build_model(settings, hf_config, seed=3)
    engine = engine_around(network, 1, Precision.fp32, _LR)
    sampler = VllmSampler(job(group), _IDS)
    for steps in (0, 1, 9):
        train(engine, [BATCH] * steps)
        sampler.sync_weights(engine.module)
        print(f"{steps} steps further:", sampler.facts(), flush=True)
        assert largest(sampler) <= 1e-3

    before = [(name, value.clone()) for name, value in ORIGINAL(engine.module)]
    train(engine, [BATCH])
    for what, spoiled in SPOILED.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm_engine, "served_weights", partial(serve, spoiled, before))
            with pytest.raises(TrainError, match="vLLM does not compute what the trainer does"):
                sampler.sync_weights(engine.module)
        print(what, sampler.facts(), flush=True)
        sampler.sync_weights(engine.module)  # the next one is whole
        train(engine, [BATCH])


def test_a_hand_over_is_whole_and_what_it_leaves_behind_is_seen(tmp_path: Path) -> None:
    convert_gguf(wheel_member(*SMOLLM2), tmp_path / "model")
    run_on_two_ranks(_handed_over, tmp_path, timeout_s=1700)
