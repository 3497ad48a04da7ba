import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.errors import ConfigError
from megatron_opd.model.build import build, fp8_settings
from megatron_opd.model.parallel import ParallelConfig
from tests.model import tiny


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 4}, "tensor_parallel=4 does not divide num_attention_heads=6; use 1, 2, 3 or 6"),
        ({"tensor": 3}, "tensor_parallel=3 does not divide num_query_groups=2; use 1 or 2"),
        ({"pipeline": 5}, "pipeline_parallel=5 exceeds num_layers=4; use 4 or fewer"),
        ({"pipeline": 2, "layers": (4, 1)}, r"pipeline_layers=\[4, 1\] must be 2 numbers of layers, .* and sum to num_layers=4"),
        ({"data": 2, "expert": 2}, "expert_parallel=2 splits experts over ranks, and this model has none; use 1"),
    ],
)
def test_a_split_that_does_not_divide_the_model_is_refused_with_those_that_do(parallel, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny.config("qwen2"), ParallelConfig(**parallel), dtype=torch.float32)


def test_experts_that_do_not_split_evenly_are_refused():
    with pytest.raises(ConfigError, match="expert_parallel=2 does not divide num_experts=5; use 1 or 5"):
        build(tiny.config("mixtral"), ParallelConfig(data=2, expert=2), dtype=torch.float32)


def test_an_indivisible_mlp_is_refused():
    with pytest.raises(ConfigError, match="tensor_parallel=2 does not divide intermediate_size=71; use 1 or 71"):
        build(tiny.config("qwen2", intermediate_size=71), ParallelConfig(tensor=2), dtype=torch.float32)


@pytest.mark.parametrize("recipe", ["current", "delayed", "blockwise", "mxfp8"])
def test_megatron_knows_every_recipe_by_the_name_that_it_gets(recipe):
    settings = fp8_settings(recipe)
    assert Fp8Recipe(settings["fp8_recipe"]) is not Fp8Recipe.custom
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16, **settings)
    assert {name: getattr(config, name) for name in settings} == settings
