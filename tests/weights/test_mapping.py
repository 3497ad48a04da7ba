import pytest
import torch

from megatron_opd.weights.architectures import architecture
from megatron_opd.weights.mapping import by_megatron_name, hf_manifest, rules, to_hf, to_megatron
from tests.model import tiny

MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"num_key_value_heads": 3}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_the_manifest_names_exactly_the_tensors_of_transformers(family, overrides):
    from transformers import AutoModelForCausalLM

    config = tiny.config(family, **overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    manifest = hf_manifest(config, "bfloat16")
    assert {spec.name: spec.shape for spec in manifest} == wanted
    assert len(manifest) == len(wanted)
    assert {spec.dtype for spec in manifest} == {"bfloat16"}


@pytest.mark.parametrize(("family", "overrides"), MODELS)
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_cutting_and_merging_gives_every_tensor_back(family, overrides, tensor_size):
    config = tiny.config(family, **overrides)
    given = {spec.name: torch.randn(spec.shape) for spec in hf_manifest(config, "float32")}
    back = {}
    for rule in rules(architecture(config)):
        shards = [to_megatron(given.__getitem__, rule, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size)]
        assert len({shard.shape for shard in shards}) == 1, "all ranks hold shards of one shape"
        back.update(to_hf(rule, shards))
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_queries_keys_and_values_interleave_by_group():
    config = tiny.config("qwen2", hidden_size=6, num_attention_heads=6, num_key_value_heads=2)
    rule = by_megatron_name(rules(architecture(config)))["decoder.layers.3.self_attention.linear_qkv.bias"]
    heads = {"q": torch.arange(6.0), "k": torch.arange(6.0, 8.0), "v": torch.arange(8.0, 10.0)}
    tensors = {f"model.layers.3.self_attn.{name}_proj.bias": value for name, value in heads.items()}
    assert to_megatron(tensors.__getitem__, rule, tensor_rank=0, tensor_size=1).tolist() == [0, 1, 2, 6, 8, 3, 4, 5, 7, 9]
    assert to_megatron(tensors.__getitem__, rule, tensor_rank=1, tensor_size=2).tolist() == [3, 4, 5, 7, 9]


def test_padding_rows_of_the_vocabulary_are_zero():
    config = tiny.config("qwen2")
    rule = rules(architecture(config))[0]
    shard = to_megatron(lambda name: torch.ones(507, 48), rule, tensor_rank=1, tensor_size=2)
    assert shard.shape == (254, 48)
    assert shard[-1].eq(0).all()
    assert shard[:-1].eq(1).all()


def test_a_vocabulary_smaller_than_the_padding_still_splits():
    rule = rules(architecture(tiny.config("qwen2", vocab_size=5)))[0]
    full = torch.randn(5, 48)
    shards = [to_megatron(lambda name: full, rule, tensor_rank=rank, tensor_size=4) for rank in range(4)]
    assert [tuple(shard.shape) for shard in shards] == [(2, 48)] * 4
    assert torch.equal(to_hf(rule, shards)[0][1], full)


def test_names_of_both_layer_specs_and_of_the_tied_copy_lead_to_one_rule():
    rule_of = by_megatron_name(rules(architecture(tiny.config("qwen3", tie_word_embeddings=True))))
    for local, fused in {
        "decoder.layers.2.input_layernorm.weight": "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.2.pre_mlp_layernorm.weight": "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
        "embedding.word_embeddings.weight": "output_layer.weight",
    }.items():
        assert rule_of[local] is rule_of[fused]
