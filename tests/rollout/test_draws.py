"""Head and draws, without an engine: the distribution they follow and how rows are kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from megatron_opd.rollout.draws import KEY, DrawRecorder, decode, head_and_draws, uniform

V = 37


def recorder(head, draws, max_num_seqs=2):
    config = SimpleNamespace(
        additional_config={KEY: {"head": head, "draws": draws}},
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )
    return DrawRecorder(config, torch.device("cpu"), False)


def batch(added=(), removed=(), moved=()):
    requests = [(index, SamplingParams(seed=7, extra_args={KEY: key} if key else None), None, output) for index, key, output in added]
    return BatchUpdate(batch_size=0, removed=list(removed), added=requests, moved=list(moved))


def logits(seed, rows):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("head", [0, 1, 8])
def test_draws_follow_the_tail_and_never_the_head(head):
    logp = logits(0, 3).log_softmax(-1)
    ids, values = head_and_draws(logp, head, uniform([1, 2, 3], [0, 0, 5], 200_000))
    assert torch.equal(ids[:, :head], logp.topk(head)[1])
    assert torch.equal(values, logp.gather(-1, ids)), "log b over the whole vocabulary"
    for row in range(3):
        drawn = torch.bincount(ids[row, head:], minlength=V) / 200_000
        tail = logp[row].exp().index_fill(0, ids[row, :head], 0)
        assert (drawn - tail / tail.sum()).abs().max() < 5e-3


def test_importance_weights_restore_a_sum_over_the_tail():
    logp = logits(0, 1).log_softmax(-1)
    ids, values = head_and_draws(logp, 4, uniform([1], [0], 100_000))
    f = torch.randn(V, generator=torch.Generator().manual_seed(2))
    tail_mass = 1 - values[:, :4].exp().sum()
    tail = logp[0].exp().index_fill(0, ids[0, :4], 0)
    assert abs(tail_mass * f[ids[0, 4:]].mean() - (tail * f).sum()) < 3e-3


def test_a_head_that_holds_all_mass_leaves_draws_outside_it():
    row = torch.full((1, V), -300.0)
    row[0, 5] = 0.0
    row[0, 9] = -290.0
    ids, values = head_and_draws(row.log_softmax(-1), 1, uniform([0], [0], 64))
    assert ids[0, 0] == 5 and (ids[0, 1:] != 5).all()
    assert torch.isfinite(values).all() and (ids[0, 1:] == 9).float().mean() > 0.9


def test_draws_follow_from_seed_and_position_alone():
    both = uniform([3, 4, 3], [9, 9, 10], 1000)
    assert torch.equal(uniform([4], [9], 1000)[0], both[1]), "whatever runs beside it"
    assert ((both >= 0) & (both < 1)).all()
    correlations = torch.corrcoef(both) - torch.eye(3)
    assert correlations.abs().max() < 0.1, "other seeds and positions draw something else"


def test_a_number_next_to_one_draws_an_id_with_mass():
    row = torch.tensor([[0.3, 0.0, -2.0, float("-inf"), float("-inf")]]).log_softmax(-1)
    ids, values = head_and_draws(row, 1, torch.tensor([[0.0, 1 - 2**-24, 0.5]]))
    assert ids[0].tolist() == [0, 1, 2, 1] and torch.isfinite(values).all()


def test_rows_follow_requests_through_moves_and_swaps():
    kept = recorder(2, 1)
    outputs = {name: [] for name in "abc"}
    seen = {name: [] for name in "abc"}

    def step(seed, order, update=None):
        kept.update_state(update)
        z = logits(seed, len(order))
        assert kept.apply(z) is z
        for index, name in enumerate(order):
            if name in outputs:
                seen[name].append(z[index].log_softmax(-1).topk(2)[0])
                outputs[name].append(0)

    step(0, "ab", batch(added=[(0, "a", outputs["a"]), (1, "b", outputs["b"])]))
    step(1, "ba", batch(moved=[(0, 1, MoveDirectionality.SWAP)]))
    step(2, "bac", batch(added=[(2, "c", outputs["c"])]))
    step(3, "cb", batch(removed=[1], moved=[(0, 1, MoveDirectionality.UNIDIRECTIONAL), (2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    step(4, "xb", batch(removed=[0], added=[(0, None, [])]))
    lengths = [len(outputs[name]) for name in "abc"]
    for name, (ids, logp) in zip("abc", decode(kept.take(list("abc"), lengths), lengths, 3)):
        assert np.allclose(logp[:, :2], torch.stack(seen[name]))
        assert ids.dtype == np.int32


def test_a_preempted_request_overwrites_only_what_it_samples_anew():
    kept, output = recorder(1, 0), []
    kept.update_state(batch(added=[(0, "a", output)]))
    kept.apply(logits(0, 1))
    output.append(0)
    kept.apply(logits(1, 1))
    kept.update_state(batch(removed=[0]))
    kept.update_state(batch(added=[(0, "a", output)]))
    kept.apply(logits(2, 1))
    ((ids, _),) = decode(kept.take(["a"], [2]), [2], 1)
    assert ids[:, 0].tolist() == [logits(0, 1).argmax().item(), logits(2, 1).argmax().item()]


def test_memory_grows_with_positions_and_is_bounded_in_requests():
    kept = recorder(1, 0, max_num_seqs=2)
    for number in range(100):
        output = [0] * (200 if number == 99 else 3)
        kept.update_state(batch(removed=[0], added=[(0, f"k{number}", output)]))
        kept.apply(logits(number, 1))
    assert len(kept._rows) == 8 and kept._ids.shape[0] == 8 and kept._ids.shape[1] >= 201
    with pytest.raises(KeyError):
        kept.take(["k0"], [1])


def test_a_stray_step_after_taking_changes_nobody():
    kept, old, new = recorder(1, 0), [], []
    kept.update_state(batch(added=[(0, "old", old)]))
    kept.apply(logits(0, 1))
    kept.take(["old"], [1])
    kept.update_state(batch(added=[(1, "new", new)]))
    kept.apply(logits(1, 2))
    ((ids, _),) = decode(kept.take(["new"], [1]), [1], 1)
    assert ids.item() == logits(1, 2)[1].argmax()


def test_a_position_that_was_never_recorded_is_an_error():
    kept = recorder(1, 0)
    kept.update_state(batch(added=[(0, "a", [0])]))
    kept.apply(logits(0, 1))
    with pytest.raises(ValueError, match=r"positions \[0\] of a response of 2 tokens"):
        decode(kept.take(["a"], [2]), [2], 1)
    with pytest.raises(ValueError, match="take 8 bytes, got 0"):
        decode(b"", [1], 1)
