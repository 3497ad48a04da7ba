"""What may be trained on passes, and each way to be unfit is named."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_opd.data.faults import Limits, fault_of
from megatron_opd.types import Needs
from tests.learner.cases import trajectories

LIMITS = Limits(vocab_size=31, response_tokens=13)
NEEDS = Needs(
    behaviour_logp=True, head=3, draws=2, teacher_token=True, teacher_head=True, head_rest=True, teacher_draws=True, teacher_top=2
)
(GOOD,) = trajectories(NEEDS, vocab=31, lengths=((3, 9),))


def test_what_rollouts_and_teachers_make_passes():
    for one in trajectories(NEEDS, vocab=31, lengths=((3, 9), (1, 1), (4, 13))):
        assert fault_of(one.rollout, one.rollout, LIMITS) is None and fault_of(one.teacher, one.rollout, LIMITS) is None


def changed(array, value):
    array = array.copy()
    array.flat[4] = value
    return array


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response_ids", 31, "response_ids from 0 to 31 in a vocabulary of 31"),
        ("head_ids", -1, "head_ids from -1 to"),
        ("draw_ids", 1 << 30, "draw_ids from"),
        ("logp", np.nan, "logp holds nan in row 4"),
        ("head_logp", np.inf, "head_logp holds inf in row 1"),
        ("draw_logp", -np.inf, "draw_logp holds -inf"),
    ],
)
def test_a_rollout_out_of_range_is_named(field, value, message):
    rollout = replace(GOOD.rollout, response_ids=np.zeros(9, np.int32))
    broken = replace(rollout, **{field: changed(getattr(rollout, field), value)})
    assert fault_of(broken, broken, LIMITS).startswith(message)


@pytest.mark.parametrize("field", ["logp", "head_ids", "head_logp", "draw_counts", "draw_sizes", "draw_logp"])
def test_a_rollout_whose_arrays_do_not_fit_is_named(field):
    short = replace(GOOD.rollout, **{field: getattr(GOOD.rollout, field)[:-1]})
    assert f"{field} has {len(getattr(short, field))} rows, wanted {len(getattr(short, field)) + 1} for" in fault_of(short, short, LIMITS)


@pytest.mark.parametrize("field", ["token_logp", "head_logp", "head_log_rest", "draw_logp", "top_ids", "top_logp"])
def test_scores_of_another_length_are_named(field):
    long = replace(GOOD.teacher, **{field: np.repeat(getattr(GOOD.teacher, field), 2, axis=0)})
    assert f"{field} has {len(getattr(long, field))} rows, wanted" in fault_of(long, GOOD.rollout, LIMITS)


def test_hidden_states_that_are_not_numbers_are_named():
    bits = torch.ones(9, 4, dtype=torch.bfloat16).view(torch.uint16).numpy()
    assert fault_of(replace(GOOD.teacher, hidden=bits), GOOD.rollout, LIMITS) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.ones(9, 4, dtype=torch.bfloat16)
        bad[5, 1] = value
        assert "hidden holds" in fault_of(replace(GOOD.teacher, hidden=bad.view(torch.uint16).numpy()), GOOD.rollout, LIMITS)


def test_scores_that_are_not_numbers_are_named():
    for field in ("token_logp", "head_logp", "top_logp", "draw_logp", "head_log_rest"):
        broken = replace(GOOD.teacher, **{field: changed(getattr(GOOD.teacher, field), np.nan)})
        assert fault_of(broken, GOOD.rollout, LIMITS).startswith(f"{field} holds nan")
    assert fault_of(replace(GOOD.teacher, head_log_rest=changed(GOOD.teacher.head_log_rest, -np.inf)), GOOD.rollout, LIMITS) is None
    assert fault_of(replace(GOOD.teacher, top_ids=changed(GOOD.teacher.top_ids, 31)), GOOD.rollout, LIMITS).startswith("top_ids from")


@pytest.mark.parametrize("length", [0, 14])
def test_an_empty_or_overlong_response_is_named(length):
    rollout = replace(GOOD.rollout, response_ids=np.zeros(length, np.int32))
    assert fault_of(rollout, rollout, LIMITS) == f"the response has {length} tokens, wanted 1 to 13 (rollout.max_response_tokens)"
