"""Make the arithmetic task: problems with worked answers, a tokenizer, and two randomly initialised models.

Any CPU, one core, under one minute, no network. Writes under `--out` (this folder unless told otherwise); the same seed gives
the same bytes:

    data/heldout.jsonl   for the evaluation
    data/prompts.jsonl   for distillation
    data/sft.jsonl       for the supervised training of teacher and student; no problem stands in two files
    build/teacher_init, build/student_init

The problems are `chain_sum` of reasoning_gym: sums and differences of single digits that never fall below zero on the way. A
completion works from left to right and ends with the answer after `#`:

    prompt      7+3-8+5=
    completion  7+3=10-8=2+5=7#7
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MIN_TERMS, MAX_TERMS = 4, 6
ANSWER_MARK = "#"

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
PRINTABLE = [chr(code) for code in range(32, 127)]
VOCABULARY = [PAD, EOS, BOS, UNK, "\n", "\t", *PRINTABLE]  # 101 entries: prime, so nothing divides it by luck


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one Qwen3 model."""

    hidden: int
    layers: int
    intermediate: int
    head_dim: int
    tied: bool


TEACHER = Shape(hidden=192, layers=4, intermediate=512, head_dim=64, tied=False)  # 1.8 M parameters
STUDENT = Shape(hidden=192, layers=4, intermediate=384, head_dim=64, tied=True)  # 1.5 M parameters


def worked_steps(expression: str) -> str | None:
    """Return the running evaluation of a chain of sums, `7+3=10-8=2` for `7+3-8`, or None if a total is negative."""
    first, *rest = re.findall(r"[+-]?\d+", expression)
    total, steps = int(first), first
    for term in rest:
        total += int(term)
        if total < 0:
            return None
        steps += f"{term}={total}"
    return steps


def problems(seed: int) -> Iterator[dict]:
    """Yield distinct problems as records of prompt, completion and answer, without end."""
    seen = set()
    while True:
        batch = reasoning_gym.create_dataset(
            "chain_sum", min_terms=MIN_TERMS, max_terms=MAX_TERMS, min_digits=1, max_digits=1, seed=seed, size=4096
        )
        for item in batch:
            expression = item["metadata"]["expression"].replace(" ", "")
            steps = worked_steps(expression)
            if steps is None or expression in seen:
                continue
            seen.add(expression)
            yield {"prompt": expression + "=", "completion": steps + ANSWER_MARK + item["answer"], "answer": item["answer"]}
        seed += 4096  # reasoning_gym seeds problem i with seed + i


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def write_model(path: Path, shape: Shape, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a randomly initialised model and its tokenizer in Hugging Face format."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=shape.tied,
        dtype="float32",
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ids)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    """Write the data, the tokenizer and the two initial models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--heldout", type=int, default=500, help="number of held-out problems")
    parser.add_argument("--prompts", type=int, default=30_000, help="number of problems for distillation")
    parser.add_argument("--sft", type=int, default=50_000, help="number of problems for supervised training")
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()

    stream = problems(args.seed)
    for name in ("heldout", "prompts", "sft"):
        write_jsonl(args.out / "data" / f"{name}.jsonl", list(itertools.islice(stream, getattr(args, name))))
    tokenizer = make_tokenizer()
    write_model(args.out / "build/teacher_init", TEACHER, args.seed, tokenizer)
    write_model(args.out / "build/student_init", STUDENT, args.seed + 1, tokenizer)


if __name__ == "__main__":
    main()
