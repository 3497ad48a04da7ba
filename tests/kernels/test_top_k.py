import pytest
import torch

from megatron_opd.kernels import top_k
from megatron_opd.types import VocabShard
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of
from tests.ranks import run_ranks

T, D = 8, 5


def case(ties):
    g = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (T, V))
    return (hidden.sign(), head.round()) if ties else (hidden, head)  # small integers: many equal logits, exact in any order of sums


def slow(hidden, head, k):
    logp = (hidden @ head.t()).log_softmax(-1)
    ids = torch.tensor([sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in (hidden @ head.t()).tolist()])
    return ids, logp.gather(1, ids)


def every_split_on_this_rank():
    for tp, group in groups().items():
        for name, cuts in CUTS[tp]:
            for sequence_parallel in [False, True] if tp > 1 else [False]:
                for ties in (False, True):
                    for k in (1, 16, V):
                        shard = split(cuts, group, sequence_parallel)
                        hidden, head = case(ties)
                        ids, logp = top_k(tokens_of(hidden, shard), rows_of(head, shard), k, shard, chunk_tokens=3)
                        expected_ids, expected_logp = slow(hidden, head, k)
                        assert torch.equal(ids, expected_ids), f"tp {tp}, {name}, {sequence_parallel}, ties {ties}, k {k}"
                        torch.testing.assert_close(logp, expected_logp, rtol=1e-11, atol=1e-12)
    return 1


def test_splitting_the_vocabulary_changes_neither_the_ids_nor_the_order_of_equal_ones():
    assert run_ranks(every_split_on_this_rank, 4) == [1] * 4


def test_temperature_divides_the_logits():
    hidden, head = case(ties=False)
    ids, logp = top_k(hidden, head, 5, VocabShard(start=0, stop=V, vocab_size=V), temperature=2.0)
    expected = slow(hidden / 2, head, 5)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(logp, expected[1])


def test_bfloat16_ties_go_to_the_lower_id():
    hidden, head = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(9, 1, dtype=torch.bfloat16)
    head[4] = 2
    ids, logp = top_k(hidden, head, 4, VocabShard(start=0, stop=9, vocab_size=8))
    assert ids.tolist() == [[4, 0, 1, 2]]
    assert logp.dtype == torch.float32


@pytest.mark.parametrize("k", [0, V + 1])
def test_more_ids_than_the_vocabulary_has_are_refused(k):
    hidden, head = case(ties=False)
    with pytest.raises(ValueError, match=f"top_k={k} must lie between 1 and the vocabulary size {V}"):
        top_k(hidden, head, k, VocabShard(start=0, stop=V, vocab_size=V))
