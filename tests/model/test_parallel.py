import pytest

from megatron_opd.errors import ConfigError
from megatron_opd.model.parallel import ParallelConfig, padded_vocab
from tests.ranks import run_ranks


def test_sequence_parallelism_without_tensor_parallelism_is_refused():
    with pytest.raises(ConfigError, match="set tensor > 1"):
        ParallelConfig(sequence_parallel=True)


def test_replicas_that_cannot_share_experts_are_refused():
    with pytest.raises(ConfigError, match="expert_parallel=2 does not divide data_parallel=3"):
        ParallelConfig(data=3, expert=2)


def test_the_vocabulary_is_padded_by_less_than_the_tensor_ranks():
    for tensor in range(1, 9):
        padded = padded_vocab(507, tensor)
        assert padded % tensor == 0
        assert 0 <= padded - 507 < tensor


def _shards() -> list:
    from megatron_opd.model.parallel import initialize, place, vocab_shard

    with pytest.raises(ConfigError, match=r"tensor=2 \* pipeline=2 \* data=1 is 4, but 2 ranks were started"):
        initialize(ParallelConfig(tensor=2, pipeline=2), device="cpu", seed=0)
    results = []
    for parallel in (ParallelConfig(tensor=2, sequence_parallel=True), ParallelConfig(pipeline=2), ParallelConfig(data=2)):
        initialize(parallel, device="cpu", seed=0)
        shard, here = vocab_shard(507, parallel), place()
        assert shard.vocab_size == 507
        assert (shard.group is not None) == (parallel.tensor > 1)
        assert shard.sequence_parallel == parallel.sequence_parallel
        results.append([shard.start, shard.stop, here.tensor, here.pipeline, here.data])
    return results


@pytest.mark.engines
def test_ranks_know_their_place_and_their_rows_of_the_head():
    first, second = run_ranks(_shards, 2)
    assert first == [[0, 254, 0, 0, 0], [0, 507, 0, 0, 0], [0, 507, 0, 0, 0]]
    assert second == [[254, 508, 1, 0, 0], [0, 507, 0, 1, 0], [0, 507, 0, 0, 1]]
