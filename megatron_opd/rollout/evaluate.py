"""Offline evaluation of Hugging Face folders: exact match of greedy answers, and KL to the teacher on the model's own samples.

Runs in one process of its own with synchronous engines, one after another, the teacher last. It knows no loop and no learner.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams, TokensPrompt

from megatron_opd.data.prompts import Record, end_ids, load_tokenizer
from megatron_opd.interfaces import TeacherBackend
from megatron_opd.runtime.environment import check_packages
from megatron_opd.types import Rollout, Segment

Verifier = Callable[[dict[str, Any], str], float]  # (record, completion without its end) -> 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalModel:
    """One model to look at."""

    path: str  # Hugging Face folder
    tensor_parallel: int = 1
    kv_cache_bytes: int = 256 << 20
    sampled: bool = True  # whether its KL to the teacher is wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How models are sampled."""

    max_response_tokens: int
    max_model_len: int  # tokens, prompt and response together
    dtype: str = "float32"
    max_running: int = 64
    device: str = "cpu"  # "cpu" | "cuda"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One model on the held-out prompts."""

    score: float | None = None  # mean verdict on greedy completions; None: no verifier
    kl: float | None = None  # nats per token, mean of log p - log q over the model's own samples at temperature 1; None: not asked for


def evaluate(
    models: Mapping[str, EvalModel],
    records: Sequence[Record],
    settings: EvalSettings,
    *,
    verifier: Verifier | None = None,
    teacher: Callable[[], TeacherBackend] | None = None,
) -> dict[str, EvalReport]:
    """Evaluates each model by name. `teacher` opens a backend that serves `teacher_token`; it is closed here."""
    check_packages()
    scores: dict[str, float | None] = dict.fromkeys(models)
    samples: dict[str, list[Rollout]] = {}
    for name, model in models.items():
        llm = _open(model, settings)
        try:
            if verifier is not None:
                scores[name] = _score(llm, model.path, records, settings, verifier)
            if model.sampled and teacher is not None:
                samples[name] = _generate(llm, model.path, records, settings, temperature=1.0)
        finally:
            llm.llm_engine.engine_core.shutdown()
        del llm
    divergences = _divergences(samples, teacher) if teacher is not None else {}
    return {name: EvalReport(score=scores[name], kl=divergences.get(name)) for name in models}


def _open(model: EvalModel, settings: EvalSettings) -> LLM:
    return LLM(
        model=model.path,
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=settings.dtype,
        seed=settings.seed,
        tensor_parallel_size=model.tensor_parallel,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_running,
        kv_cache_memory_bytes=model.kv_cache_bytes,
        enforce_eager=settings.device == "cpu",
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )


def _score(llm: LLM, path: str, records: Sequence[Record], settings: EvalSettings, verifier: Verifier) -> float:
    tokenizer = load_tokenizer(path)
    ends = end_ids(path)
    verdicts = []
    for record, rollout in zip(records, _generate(llm, path, records, settings, temperature=0.0)):
        ids = rollout.response_ids.tolist()
        text = tokenizer.decode(ids[:-1] if ids[-1] in ends else ids)
        verdicts.append(verifier(record.fields, text))
    return float(np.mean(verdicts))


def _generate(llm: LLM, path: str, records: Sequence[Record], settings: EvalSettings, *, temperature: float) -> list[Rollout]:
    params = SamplingParams(
        temperature=temperature,
        max_tokens=settings.max_response_tokens,
        stop_token_ids=list(end_ids(path)),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )
    outputs = llm.generate([TokensPrompt(prompt_token_ids=r.prompt_ids.tolist()) for r in records], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return [
        Rollout(
            index=index,
            prompt_ids=record.prompt_ids,
            response_ids=np.asarray(completion.token_ids, dtype=np.int32),
            logp=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
            segments=(Segment(first_token=0, version=0),),
            finish_reason=completion.finish_reason,
        )
        for index, (record, completion) in enumerate(zip(records, completions, strict=True))
    ]


def _divergences(samples: Mapping[str, list[Rollout]], teacher: Callable[[], TeacherBackend]) -> dict[str, float]:
    backend = teacher()
    try:
        return {name: _divergence(rollouts, backend) for name, rollouts in samples.items()}
    finally:
        backend.close()


def _divergence(rollouts: list[Rollout], teacher: TeacherBackend) -> float:
    """KL(p || q) per token, estimated without bias by p's own samples."""
    scores = teacher.score(rollouts)
    gaps = [rollout.logp.astype(np.float64) - score.token_logp for rollout, score in zip(rollouts, scores, strict=True)]
    return float(np.concatenate(gaps).mean())
