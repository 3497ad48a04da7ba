"""What the supported model families look like, read from a Hugging Face config. It knows shapes, not tensors.

A new dense family is one line in `FAMILIES`, when its tensors carry the names of `mapping.rules`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_opd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of one `model_type` differ; biases may depend on the config."""

    qk_norm: bool = False  # RMSNorm on each query and key head before RoPE
    qkv_bias: Callable[[Any], bool] = lambda config: bool(config.attention_bias)
    output_bias: Callable[[Any], bool] = lambda config: bool(config.attention_bias)  # of the attention output projection
    mlp_bias: Callable[[Any], bool] = lambda config: False


FAMILIES = {
    "llama": Family(mlp_bias=lambda config: bool(config.mlp_bias)),
    "qwen2": Family(qkv_bias=lambda config: True, output_bias=lambda config: False),
    "qwen3": Family(qk_norm=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes and switches that decide which tensors exist and what shape they have."""

    layers: int
    hidden: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    ffn: int
    vocab: int  # true size, without padding
    tied: bool  # the LM head is the embedding
    qk_norm: bool
    qkv_bias: bool
    linear_bias: bool  # on every linear layer but the LM head

    def require_divisible(self, *, tensor: int, pipeline: int) -> None:
        """Raises ConfigError unless so many tensor- and pipeline-parallel ranks share the model evenly; names the numbers that do."""
        splits = {
            "num_attention_heads": (self.heads, "tensor_parallel", tensor),
            "num_query_groups": (self.groups, "tensor_parallel", tensor),
            "intermediate_size": (self.ffn, "tensor_parallel", tensor),
            "num_layers": (self.layers, "pipeline_parallel", pipeline),
        }
        for name, (size, setting, ranks) in splits.items():
            if size % ranks:
                divisors = [str(n) for n in range(1, size + 1) if size % n == 0]
                use = ", ".join(divisors[:-1]) + f" or {divisors[-1]}" if len(divisors) > 1 else divisors[0]
                raise ConfigError(f"{setting}={ranks} does not divide {name}={size}; use {use}")


def architecture(hf_config: Any) -> Architecture:
    """Reads a `transformers` config.

    Raises:
        ConfigError: the family is unknown, or some linear layers have biases and others lack them in a way that
            Megatron-Core cannot express.
    """
    if hf_config.model_type not in FAMILIES:
        raise ConfigError(f"model_type={hf_config.model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[hf_config.model_type]
    output_bias, mlp_bias = family.output_bias(hf_config), family.mlp_bias(hf_config)
    if output_bias != mlp_bias:
        raise ConfigError(
            f"{hf_config.model_type} with bias on the attention output ({output_bias}) but not alike on the MLP ({mlp_bias}) is not "
            "supported: Megatron-Core has one switch for both; use a model with attention_bias equal to mlp_bias"
        )
    return Architecture(
        layers=hf_config.num_hidden_layers,
        hidden=hf_config.hidden_size,
        heads=hf_config.num_attention_heads,
        groups=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
        ffn=hf_config.intermediate_size,
        vocab=hf_config.vocab_size,
        tied=hf_config.tie_word_embeddings,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias(hf_config),
        linear_bias=output_bias,
    )
