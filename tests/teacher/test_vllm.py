"""A real vLLM teacher: entry r of every score belongs to the distribution that predicts response token r."""

import numpy as np
import pytest
import torch

from megatron_opd.config import TeacherConfig
from megatron_opd.errors import ConfigError
from megatron_opd.teacher.vllm import VLLMTeacher
from megatron_opd.types import Divergence, Needs, Rollout, Segment
from tests.rollout.models import VOCAB, forward_logp, save_model

pytestmark = pytest.mark.engines


def rollout(index, prompt_tokens, response_tokens):
    random = np.random.default_rng(index)
    return Rollout(
        index=index,
        prompt_ids=random.integers(0, VOCAB, prompt_tokens).astype(np.int32),
        response_ids=random.integers(0, VOCAB, response_tokens).astype(np.int32),
        segments=(Segment(first_token=0, version=0),),
        finish_reason="length",
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), 5)


ROLLOUTS = [rollout(3, 1, 1), rollout(4, 17, 5), rollout(5, 1, 90), rollout(6, 60, 40), rollout(7, 99, 1)]


@pytest.mark.parametrize("needs", [Needs(teacher_token=True), Needs(teacher_top=7), Needs(teacher_token=True, teacher_top=30)], ids=str)
def test_scores_equal_the_forward_pass_at_every_response_position(path, needs):
    config = TeacherConfig(backend="vllm", path=path, dtype="float32", batch_tokens=64, kv_cache_bytes=16 << 20)
    teacher = VLLMTeacher(config, needs=needs, max_model_len=100)
    try:
        scores = teacher.score(ROLLOUTS)
        assert [s.index for s in scores] == [r.index for r in ROLLOUTS]
        for one, score in zip(ROLLOUTS, scores, strict=True):
            logp = forward_logp(path, one.prompt_ids, one.response_ids)
            assert (score.token_logp is not None) == needs.teacher_token and (score.top_ids is not None) == (needs.teacher_top > 0)
            if needs.teacher_token:
                expected = logp.gather(-1, torch.tensor(one.response_ids).long()[:, None])[:, 0]
                assert score.token_logp.dtype == np.float32 and np.abs(score.token_logp - expected.numpy()).max() < 1e-4
            if needs.teacher_top:
                assert score.top_ids.shape == (len(one.response_ids), needs.teacher_top) and score.top_ids.dtype == np.int32
                assert np.abs(score.top_logp - logp.topk(needs.teacher_top)[0].numpy()).max() < 1e-4
                assert np.abs(score.top_logp - logp.gather(-1, torch.tensor(score.top_ids).long()).numpy()).max() < 1e-4
    finally:
        teacher.close()


UNSERVED = {"teacher_head": True, "teacher_draws": True, "divergence": Divergence(kind="reverse"), "moments": True}


@pytest.mark.parametrize("named", UNSERVED)
def test_needs_that_vllm_cannot_serve_name_the_remedy(named):
    needs = Needs(**{named: UNSERVED[named]})
    with pytest.raises(ConfigError, match=f"{named} is asked for; set teacher.backend=megatron"):
        VLLMTeacher(TeacherConfig(backend="vllm", path="nowhere"), needs=needs, max_model_len=8)
