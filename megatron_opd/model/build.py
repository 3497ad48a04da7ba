"""Megatron-Core GPTModels from Hugging Face configs. It refuses what it cannot reproduce, and loads no weights.

Dimension key: T packed tokens, D hidden, V vocabulary.
"""

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_opd.errors import ConfigError
from megatron_opd.model.attention import PackedAttention
from megatron_opd.model.norm import RMSNorm
from megatron_opd.model.parallel import ParallelConfig, padded_vocab
from megatron_opd.weights.architectures import Architecture, architecture


def build(
    hf_config: PretrainedConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    recompute: bool = False,
    device: torch.device | str = "cpu",
    fp8_recipe: str | None = None,
) -> GPTModel:
    """This rank's part of the model, its weights zero (norms one) until `convert.load_hf` fills them; after `parallel.initialize`.

    Its last pipeline stage returns hidden states after the final norm, never logits; read it with `forward.forward_hidden`
    and multiply with `head_weight`. `fp8_recipe`, a name of `learner.fp8.recipe`, has Megatron run the layers' products in FP8.

    Raises:
        ConfigError: the config asks for something that would change the numbers and is not supported, `parallel` does
            not divide the model, or CUDA comes without Transformer Engine.
    """
    arch = architecture(hf_config)
    arch.require_divisible(tensor=parallel.tensor, pipeline=parallel.pipeline, expert=parallel.expert, layers=parallel.layers)
    on_cuda = torch.device(device).type == "cuda"
    config = _transformer_config(
        arch, hf_config.rms_norm_eps, parallel, dtype=dtype, recompute=recompute, on_cuda=on_cuda, fp8_recipe=fp8_recipe
    )
    frequencies, attention_factor = _rope(hf_config)
    # YaRN scales cosine and sine, of queries and of keys. Fused rotation of packed sequences cannot; the softmax can.
    config.softmax_scale = attention_factor**2 / math.sqrt(arch.head_dim) if attention_factor != 1 else None
    model = GPTModel(
        config,
        _te_spec(arch) if on_cuda else _local_spec(arch, parallel),
        vocab_size=padded_vocab(arch.vocab, parallel.tensor),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
    )
    if frequencies is not None:
        model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
    if model.post_process:
        # The head stays a module that GPTModel calls, so the hooks by which data parallelism gathers and reduces its
        # weight fire as ever; only the product with the weight is left to the kernels.
        model.output_layer.forward = _hand_through
    return model.to(device)


def head_weight(model: nn.Module) -> nn.Parameter:
    """[V / TP, D], rows past the vocabulary zero: the LM head of the last stage, under any wrapper; the embedding when tied."""
    gpt = gpt_of(model)
    assert gpt.post_process, "only the last pipeline stage holds the LM head"
    return gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else gpt.output_layer.weight


def gpt_of(model: nn.Module) -> GPTModel:
    """The GPTModel inside Megatron's wrappers."""
    return get_attr_wrapped_model(model, "shared_embedding_or_output_weight", return_model_obj=True)


def _hand_through(hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, None]:
    return hidden, None


def _transformer_config(
    arch: Architecture,
    eps: float,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    recompute: bool,
    on_cuda: bool,
    fp8_recipe: str | None,
) -> TransformerConfig:
    widths = {window for window in arch.windows if window is not None}
    assert len(widths) <= 1, "all windows of a model are equally wide"
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.groups,
        window_size=(min(widths) - 1, 0) if widths else None,
        window_attn_skip_freq=[int(window is not None) for window in arch.windows] if widths else None,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=eps,
        qk_layernorm=arch.qk_norm,
        add_qkv_bias=arch.qkv_bias,
        add_bias_linear=arch.linear_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        **parallel.megatron_sizes(),
        pipeline_model_parallel_layout=_stages(arch, parallel),
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,  # packed micro-batches differ in T, and pipeline stages must tell each other
        moe_token_dispatcher_type="alltoall",  # its default is refused beside variable_seq_lengths, with and without experts
        **_experts(arch),
        # Zeros rather than no initialization: that would also leave out the marks by which the gradient norm tells
        # sharded weights from replicated ones.
        init_method=nn.init.zeros_,
        output_layer_init_method=nn.init.zeros_,
        embedding_init_method=nn.init.zeros_,
        calculate_per_token_loss=True,  # the loss function returns a sum and a count; DDP reads this when it is built
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        use_cpu_initialization=not on_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=on_cuda,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        apply_rope_fusion=on_cuda,
        **fp8_settings(fp8_recipe),
    )


def _stages(arch: Architecture, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each pipeline stage holds, as Megatron spells it."""
    if parallel.pipeline == 1:
        return None
    stages = [["decoder"] * layers for layers in arch.stages(parallel.pipeline, parallel.layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def fp8_settings(recipe: str | None) -> dict[str, str]:
    """Megatron's names for a recipe, and the format that TransformerEngine has for it by default; nothing without one."""
    names = {"current": "tensorwise", "delayed": "delayed", "blockwise": "blockwise", "mxfp8": "mxfp8"}
    if recipe is None:
        return {}
    return {"fp8": "hybrid" if recipe in ("current", "delayed") else "e4m3", "fp8_recipe": names[recipe]}


def _experts(arch: Architecture) -> dict[str, Any]:
    """Without a loss for balance, which is no part of the objective."""
    if arch.experts is None:
        return {}
    if arch.experts.active == 1 and arch.experts.normalised:
        raise ConfigError("num_experts_per_tok=1 with normalised probabilities is not supported: the router would get no gradient; use 2")
    return {
        "num_moe_experts": arch.experts.count,
        "moe_ffn_hidden_size": arch.ffn,
        "moe_router_topk": arch.experts.active,
        "moe_router_pre_softmax": not arch.experts.normalised,  # softmax behind the choice is normalised by itself
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _te_spec(arch: Architecture) -> ModuleSpec:
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError("device=cuda needs Transformer Engine; install transformer-engine[pytorch] or set device=cpu")
    return get_gpt_layer_with_transformer_engine_spec(num_experts=_count(arch), moe_grouped_gemm=False, qk_layernorm=arch.qk_norm)


def _count(arch: Architecture) -> int | None:
    return arch.experts.count if arch.experts is not None else None


def _local_spec(arch: Architecture, parallel: ParallelConfig) -> TransformerBlockSubmodules:
    """Megatron's own linear layers with a norm that knows sequence parallelism and an attention that knows packing."""
    layer = get_gpt_layer_local_spec(num_experts=_count(arch), moe_grouped_gemm=False, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers_here = arch.stages(parallel.pipeline, parallel.layers)[parallel_state.get_pipeline_model_parallel_rank()]
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=RMSNorm)


def _rope(hf_config: Any) -> tuple[Tensor | None, float]:
    """Frequencies, None for Megatron's own, and the factor of cosine and sine, as `transformers` computes them.

    Megatron's scaling has llama 3.1's constants built in, and its YaRN no explicit attention factor.
    """
    rope_type = hf_config.rope_parameters["rope_type"]
    return (None, 1.0) if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
