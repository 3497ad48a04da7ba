"""Tiny models with a tokenizer, a prompt file, and the real command line on them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.model.tiny import SIZES, write_model


def write_tokenizer(folder: str, first: str = "w000") -> None:
    """One word, one id; the last id ends a sequence. `first` renames word 0, to make another tokenizer."""
    vocab = {(first if i == 0 else f"w{i:03}"): i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w001"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w506", pad_token="w505", unk_token="w001").save_pretrained(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"eos_token_id": 506}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A folder with everything that a run reads."""

    folder: Path
    student: str
    teacher: str

    def config(self, name: str, **sections: dict) -> Path:
        """Writes a config for a run called `name` and returns its path."""
        base = {
            "run": {"dir": str(self.folder / name), "start_timeout_s": 120, "peer_timeout_s": 60},
            "student": {"path": self.student},
            "teacher": {"path": self.teacher, "dtype": "float32"},
            "data": {"prompts": str(self.folder / "prompts.jsonl"), "max_prompt_tokens": 16},
            "rollout": {"max_response_tokens": 24, "dtype": "float32", "max_running": 8, "kv_cache_bytes": 8 << 20},
            "learner": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}},
            "loop": {"steps": 1, "batch": 8, "max_lag": 0},
        }
        file = self.folder / f"{name}.yaml"
        OmegaConf.save(OmegaConf.merge(base, sections), file)
        return file

    def steps(self, name: str) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


def make(folder: Path, family: str = "llama", **overrides: object) -> Tiny:
    """Student and a different teacher of one architecture, sharing a tokenizer, and 40 prompts."""
    overrides = {"hidden_size": 192, "head_dim": 32, **overrides}  # the CPU build of vLLM attends with heads of 32 and more
    student = write_model(folder / "student", family, **overrides)
    teacher = write_model(folder / "teacher", family, **{**overrides, "num_hidden_layers": 2})
    for path in (student, teacher):
        write_tokenizer(path)
    lines = [json.dumps({"prompt": " ".join(f"w{(7 * i + 11 * j) % 500:03}" for j in range(1 + i % 9))}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return Tiny(folder=folder, student=student, teacher=teacher)


def start(config: Path, *overrides: str) -> subprocess.Popen:
    """`megatron-opd train` as a process of its own."""
    command = [sys.executable, "-m", "megatron_opd", "train", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def train(config: Path, *overrides: str, timeout_s: float = 280) -> str:
    """Runs to the end and returns what was printed; a failed run fails the test with it."""
    process = start(config, *overrides)
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output
