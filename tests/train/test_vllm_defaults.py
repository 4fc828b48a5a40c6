"""What plan/memory/vllm.py says of vLLM's defaults, asked of vLLM itself: `make test-vllm`.

MOCK: vLLM asks its platform for the card, and there is none here, so a stand-in says what it would.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1hpc.config.schema.run import Precision
from r1hpc.train.rollout.policy import DTYPES
from tests.plan.test_vllm_memory import BATCHES, CACHES

pytestmark = pytest.mark.vllm

_NAMES = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize(("options", "card", "longest", "batch"), BATCHES)
def test_what_vllm_takes_at_once(
    options: dict[str, Any],
    card: str,
    longest: int,
    batch: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    platform = SimpleNamespace(
        get_device_total_memory=lambda: int(79.2 * 2**30),
        get_device_name=lambda: _NAMES[card],
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    monkeypatch.setattr(arg_utils, "current_platform", platform)
    # Prompts are read in steps where nobody says otherwise, as language models allow.
    asked = arg_utils.EngineArgs(model="any", **{"enable_chunked_prefill": True, **options})
    asked._set_default_max_num_seqs_and_batched_tokens_args(
        UsageContext.LLM_CLASS,
        SimpleNamespace(max_model_len=longest, is_multimodal_model=False),
        SimpleNamespace(use_batched_dp_moe=False),
    )
    assert (asked.max_num_batched_tokens, asked.max_num_seqs) == batch


@pytest.mark.parametrize(("dtype", "precision", "share"), CACHES)
def test_a_cache_in_fewer_bits(dtype: str, precision: str, share: float) -> None:
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    weights = DTYPES[Precision(precision)]

    def page(kind: str) -> int:
        form: torch.dtype = kv_cache_dtype_str_to_dtype(kind, SimpleNamespace(dtype=weights))
        spec = FullAttentionSpec(
            block_size=16, num_kv_heads=4, head_size=128, dtype=form, kv_quant_mode=get_kv_quant_mode(kind)
        )
        size: int = TritonAttentionBackend.customize_spec(spec).page_size_bytes
        return size

    assert page(dtype) == pytest.approx(share * page("auto"))
