"""Each treatment of the ratio against numbers worked out by hand, away from b = p: its surrogate, and the gradient for log p."""

from math import exp

import pytest
import torch

from megatron_opd.estimators.importance import Correction
from megatron_opd.types import IdScores, TokenScores


def surrogate(correction, log_ratios, advantages, *, sequences=None, counts=None):
    """Surrogate and gradient for log p, each as flat lists; one token a row, or with `counts` one row of that many ids."""
    log_r, advantage = torch.tensor(log_ratios, dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64)
    shape = (-1, 1) if counts is None else (1, -1)
    student = torch.full(log_r.shape, -2.0, dtype=torch.float64).view(shape).requires_grad_()
    weights = None if counts is None else torch.tensor(counts, dtype=torch.float64).view(shape)
    ids = IdScores(
        ids=torch.zeros(student.shape, dtype=torch.int64),
        counts=weights,
        student_logp=student,
        behaviour_logp=student.detach() - log_r.view(shape),
        teacher_logp=None,
    )
    rows = len(student)
    scores = TokenScores(
        mask=torch.ones(rows, dtype=torch.bool),
        sequences=torch.tensor(sequences or [0] * rows),
        token=ids if counts is None else None,
        draws=None if counts is None else ids,
    )
    made = correction(ids, advantage.view(shape), scores)
    (gradient,) = torch.autograd.grad(made.sum(), student)
    return made.flatten().tolist(), gradient.flatten().tolist()


UP, FAR, DOWN = 0.1, 1.2, -0.7  # log p/b: r is 1.11, 3.32 and 0.50


@pytest.mark.parametrize(
    ("kind", "log_r", "advantage", "value", "gradient"),
    [
        ("ratio", FAR, 2.0, 2 * exp(FAR), 2 * exp(FAR)),
        ("ratio", DOWN, -2.0, -2 * exp(DOWN), -2 * exp(DOWN)),
        ("none", FAR, 2.0, 2.0, 2.0),
        ("none", DOWN, -2.0, -2.0, -2.0),
        ("ppo", UP, 2.0, 2 * exp(UP), 2 * exp(UP)),
        ("ppo", FAR, 2.0, 2 * 1.2, 0.0),  # it has gone far enough
        ("ppo", FAR, -2.0, -2 * exp(FAR), -2 * exp(FAR)),  # and may always come back
        ("ppo", DOWN, 2.0, 2 * exp(DOWN), 2 * exp(DOWN)),
        ("ppo", DOWN, -2.0, -2 * 0.8, 0.0),
        ("truncated", UP, 2.0, 2 * exp(UP), 2 * exp(UP)),
        ("truncated", FAR, 2.0, 2 * 2.0, 2 * 2.0),  # the cap weighs, and leaves the gradient
        ("truncated", FAR, -2.0, -2 * 2.0, -2 * 2.0),
        ("decoupled", UP, -2.0, -2 * exp(UP), -2 * exp(UP)),
        ("decoupled", FAR, 2.0, 0.0, 0.0),
        ("decoupled", FAR, -2.0, 0.0, 0.0),
        ("decoupled", DOWN, -2.0, -2 * exp(DOWN), -2 * exp(DOWN)),
    ],
)
def test_one_token_by_hand(kind, log_r, advantage, value, gradient):
    got = surrogate(Correction(kind=kind), [log_r], [advantage])
    assert got == ([pytest.approx(value)], [pytest.approx(gradient)])


@pytest.mark.parametrize("sign", [1, -1])
def test_m2po_leaves_all_alone_on_either_side_while_the_budget_holds(sign):
    log_r = [0.1, -0.25, 0.19]  # a mean square of 0.0362, with a last one past PPO's clip on one side and a middle one on the other
    _, gradient = surrogate(Correction(kind="m2po"), log_r, [sign * 2.0] * 3)
    assert gradient == pytest.approx([sign * 2 * exp(value) for value in log_r])


@pytest.mark.parametrize("sign", [1, -1])
def test_m2po_drops_what_breaks_the_budget_unless_it_returns_and_in_that_response_alone(sign):
    log_r, sequences = [0.1, 0.5, 0.1, -0.5, 0.25], [0, 0, 1, 1, 2]  # mean squares of 0.13, 0.13 and 0.0625 against 0.04
    _, gradient = surrogate(Correction(kind="m2po"), log_r, [sign * 1.0] * 5, sequences=sequences)
    kept = [True, sign < 0, True, sign > 0, sign < 0]
    assert gradient == pytest.approx([sign * exp(value) * keep for value, keep in zip(log_r, kept)])


@pytest.mark.parametrize(("counts", "kept"), [((3, 1), False), ((15, 1), True)])
def test_m2po_counts_a_draw_as_often_as_it_was_drawn(counts, kept):
    """Mean squares of (3 * 0.01 + 0.25) / 4 = 0.07 and of (15 * 0.01 + 0.25) / 16 = 0.025."""
    _, gradient = surrogate(Correction(kind="m2po"), [0.1, 0.5], [1.0, 1.0], counts=counts)
    assert gradient == pytest.approx([exp(0.1), exp(0.5) * kept])


def test_a_sequence_has_one_weight_the_geometric_mean_of_its_ratios():
    values, gradient = surrogate(Correction(kind="sequence"), [0.2, 0.4, -1.0], [2.0, -3.0, 1.0], sequences=[0, 0, 1])
    wanted = [2 * exp(0.3), -3 * exp(0.3), exp(-1.0)]
    assert values == pytest.approx(wanted) and gradient == pytest.approx(wanted)
