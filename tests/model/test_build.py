import pytest
import torch

from megatron_opd.errors import ConfigError
from megatron_opd.model.build import build
from megatron_opd.model.parallel import ParallelConfig
from tests.model import tiny


def _yarn() -> dict:
    return {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def _partial() -> dict:
    return {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"rope_parameters": _yarn()}, "rope_type='yarn'"),
        ("llama", {"rope_parameters": _partial()}, "partial_rotary_factor=0.5"),
        ("llama", {"attention_bias": True}, "attention_bias equal to mlp_bias"),
        ("llama", {"mlp_bias": True}, "attention_bias equal to mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias equal to mlp_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "sliding_window=16"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_attention"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_refused(family, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny.config(family, **overrides), ParallelConfig(), dtype=torch.float32)


def test_an_unknown_family_is_refused_with_the_known_ones():
    from transformers import MistralConfig

    with pytest.raises(ConfigError, match="'mistral' is not supported; use one of llama, qwen2, qwen3"):
        build(MistralConfig(), ParallelConfig(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 4}, "tensor_parallel=4 does not divide num_attention_heads=6; use 1, 2, 3 or 6"),
        ({"tensor": 3}, "tensor_parallel=3 does not divide num_query_groups=2; use 1 or 2"),
        ({"pipeline": 3}, "pipeline_parallel=3 does not divide num_layers=4; use 1, 2 or 4"),
    ],
)
def test_a_split_that_does_not_divide_the_model_is_refused_with_those_that_do(parallel, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny.config("qwen2"), ParallelConfig(**parallel), dtype=torch.float32)


def test_an_indivisible_mlp_is_refused():
    with pytest.raises(ConfigError, match="tensor_parallel=2 does not divide intermediate_size=71; use 1 or 71"):
        build(tiny.config("qwen2", intermediate_size=71), ParallelConfig(tensor=2), dtype=torch.float32)
