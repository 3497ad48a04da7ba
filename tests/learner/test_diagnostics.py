"""Diagnostics add up: over micro-batches and ranks they are what one batch would have said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_opd.data.packing import pack
from megatron_opd.estimators import build
from megatron_opd.learner import diagnostics
from megatron_opd.learner.scores import Moments
from megatron_opd.types import Segment
from tests.estimators.cases import dense_scores
from tests.learner.cases import trajectories

ESTIMATOR, V = build("sampled_reverse_kl", {}), 31


def sums_of(cases, seed=0):
    """Sums over trajectories, the student's logits depending on nothing but the input token."""
    batch = pack(cases, ESTIMATOR.needs, pad_multiple=4)
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
    scores = dense_scores(table[batch.token_ids], batch, ESTIMATOR.needs)
    found = diagnostics.sums(batch, scores, ESTIMATOR(scores), Moments(student_entropy=torch.ones(len(batch.mask))))
    return {name: values.tolist() for name, values in found.items()}, batch, scores


def test_parts_add_up_to_the_whole():
    cases = trajectories(ESTIMATOR.needs, vocab=V)
    whole, batch, _ = sums_of(cases)
    total = {}
    for part in (cases[:3], cases[3:4], cases[4:]):
        diagnostics.add(total, sums_of(part)[0])
    tokens = int(batch.mask.sum())
    (means, positions), (wanted, wanted_positions) = diagnostics.report(total, tokens), diagnostics.report(whole, tokens)
    assert means == pytest.approx(wanted, rel=1e-5) and positions == pytest.approx(wanted_positions, rel=1e-5)
    assert means["student_entropy"] == 1.0


def test_quantiles_and_effective_samples_are_those_of_the_ratios():
    whole, batch, scores = sums_of(trajectories(ESTIMATOR.needs, vocab=V, lengths=((3, 200), (2, 150))))
    ratios = (scores.token.student_logp - scores.token.behaviour_logp)[batch.mask, 0].exp().double().numpy()
    means, _ = diagnostics.report(whole, int(batch.mask.sum()))
    inside = np.clip(ratios, np.exp(-5), np.exp(5))
    for name, q in {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}.items():
        assert means[name] == pytest.approx(np.quantile(inside, q, method="inverted_cdf"), rel=0.026), name
    assert means["effective_samples"] == pytest.approx(ratios.sum() ** 2 / (ratios**2).sum() / len(ratios), rel=1e-4)


def test_kl_is_told_by_position_in_the_response_and_not_in_the_sequence():
    cases = trajectories(ESTIMATOR.needs, vocab=V, lengths=((5, 9), (2, 3)))
    whole, batch, scores = sums_of(cases)
    _, positions = diagnostics.report(whole, int(batch.mask.sum()))
    kl = ESTIMATOR(scores).diagnostics["kl"][batch.mask].split([9, 3])
    wanted = {first: torch.cat([one[first:end] for one in kl]).mean().item() for first, end in [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]}
    assert positions == pytest.approx(wanted, rel=1e-5)


def test_at_lag_zero_every_ratio_is_one():
    batch = pack(trajectories(ESTIMATOR.needs, vocab=V), ESTIMATOR.needs)
    scores = dense_scores(torch.zeros(len(batch.mask), V), batch, ESTIMATOR.needs)
    uniform = replace(scores, token=replace(scores.token, behaviour_logp=scores.token.student_logp.clone()))
    found = diagnostics.sums(batch, uniform, ESTIMATOR(uniform), Moments())
    means, _ = diagnostics.report({name: values.tolist() for name, values in found.items()}, int(batch.mask.sum()))
    assert means["ratio"] == means["effective_samples"] == 1.0 and means["mismatch"] == 0.0
    assert means["ratio_p01"] == pytest.approx(1, abs=0.03) == means["ratio_p99"]


def test_each_token_has_the_lag_of_the_version_that_sampled_it():
    def sampled(length, *segments):
        (one,) = trajectories(ESTIMATOR.needs, vocab=V, lengths=((2, length),))
        parts = tuple(Segment(first_token=first, version=version) for first, version in segments)
        return replace(one, rollout=replace(one.rollout, segments=parts))

    assert diagnostics.lags([sampled(5, (0, 4), (3, 6))], 6) == {2: 3, 0: 2}
    assert diagnostics.lags([sampled(3, (0, 4), (2, 5))], 7) == {3: 2, 2: 1}
    several = [sampled(5, (0, 4), (3, 6)), sampled(4, (0, 4), (3, 6)), sampled(7, (0, 3), (1, 4), (3, 6)), sampled(2, (0, 6))]
    assert diagnostics.lags(several, 6) == {3: 1, 2: 3 + 3 + 2, 0: 2 + 1 + 4 + 2}
