"""The closed forms of tools/variance.py against enumeration, and what it measures against the closed forms."""

from itertools import product

import numpy as np
import pytest
import torch

from megatron_opd.data.draws import merge
from megatron_opd.types import Rollout, Segment
from tools.variance import Policies, figures_of, join, one_draw_variance, squared_error, squared_error_of_draws, stored, summary

SIZES = (4, 8)


def policies(num_positions, vocab, seed=0):
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(num_positions, vocab, generator=g, dtype=torch.float64) * 2
    p = b + 0.3 * torch.randn(b.shape, generator=g, dtype=torch.float64)
    q = b + torch.randn(b.shape, generator=g, dtype=torch.float64)
    return Policies(student=p.log_softmax(-1), teacher=q.log_softmax(-1), behaviour=b.log_softmax(-1))


def tail_of(at, head):
    """b restricted to the ids outside its head [R, V]."""
    return at.behaviour.scatter(-1, at.order[:, :head], -torch.inf).softmax(-1)


def rollout(at, head, draws, seed=0):
    """What vLLM would record at these positions."""
    drawn = torch.multinomial(tail_of(at, head), draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    ids, counts, sizes, logp = merge(drawn.numpy(), at.behaviour.gather(-1, drawn).numpy())
    length = len(drawn)
    return Rollout(
        index=0,
        prompt_ids=np.zeros(1, np.int32),
        response_ids=np.zeros(length, np.int32),
        head_ids=at.order[:, :head].numpy().astype(np.int32) if head else None,
        draw_ids=ids,
        draw_counts=counts,
        draw_sizes=sizes,
        draw_logp=logp,
        segments=(Segment(first_token=0, version=0),),
        finish_reason="length",
    )


def expectation(at, head, draws, value):
    """The mean of `value(draws [R, m])` [R] over all there can be."""
    tail, vocab, total = tail_of(at, head), at.behaviour.shape[1], 0
    for ids in product(range(vocab), repeat=draws):
        drawn = torch.tensor(ids).expand(len(tail), -1)
        total = total + torch.where((chance := tail.gather(-1, drawn).prod(-1)) > 0, chance * value(drawn), 0.0)
    return total


def test_the_dense_gradient_is_that_of_autograd():
    at = policies(3, 7)
    logits = at.student.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.exp() * (logp - at.teacher)).sum().backward()
    torch.testing.assert_close(at.gradient, logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("head", [0, 1, 3, 6])
def test_the_closed_form_is_the_mean_squared_error_over_all_draws(head, draws):
    at = policies(3, 7)
    ids = at.order[:, :head] if head else None
    exact = one_draw_variance(at, range(7))[:, head] / draws
    enumerated = expectation(at, head, draws, lambda drawn: squared_error_of_draws(at, ids, drawn, draws))
    torch.testing.assert_close(exact, enumerated, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("head", [0, 2])
def test_the_number_of_distinct_ids_is_that_over_all_draws(head):
    at = policies(2, 6)
    distinct = expectation(at, head, 3, lambda drawn: torch.tensor([head + len(set(row)) for row in drawn.tolist()]).double())
    torch.testing.assert_close(stored(at, head, 3), distinct)


def test_the_bias_of_the_head_alone_is_gone_once_only_one_id_lies_outside():
    at = policies(4, 9)
    bias2 = [squared_error("reverse_kl_topk", {"head": head}, at, at.order[:, :head], None) for head in (2, 8)]
    assert (bias2[0] > 1e-6).all() and (bias2[1] < 1e-28).all()


def test_measured_agrees_with_exact_and_the_json_says_so():
    parts = []
    for seed, head in enumerate((0, 2, 4)):
        at = policies(2000, 60, seed)
        parts.append(figures_of(at, rollout(at, head, 16), SIZES, np.random.default_rng(0)))
    figures = summary(join(parts), SIZES)
    assert [(row["cache_ids"], row["head"]) for row in figures["measured"]] == [(4, 0), (4, 2), (8, 0), (8, 2), (8, 4)]
    for row in figures["measured"]:
        assert abs(row["variance"] - row["exact"]) < 4.5 * row["standard_error"] < 0.3 * row["exact"], row
    assert figures["positions"] == 6000 and set(figures["cache_ids"]) == {"4", "8"}
    for size, row in figures["cache_ids"].items():
        parts = [quartile["cache_ids"][size] for quartile in figures["quartiles"]]
        for name in ("draws", "without_baseline"):
            assert row[name] == pytest.approx(np.mean([part[name] for part in parts]))
        assert row["best"] <= min(row["splits"].values()) <= row["without_baseline"] == row["splits"]["1/2"] < row["draws"]
        assert row["head_tail"] < row["draws"] and row["ratio"] == pytest.approx(row["draws"] / row["head_tail"])
        assert row["draws_same_storage"] < row["draws"]
        assert row["stored"]["draws"] < row["stored"]["head_tail"] <= int(size)
