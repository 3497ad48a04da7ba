from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.data.draws import merge, spread
from megatron_opd.data.packing import num_inputs, pack, plan, unpack
from megatron_opd.errors import DataError
from megatron_opd.types import Divergence, Needs, Rollout, Segment, TeacherScores, Trajectory

EVERYTHING = Needs(
    behaviour_logp=True,
    head=3,
    draws=5,
    teacher_token=True,
    teacher_head=True,
    head_rest=True,
    teacher_draws=True,
    teacher_top=4,
    divergence=Divergence(kind="reverse"),
    moments=True,
)


def trajectory(index, num_prompt, num_response, needs=EVERYTHING, seed=0):
    g = np.random.default_rng((seed, index))
    R = num_response

    def ids(*shape):
        return g.integers(1, 90, shape).astype(np.int32)

    def floats(*shape):
        return -g.random(shape).astype(np.float32)

    drawn = merge(g.integers(1, 6, (R, needs.draws)), floats(R, needs.draws))
    rollout = Rollout(
        index=index,
        prompt_ids=ids(num_prompt),
        response_ids=ids(R),
        logp=floats(R),
        head_ids=ids(R, needs.head),
        head_logp=floats(R, needs.head),
        draw_ids=drawn[0],
        draw_counts=drawn[1],
        draw_sizes=drawn[2],
        draw_logp=drawn[3],
        segments=(Segment(first_token=0, version=3), Segment(first_token=min(2, R), version=5)),
        finish_reason="stop",
    )
    teacher = TeacherScores(
        index=index,
        token_logp=floats(R),
        head_logp=floats(R, needs.head),
        head_log_rest=floats(R),
        draw_logp=floats(len(drawn[0])),
        top_ids=ids(R, needs.teacher_top),
        top_logp=floats(R, needs.teacher_top),
        hidden=floats(R, 6),
        entropy=floats(R),
        best_ids=ids(R),
    )
    return Trajectory(rollout=rollout, teacher=teacher)


# ------------------------------------------------------------------------------------------------------------- plan
lengths = st.lists(st.integers(1, 60), max_size=40)
SHAPES = dict(lengths=lengths, ranks=st.integers(1, 5), budget=st.integers(1, 50))


@settings(max_examples=300, deadline=None)
@given(**SHAPES)
def test_every_sequence_stands_once_in_micro_batches_that_keep_the_budget(lengths, ranks, budget):
    shares = plan(lengths, ranks=ranks, micro_batch_tokens=budget)
    assert len(shares) == ranks
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))
    for share in shares:
        for batch in share:
            assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= budget


@settings(max_examples=300, deadline=None)
@given(**SHAPES)
def test_ranks_have_equally_many_micro_batches_and_empty_ones_only_for_want_of_sequences(lengths, ranks, budget):
    shares = plan(lengths, ranks=ranks, micro_batch_tokens=budget)
    (count,) = {len(share) for share in shares}
    if len(lengths) >= ranks * count:
        assert all(batch for share in shares for batch in share)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), ranks=st.integers(1, 5))
def test_ranks_carry_the_same_tokens_to_within_one_sequence(lengths, ranks):
    loads = [sum(lengths[i] for batch in share for i in batch) for share in plan(lengths, ranks=ranks, micro_batch_tokens=10_000)]
    assert max(loads) - min(loads) <= max(lengths)


def test_a_rank_short_of_sequences_is_given_the_shortest_ones():
    shares = plan([100] + [10] * 10, ranks=2, micro_batch_tokens=20)
    assert [len(share) for share in shares] == [4, 4]
    assert all(batch for share in shares for batch in share)


def test_micro_batches_are_as_few_as_the_fullest_rank_needs():
    shares = plan([6, 6, 5, 4, 4, 3, 2], ranks=1, micro_batch_tokens=10)
    assert [len(share) for share in shares] == [3]


def test_no_sequences_give_no_micro_batches():
    assert plan([], ranks=3, micro_batch_tokens=10) == [[], [], []]


def test_nothing_packed_unpacks_to_nothing():
    assert unpack(np.zeros((0, 3)), []) == []


