"""Every field of a config is read, known to change nothing, or refused by name."""

import pytest
from transformers import LlamaConfig, PhiConfig

from megatron_opd.errors import ConfigError
from megatron_opd.weights.architectures import FAMILIES, architecture
from tests.model import tiny

PARTIAL = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama: hidden_act='gelu' is not supported; wanted 'silu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"rope_parameters": PARTIAL}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, "llama: rope_scaling of type 'foo' is not supported; use "),
        ("qwen3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "qwen3: rope_scaling of type 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "type 'linear' holds beta=1"),
        ("llama", {"attention_bias": True}, "attention_bias equal to mlp_bias"),
        ("llama", {"mlp_bias": True}, "attention_bias equal to mlp_bias"),
        ("llama", {"logit_scale": 2.0}, "llama: config.json holds logit_scale=2.0, which is unknown"),
        ("llama", {"sliding_window": 16}, "llama: config.json holds sliding_window=16"),
        ("mistral", {"attention_multiplier": 0.5}, "attention_multiplier=0.5"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias equal to mlp_bias"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "there is no sliding_window"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types holds 'chunked_attention'"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; wanted 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
        ("qwen3_moe", {"attention_bias": True}, "experts biases|attention_bias equal to mlp_bias"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_refused_by_name(family, overrides, message):
    with pytest.raises(ConfigError, match=message):
        architecture(tiny.config(family, **overrides))


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'phi' is not supported; use one of llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"):
        architecture(PhiConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_is_allowed(family):
    noise = {"_name_or_path": "here", "torch_dtype": "bfloat16", "pretraining_tp": 2, "transformers.js_config": {}, "logit_scale": None}
    assert architecture(tiny.config(family, **noise)) == architecture(tiny.config(family))


def test_both_ways_to_write_scaled_rope_are_read():
    scaling = {"factor": 2.0, "rope_theta": 1000.0}
    old = LlamaConfig(rope_theta=1000.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = LlamaConfig(rope_parameters={"rope_type": "linear", **scaling})
    architecture(old), architecture(new)
    for config in (old, new):
        assert {**config.rope_parameters, "type": "linear"} == {"rope_type": "linear", "type": "linear", **scaling}


def test_windows_are_told_by_layer():
    assert architecture(tiny.config("mistral", sliding_window=7)).windows == (7,) * 4
    assert architecture(tiny.config("mistral", sliding_window=None)).windows == (None,) * 4
    assert architecture(tiny.config("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=3)).windows == (None,) * 3 + (7,)
    assert architecture(tiny.config("qwen2", sliding_window=7, max_window_layers=3)).windows == (None,) * 4


def test_layers_that_do_not_divide_go_to_the_middle_stages_first_and_never_to_the_head():
    def stages(layers, pipeline, given=()):
        return architecture(tiny.config("qwen3", num_hidden_layers=layers)).stages(pipeline, given)

    assert stages(8, 4) == (2, 2, 2, 2) and stages(5, 2) == (3, 2) and stages(4, 3) == (1, 2, 1)
    assert stages(126, 16) == (7, *[8] * 14, 7), "Llama 3.1 405B"
    assert stages(11, 4) == (3, 3, 3, 2) and stages(4, 2, (1, 3)) == (1, 3)
    for layers in range(1, 20):
        for pipeline in range(1, layers + 1):
            found = stages(layers, pipeline)
            assert len(found) == pipeline and sum(found) == layers and max(found) - min(found) <= 1 and found[-1] == min(found)


def test_experts_are_shared_in_consecutive_parts():
    arch = architecture(tiny.config("qwen3_moe", num_experts=6))
    assert [arch.expert_rank(number, 3) for number in range(6)] == [0, 0, 1, 1, 2, 2]
    assert arch.expert_rank(None, 3) == 0


def test_experts_over_tensor_ranks_want_sequence_parallelism():
    arch = architecture(tiny.config("mixtral"))
    arch.require_trainable(tensor=1, sequence_parallel=False)
    arch.require_trainable(tensor=2, sequence_parallel=True)
    architecture(tiny.config("qwen3")).require_trainable(tensor=2, sequence_parallel=False)
    with pytest.raises(ConfigError, match="tensor_parallel=2 trains 5 experts only with sequence_parallel=true"):
        arch.require_trainable(tensor=2, sequence_parallel=False)
