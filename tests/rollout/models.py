"""Tiny random Qwen3 folders without a tokenizer, and the plain forward pass that engines are compared with."""

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 507
END = 3


def save_model(folder: Path, seed: int, *, tied: bool = False, vocab: int = VOCAB, hidden: int = 64, layers: int = 2) -> str:
    """Writes a model whose distributions have structure: with torch's usual small initial weights any comparison would pass."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        eos_token_id=END,
        pad_token_id=END,
        initializer_range=0.2 if tied else 0.1,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if not tied:
            model.lm_head.weight.mul_(3)
    model.save_pretrained(folder)
    return str(folder)


def save_experts(folder: Path, seed: int) -> str:
    """A model whose feed-forward layers are experts."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        eos_token_id=END,
        pad_token_id=END,
        initializer_range=0.1,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.lm_head.weight.mul_(3)
    model.save_pretrained(folder)
    return str(folder)


@cache
def _model(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def forward_logp(path: str, prompt_ids, response_ids, temperature: float = 1.0) -> torch.Tensor:
    """[R, V] log-probabilities of the distributions that predict each response token, by transformers in float32."""
    ids = torch.tensor([[*map(int, prompt_ids), *map(int, response_ids)]])
    with torch.no_grad():
        logits = _model(path)(ids).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)
