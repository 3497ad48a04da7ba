"""Evaluation: the KL estimate meets the exact KL, the verifier sees text without its end, and a model equals itself."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_opd.config import TeacherConfig
from megatron_opd.data.prompts import Record
from megatron_opd.rollout.evaluate import EvalModel, EvalSettings, evaluate
from megatron_opd.teacher.vllm import VLLMTeacher
from megatron_opd.types import Needs
from tests.rollout.models import END, VOCAB, forward_logp, save_model

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    made = {name: save_model(folder / name, seed) for seed, name in enumerate(["student", "teacher"])}
    words = {f"w{i} ": i for i in range(VOCAB)} | {"<end>": END}
    words.pop(f"w{END} ")
    for path in made.values():
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0 "))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return made


def test_reports_of_two_models(paths):
    records = [
        Record(fields={"number": i}, prompt_ids=np.random.default_rng(i).integers(4, VOCAB, 5).astype(np.int32), completion_ids=None)
        for i in range(300)
    ]
    seen = []

    def verifier(record, completion):
        seen.append((record["number"], completion))
        return float(record["number"] % 4 == 0)

    def teacher():
        config = TeacherConfig(backend="vllm", path=paths["teacher"], dtype="float32", kv_cache_bytes=16 << 20)
        return VLLMTeacher(config, needs=Needs(teacher_token=True), max_model_len=32)

    settings = EvalSettings(max_response_tokens=1, max_model_len=32)
    models = {name: EvalModel(path=path, kv_cache_bytes=16 << 20) for name, path in paths.items()}
    reports = evaluate(models, records, settings, verifier=verifier, teacher=teacher)
    assert reports["student"].score == reports["teacher"].score == 0.25
    assert [number for number, _ in seen] == [*range(300), *range(300)]
    assert all("<end>" not in text for _, text in seen)
    assert abs(reports["teacher"].kl) < 1e-4, "a model does not differ from itself"
    exact, variance = [], []
    for record in records:
        p, q = (forward_logp(paths[name], record.prompt_ids, [0])[0].double() for name in ("student", "teacher"))
        exact.append(torch.sum(p.exp() * (p - q)).item())
        variance.append(torch.sum(p.exp() * (p - q) ** 2).item() - exact[-1] ** 2)
    assert abs(reports["student"].kl - np.mean(exact)) < 4 * np.sqrt(np.mean(variance) / 300) < 0.25 * np.mean(exact)
