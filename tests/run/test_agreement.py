"""vLLM's log-probabilities are the learner's, for every architecture, before an update and after it: the largest error of all ids counts.

Learner and engine stand in one process, so that twelve models cost one start; the wires between them are tested by whole runs.
"""

import numpy as np
import pytest

from megatron_opd.config import LearnerConfig, OptimizerConfig, RolloutConfig
from megatron_opd.types import Estimate, Needs, Prompt, Trajectory
from tests.engines import engine_environment
from tests.model.tiny import read_config, write_model
from tests.ranks import run_ranks

__all__ = ["engine_environment"]
pytestmark = pytest.mark.engines

WINDOW = 5  # much shorter than any sequence
ROPE = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
TIED = {"tie_word_embeddings": True}
# Experts first: vLLM makes one process group more for them, once in a process.
CASES = {
    "untied mixtral, window": ("mixtral", {"sliding_window": WINDOW}),
    "tied mixtral": ("mixtral", {"sliding_window": None, **TIED}),
    "untied qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "tied qwen3_moe, probabilities not normalised": ("qwen3_moe", {"norm_topk_prob": False, **TIED}),
    "untied mistral, yarn": ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "tied mistral, window": ("mistral", {"sliding_window": WINDOW, **TIED}),
    "untied llama, biases, llama3": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "tied llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, **TIED}),
    "untied qwen2": ("qwen2", {}),
    "tied qwen2": ("qwen2", TIED),
    "untied qwen3": ("qwen3", {}),
    "tied qwen3": ("qwen3", TIED),
}
NEEDS = Needs(behaviour_logp=True, head=8, draws=4)
PROMPTS, RESPONSE = 8, 16


class Likelihood:
    """Trains on its own samples, and keeps the largest |log p - log b| of each micro-batch: over tokens, head and draws."""

    needs = NEEDS

    def __init__(self):
        self.errors = []

    def __call__(self, scores):
        for ids in (scores.token, scores.head, scores.draws):
            counts = scores.mask[:, None] if ids.counts is None else scores.mask[:, None] & (ids.counts > 0)
            self.errors.append((ids.student_logp.detach() - ids.behaviour_logp)[counts.expand_as(ids.ids)].abs().max().item())
        return Estimate(loss=-scores.token.student_logp[:, 0])


def errors(folders):
    """Case -> largest errors before the first update and after it, and of what the first weights sampled when seen by the second."""
    from megatron_opd.learner.learner import Learner, StudentModel
    from megatron_opd.rollout.engine import EngineSettings
    from megatron_opd.rollout.inprocess import InProcessRollout
    from megatron_opd.runtime.collective import Ranks

    rollout = RolloutConfig(dtype="float32", max_running=PROMPTS, max_response_tokens=RESPONSE, kv_cache_bytes=4 << 20)
    engines = {
        name: InProcessRollout(EngineSettings(rollout=rollout, path=path, needs=NEEDS, max_model_len=64), rank=0)
        for name, path in folders.items()
    }
    return {name: _errors(folders[name], engine, Learner, StudentModel, Ranks()) for name, engine in engines.items()}


def _errors(path, engine, Learner, StudentModel, ranks):
    student = StudentModel(path=path, hf_config=read_config(path), steps=3, seed=0, device="cpu")
    settings, estimator = LearnerConfig(micro_batch_tokens=64, optimizer=OptimizerConfig(lr=3e-3)), Likelihood()
    learner = Learner(student, settings, estimator, ranks)

    def sampled(version):
        engine.load(version, learner.weights("float32"))
        prompts = [Prompt(index=i, token_ids=np.arange(3 * i, 4 * i + 2 + version, dtype=np.int32)) for i in range(PROMPTS)]
        return [Trajectory(rollout=one, teacher=None) for one in engine.generate(prompts)]

    def seen(batch):
        estimator.errors.clear()
        assert not learner.train(batch).skipped
        return list(estimator.errors)

    first = sampled(0)
    before = seen(first)
    after = seen(sampled(1))
    return {"before": before, "after": after, "stale": seen(first), "tokens": sum(len(one.rollout.response_ids) for one in first)}


@pytest.fixture(scope="module")
def found(tmp_path_factory, engine_environment):
    root = tmp_path_factory.mktemp("architectures")
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 192,
        "head_dim": 32,
        "eos_token_id": 506,
    }
    folders = {name: write_model(root / str(i), family, **sizes, **other) for i, (name, (family, other)) in enumerate(CASES.items())}
    return run_ranks(errors, 1, folders, timeout_s=240)[0]


@pytest.mark.parametrize("case", CASES)
def test_every_log_probability_of_vllm_is_the_learners_before_and_after_an_update(case, found):
    one = found[case]
    assert one["tokens"] > 50 and max(one["stale"]) > 0.1, "the update is one that would be missed"
    for when in ("before", "after"):
        assert all(error < 1e-3 for error in one[when]), f"{when} the update a log-probability is off by {max(one[when]):.1e}"
