"""Tiny Hugging Face models with awkward sizes, loud enough that a wrong head, norm or bias shows."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_opd.types import IdSet, MicroBatch

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
}
SIZES = {
    "vocab_size": 507,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "rope_theta": 1000.0,
}


def config(family: str, **overrides) -> PretrainedConfig:
    head = {"head_dim": 16} if family.startswith("qwen3") else {}
    return CONFIGS[family](**{**SIZES, **head, **EXPERTS.get(family, {}), **overrides})


def write_model(folder: Path, family: str, **overrides) -> str:
    """Saves a random float32 model with perturbed norms and biases; returns the folder."""
    transformers.set_seed(7)
    model = AutoModelForCausalLM.from_config(config(family, **overrides), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return str(folder)


def read_config(folder: str) -> PretrainedConfig:
    return AutoConfig.from_pretrained(folder)


def read_model(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")


def count_layers(model: torch.nn.Module) -> list[int]:
    """A list that grows by the number of a layer of Megatron's model whenever that layer runs, in a backward pass too."""
    calls: list[int] = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda layer, inputs, output: calls.append(layer.layer_number))
    return calls


def pack(sequences: Sequence[torch.Tensor]) -> MicroBatch:
    """The sequences end to end; each token's target is the one before it."""
    token_ids, lengths = torch.cat(tuple(sequences)), [len(ids) for ids in sequences]
    return MicroBatch(
        token_ids=token_ids,
        positions=torch.cat([torch.arange(n) for n in lengths]),
        boundaries=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        sequences=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        mask=torch.ones(len(token_ids), dtype=torch.bool),
        token=IdSet(ids=token_ids.roll(1)[:, None], behaviour_logp=None, teacher_logp=None),
    )


def micro_batch(lengths: tuple[int, ...], seed: int = 0, vocab: int = 507) -> MicroBatch:
    """Random sequences, packed."""
    generator = torch.Generator().manual_seed(seed)
    return pack([torch.randint(vocab, (n,), generator=generator) for n in lengths])


def sequences(batch: MicroBatch) -> list[torch.Tensor]:
    return list(batch.token_ids.split(batch.boundaries.diff().tolist()))


# Lengths differ between micro-batches: a pipeline must not take the first one's for all.
BATCHES = [micro_batch((7, 1, 12), seed=1), micro_batch((26,), seed=2), micro_batch((3, 5), seed=3), micro_batch((8,), seed=4)]
