"""What the supported model families look like, read from a Hugging Face config. It knows shapes, not tensors.

A new family is one line in `FAMILIES`, when its tensors carry the names of `mapping.rules`. Every field of a config is
read, known to leave the logits alone, or refused by name: a field that nobody knows may change the numbers.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron_opd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A feed-forward layer of experts, each token going to a few: softmax over all, the `active` largest are kept."""

    count: int
    active: int
    normalised: bool  # the kept probabilities are scaled to sum to 1
    block: str  # Hugging Face name of the layer's module
    projections: tuple[str, str, str]  # Hugging Face names of an expert's gate, up and down


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of one `model_type` differ; biases and windows may depend on the config."""

    reads: frozenset[str] = frozenset()  # fields that mean something to this family beside those that all have
    qk_norm: bool = False  # RMSNorm on each query and key head before RoPE
    qkv_bias: Callable[[Any], bool] = lambda config: bool(config.attention_bias)
    output_bias: Callable[[Any], bool] = lambda config: bool(config.attention_bias)  # of the attention output projection
    mlp_bias: Callable[[Any], bool] = lambda config: False
    windows: Callable[[Any], tuple[int | None, ...]] = lambda config: (None,) * config.num_hidden_layers  # see Architecture
    ffn: Callable[[Any], int] = lambda config: config.intermediate_size
    experts: Callable[[Any], Experts | None] = lambda config: None


def _windows_by_layer_type(hf_config: Any) -> tuple[int | None, ...]:
    known = {"full_attention": None, "sliding_attention": hf_config.sliding_window}
    for kind in hf_config.layer_types:
        if kind not in known:
            raise ConfigError(f"{hf_config.model_type}: layer_types holds {kind!r}, which is not supported; use one of {', '.join(known)}")
    if "sliding_attention" in hf_config.layer_types and hf_config.sliding_window is None:
        raise ConfigError(f"{hf_config.model_type}: layer_types holds sliding_attention, but there is no sliding_window; set one")
    return tuple(known[kind] for kind in hf_config.layer_types)


def _one_window(hf_config: Any) -> tuple[int | None, ...]:
    return (hf_config.sliding_window,) * hf_config.num_hidden_layers


def _no_bias(hf_config: Any) -> bool:
    return False


_ROUTING = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"})
_LAYER_TYPES = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

FAMILIES = {
    "llama": Family(reads=frozenset({"attention_bias", "mlp_bias"}), mlp_bias=lambda config: bool(config.mlp_bias)),
    "mistral": Family(
        reads=frozenset({"sliding_window"}),
        qkv_bias=_no_bias,
        output_bias=_no_bias,
        windows=_one_window,
    ),
    "mixtral": Family(
        reads=_ROUTING | {"sliding_window"},
        qkv_bias=_no_bias,
        output_bias=_no_bias,
        windows=_one_window,
        experts=lambda config: Experts(
            count=config.num_local_experts,
            active=config.num_experts_per_tok,
            normalised=True,
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        ),
    ),
    "qwen2": Family(reads=_LAYER_TYPES, qkv_bias=lambda config: True, output_bias=lambda config: False, windows=_windows_by_layer_type),
    "qwen3": Family(reads=_LAYER_TYPES | {"attention_bias"}, qk_norm=True, windows=_windows_by_layer_type),
    "qwen3_moe": Family(
        reads=_ROUTING | {"attention_bias", "moe_intermediate_size", "norm_topk_prob", "max_window_layers"},
        qk_norm=True,
        ffn=lambda config: config.moe_intermediate_size,
        experts=lambda config: Experts(
            count=config.num_experts,
            active=config.num_experts_per_tok,
            normalised=config.norm_topk_prob,
            block="mlp",
            projections=("gate_proj", "up_proj", "down_proj"),
        ),
    ),
}

_READ = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters".split()
)
# Supported at one value only.
_FIXED = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "decoder_sparse_step": (1,),  # experts in every layer
    "mlp_only_layers": ([],),
    "router_jitter_noise": (0,),
    "use_sliding_window": (False,),  # where no family reads it
}
# Names, token ids, initial values, what else a model returns, and leftovers of tools: none reaches the logits.
_WITHOUT_EFFECT = frozenset(
    "_name_or_path architectures auto_map transformers_version dtype torch_dtype initializer_range use_cache return_dict "
    "output_hidden_states output_attentions id2label label2id num_labels problem_type pad_token_id bos_token_id eos_token_id "
    "output_router_logits router_aux_loss_coef "
    "pretraining_tp tokenizer_class is_llama_config transformers.js_config _attn_implementation_autoset attn_implementation "
    "unsloth_fixed unsloth_version".split()
)
# What each kind of rotary embedding reads; "type" is the older name of "rope_type", "finetuned" a remark.
_ROPE = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate finetuned".split()
    ),
}
_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes and switches that decide which tensors exist, what shape they have, and which tokens attend to which."""

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
    windows: tuple[int | None, ...]  # by layer: how many tokens one attends to, itself included; None is all before it
    experts: Experts | None = None  # None: one feed-forward layer for all tokens; else `ffn` is the size of each expert

    @property
    def ffn_per_token(self) -> int:
        """Values between the projections of a feed-forward layer that one token makes."""
        return self.ffn * (self.experts.active if self.experts else 1)

    def stages(self, pipeline: int, given: Sequence[int] = ()) -> tuple[int, ...]:
        """Layers of each pipeline stage: those `given`, else as even as they get; the last, which has the head, and the first have fewest.

        Raises:
            ConfigError: a stage would have none, or `given` is not a division of the layers among so many.
        """
        if pipeline > self.layers:
            raise ConfigError(f"pipeline_parallel={pipeline} exceeds num_layers={self.layers}; use {self.layers} or fewer")
        if given and (len(given) != pipeline or min(given) < 1 or sum(given) != self.layers):
            raise ConfigError(
                f"pipeline_layers={list(given)} must be {pipeline} numbers of layers, for pipeline_parallel={pipeline}, that are 1 or more "
                f"and sum to num_layers={self.layers}"
            )
        least, more = divmod(self.layers, pipeline)
        richest_first = [*range(1, pipeline - 1), 0, pipeline - 1]
        return tuple(given) or tuple(least + (stage in richest_first[:more]) for stage in range(pipeline))

    def stage_of(self, layer: int, stages: Sequence[int]) -> int:
        """The pipeline stage that holds the layer, where they hold so many each."""
        return bisect(list(accumulate(stages)), layer)

    def expert_rank(self, expert: int | None, ranks: int) -> int:
        """Which of `ranks` that share the experts holds this one, in consecutive parts; the first answers for what all hold."""
        return 0 if expert is None else expert * ranks // self.experts.count

    def require_divisible(self, *, tensor: int, pipeline: int, expert: int = 1, layers: Sequence[int] = ()) -> None:
        """Raises ConfigError unless so many tensor- and expert-parallel ranks share the model evenly, and pipeline stages as they can."""
        self.stages(pipeline, layers)
        if self.experts is None and expert > 1:
            raise ConfigError(f"expert_parallel={expert} splits experts over ranks, and this model has none; use 1")
        splits = {
            "num_attention_heads": (self.heads, "tensor_parallel", tensor),
            "num_query_groups": (self.groups, "tensor_parallel", tensor),
            "intermediate_size": (self.ffn, "tensor_parallel", tensor),
            "num_experts": (self.experts.count if self.experts is not None else 1, "expert_parallel", expert),
        }
        for name, (size, setting, ranks) in splits.items():
            if size % ranks:
                divisors = [str(n) for n in range(1, size + 1) if size % n == 0]
                use = ", ".join(divisors[:-1]) + f" or {divisors[-1]}" if len(divisors) > 1 else divisors[0]
                raise ConfigError(f"{setting}={ranks} does not divide {name}={size}; use {use}")

    def require_trainable(self, *, tensor: int, sequence_parallel: bool) -> None:
        """Raises ConfigError where Megatron-Core would refuse the first training step: experts over tensor ranks want tokens split too."""
        if self.experts is not None and tensor > 1 and not sequence_parallel:
            raise ConfigError(
                f"tensor_parallel={tensor} trains {self.experts.count} experts only with sequence_parallel=true; switch it on or use 1"
            )