# ------------------------------------------------------------------------------------------------------------- pack
def test_a_target_is_the_token_after_its_input():
    one, two = trajectory(0, 3, 4), trajectory(1, 1, 2)
    batch = pack([one, two], EVERYTHING)
    whole = [np.concatenate([t.rollout.prompt_ids, t.rollout.response_ids]) for t in (one, two)]
    assert batch.token_ids.tolist() == [*whole[0][:-1], *whole[1][:-1]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.boundaries.tolist() == [0, 6, 8] and batch.boundaries.dtype == torch.int32
    assert batch.mask.tolist() == [False] * 2 + [True] * 4 + [True] * 2
    assert batch.sequences.tolist() == [0] * 6 + [1] * 2
    assert batch.token.ids[batch.mask, 0].tolist() == [*one.rollout.response_ids, *two.rollout.response_ids]
    inside = batch.mask.clone()
    inside[[5, 7]] = False  # last input of each sequence: its target is nobody's input
    assert torch.equal(batch.token.ids[inside, 0], batch.token_ids[1:][inside[:-1]])


def test_every_array_stands_at_the_targets_of_its_response_and_zero_elsewhere():
    trajectories = [trajectory(i, p, r) for i, (p, r) in enumerate([(3, 4), (5, 0), (1, 7), (2, 1)])]
    batch = pack(trajectories, EVERYTHING, pad_multiple=8)
    most = max(int(t.rollout.draw_sizes.max(initial=0)) for t in trajectories)

    def laid(values, t):
        return spread(values, t.rollout.draw_sizes, most)

    for place, source in {
        ("token", "ids"): lambda t: t.rollout.response_ids[:, None],
        ("token", "behaviour_logp"): lambda t: t.rollout.logp[:, None],
        ("token", "teacher_logp"): lambda t: t.teacher.token_logp[:, None],
        ("head", "ids"): lambda t: t.rollout.head_ids,
        ("head", "behaviour_logp"): lambda t: t.rollout.head_logp,
        ("head", "teacher_logp"): lambda t: t.teacher.head_logp,
        ("head", "teacher_log_rest"): lambda t: t.teacher.head_log_rest,
        ("draws", "ids"): lambda t: laid(t.rollout.draw_ids, t),
        ("draws", "counts"): lambda t: laid(t.rollout.draw_counts, t),
        ("draws", "behaviour_logp"): lambda t: laid(t.rollout.draw_logp, t),
        ("draws", "teacher_logp"): lambda t: laid(t.teacher.draw_logp, t),
        ("top", "ids"): lambda t: t.teacher.top_ids,
        ("top", "teacher_logp"): lambda t: t.teacher.top_logp,
    }.items():
        values = getattr(getattr(batch, place[0]), place[1])
        assert values.dtype == (torch.int64 if place[1] == "ids" else torch.float32)
        assert values[~batch.mask].count_nonzero() == 0
        for got, wanted in zip(unpack(values[batch.mask].numpy(), trajectories), map(source, trajectories), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert batch.top.behaviour_logp is None
    for name, source in {"teacher_hidden": "hidden", "teacher_entropy": "entropy", "teacher_best": "best_ids"}.items():
        values = getattr(batch, name)
        assert values[~batch.mask].count_nonzero() == 0
        wanted = np.concatenate([getattr(t.teacher, source) for t in trajectories])
        np.testing.assert_array_equal(values[batch.mask].numpy(), wanted)


def test_hidden_states_in_bfloat16_travel_as_their_bits():
    one = trajectory(0, 3, 4)
    hidden = torch.randn(4, 6).bfloat16()
    bits = Trajectory(rollout=one.rollout, teacher=replace(one.teacher, hidden=hidden.view(torch.uint16).numpy()))
    batch = pack([bits], EVERYTHING, pad_multiple=8)
    assert batch.teacher_hidden.dtype == torch.bfloat16 and torch.equal(batch.teacher_hidden[batch.mask], hidden)


@settings(max_examples=100, deadline=None)
@given(positions=st.integers(0, 5), draws=st.integers(1, 6), vocab=st.integers(1, 5), seed=st.integers(0, 9))
def test_merged_draws_are_the_draws(positions, draws, vocab, seed):
    g = np.random.default_rng(seed)
    ids, logp = g.integers(0, vocab, (positions, draws)), -g.random(vocab).astype(np.float32)
    merged, counts, sizes, merged_logp = merge(ids, logp[ids])
    assert sizes.sum() == len(merged) == len(counts) == len(merged_logp)
    rows = np.split(np.repeat(merged, counts), np.arange(1, positions) * draws) if positions else []
    assert [sorted(row) for row in ids.tolist()] == [row.tolist() for row in rows]
    np.testing.assert_array_equal(merged_logp, logp[merged])
    assert all(len(set(part)) == len(part) for part in np.split(merged, np.cumsum(sizes)))


@settings(max_examples=100, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=6), pad_multiple=st.integers(1, 7))
def test_padding_is_a_masked_sequence_of_its_own(shapes, pad_multiple):
    trajectories = [trajectory(i, p, r) for i, (p, r) in enumerate(shapes)]
    batch = pack(trajectories, EVERYTHING, pad_multiple=pad_multiple)
    lengths = [num_inputs(t.rollout) for t in trajectories if len(t.rollout.response_ids)]
    num_targets = len(batch.token_ids)
    assert num_targets % pad_multiple == 0 and 0 <= num_targets - sum(lengths) <= (pad_multiple - 1 if lengths else pad_multiple)
    edges = np.cumsum([0, *lengths]).tolist()
    assert batch.boundaries.tolist() == (edges if edges[-1] == num_targets else [*edges, num_targets])
    assert (batch.boundaries.diff() > 0).all()
    assert not batch.mask[sum(lengths) :].any() and int(batch.mask.sum()) == sum(r for _, r in shapes)
    for first, end in zip(batch.boundaries[:-1], batch.boundaries[1:]):
        assert batch.positions[first:end].tolist() == list(range(end - first))


def test_no_trajectories_give_masked_tokens_with_every_set():
    batch = pack([], EVERYTHING, pad_multiple=4)
    assert batch.token_ids.tolist() == [0] * 4 and batch.boundaries.tolist() == [0, 4]
    assert not batch.mask.any() and batch.sequences.tolist() == [0] * 4
    assert len(batch.head.ids) == len(batch.draws.counts) == len(batch.top.ids) == len(batch.teacher_hidden) == 4
    assert len(pack([], EVERYTHING).token_ids) == 1


def test_what_is_not_asked_for_is_not_packed():
    one = trajectory(0, 3, 4)
    batch = pack([Trajectory(rollout=one.rollout, teacher=None)], Needs(generation=False))
    assert (batch.head, batch.draws, batch.top, batch.token.behaviour_logp, batch.token.teacher_logp) == (None,) * 5
    batch = pack([Trajectory(rollout=one.rollout, teacher=None)], Needs(head=3))
    assert batch.head.behaviour_logp is not None and batch.head.teacher_logp is None


@settings(max_examples=50, deadline=None)
@given(data=st.data(), budget=st.integers(1, 40), ranks=st.integers(1, 4), pad_multiple=st.integers(1, 4))
def test_order_ranks_and_micro_batches_change_no_sum_over_targets(data, budget, ranks, pad_multiple):
    trajectories = [trajectory(i, p, r) for i, (p, r) in enumerate([(3, 4), (5, 0), (1, 7), (2, 1), (4, 9), (1, 1)])]
    shuffled = data.draw(st.permutations(trajectories))

    def total(batches):
        """A loss that depends on every target, its input and its position, summed over the mask."""
        terms = [
            (
                b.token.ids[:, 0]
                * (1 + b.positions)
                * (2 + b.token_ids)
                * b.head.ids.sum(1)
                * b.top.ids.sum(1)
                * (b.draws.ids * b.draws.counts.long()).sum(1)
            )[b.mask].sum()
            for b in batches
        ]
        return int(sum(terms)), sum(int(b.mask.sum()) for b in batches)

    shares = plan([num_inputs(t.rollout) for t in shuffled], ranks=ranks, micro_batch_tokens=budget)
    split = [pack([shuffled[i] for i in batch], EVERYTHING, pad_multiple=pad_multiple) for share in shares for batch in share]
    assert total(split) == total([pack(trajectories, EVERYTHING)])


ONE = trajectory(7, 3, 4)
WRONG = {
    r"rollout 7: rollout.logp has shape None, wanted \(4,\)": Trajectory(rollout=replace(ONE.rollout, logp=None), teacher=ONE.teacher),
    r"rollout.head_ids has shape \(4, 2\), wanted \(4, 3\)": Trajectory(
        rollout=replace(ONE.rollout, head_ids=ONE.rollout.head_ids[:, :2]), teacher=ONE.teacher
    ),
    r"teacher.top_logp has shape \(3, 4\), wanted \(4, 4\)": Trajectory(
        rollout=ONE.rollout, teacher=replace(ONE.teacher, top_logp=ONE.teacher.top_logp[:3])
    ),
    r"teacher.token_logp has shape None, wanted \(4,\)": Trajectory(rollout=ONE.rollout, teacher=None),
    r"19 draws at 4 positions, wanted 5": Trajectory(
        rollout=replace(ONE.rollout, draw_counts=ONE.rollout.draw_counts - np.eye(1, len(ONE.rollout.draw_counts), dtype=np.int32)[0]),
        teacher=ONE.teacher,
    ),
    "teacher scores of rollout 8": Trajectory(rollout=ONE.rollout, teacher=replace(ONE.teacher, index=8)),
    r"segments start at tokens \[1\]": Trajectory(
        rollout=replace(ONE.rollout, segments=(Segment(first_token=1, version=0),)), teacher=ONE.teacher
    ),
    "prompt 7 has no tokens": Trajectory(rollout=replace(ONE.rollout, prompt_ids=ONE.rollout.prompt_ids[:0]), teacher=ONE.teacher),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(DataError, match=message):
        pack([ONE, WRONG[message]], EVERYTHING)