def architecture(hf_config: Any) -> Architecture:
    """Reads a `transformers` config.

    Raises:
        ConfigError: the family is unknown, a field would change the numbers in a way that is not supported, or some linear
            layers have biases and others lack them in a way that Megatron-Core cannot express.
    """
    if hf_config.model_type not in FAMILIES:
        raise ConfigError(f"model_type={hf_config.model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[hf_config.model_type]
    _check_fields(hf_config, family)
    _check_rope(hf_config)
    output_bias, mlp_bias = family.output_bias(hf_config), family.mlp_bias(hf_config)
    if output_bias != mlp_bias:
        raise ConfigError(
            f"{hf_config.model_type} with bias on the attention output ({output_bias}) but not alike on the MLP ({mlp_bias}) is not "
            "supported: Megatron-Core has one switch for both; use a model with attention_bias equal to mlp_bias"
        )
    experts = family.experts(hf_config)
    if experts is not None and output_bias:
        raise ConfigError(
            f"{hf_config.model_type} with attention_bias=True is not supported: Megatron-Core would give the experts biases too"
        )
    return Architecture(
        layers=hf_config.num_hidden_layers,
        hidden=hf_config.hidden_size,
        heads=hf_config.num_attention_heads,
        groups=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
        ffn=family.ffn(hf_config),
        vocab=hf_config.vocab_size,
        tied=hf_config.tie_word_embeddings,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias(hf_config),
        linear_bias=output_bias,
        windows=family.windows(hf_config),
        experts=experts,
    )


def numerics(hf_config: Any) -> dict[str, Any]:
    """The fields on which the logits depend."""
    return {name: value for name, value in hf_config.to_dict().items() if value is not None and name not in _WITHOUT_EFFECT}


def _check_fields(hf_config: Any, family: Family) -> None:
    """A field that is null says nothing."""
    for name, value in numerics(hf_config).items():
        if name in _FIXED and name not in family.reads and value not in _FIXED[name]:
            wanted = " or ".join(map(repr, _FIXED[name]))
            raise ConfigError(f"{hf_config.model_type}: {name}={value!r} is not supported; wanted {wanted}")
        if name not in _READ | family.reads | _FIXED.keys():
            raise ConfigError(
                f"{hf_config.model_type}: config.json holds {name}={value!r}, which is unknown and may change the numbers; "
                "remove it from config.json if it does not"
            )


def _check_rope(hf_config: Any) -> None:
    rope = hf_config.rope_parameters
    kind = rope.get("rope_type")
    if kind not in _ROPE:
        raise ConfigError(f"{hf_config.model_type}: rope_scaling of type {kind!r} is not supported; use one of {', '.join(_ROPE)}")
    for name, value in rope.items():
        if value is not None and name not in _ROPE[kind] | _ROPE_COMMON:
            raise ConfigError(
                f"{hf_config.model_type}: rope_scaling of type {kind!r} holds {name}={value!r}, which is unknown and may change the "
                "numbers; remove it from config.json if it does not"
            )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"{hf_config.model_type}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only whole heads are rotated"
        )
