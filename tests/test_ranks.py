import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def add_up():
    x = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(x)
    return x


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("no luck")
    dist.barrier()


def test_every_rank_returns_its_result():
    assert [x.item() for x in run_ranks(add_up, 2)] == [3.0, 3.0]


def test_a_failing_rank_ends_all_with_its_traceback():
    with pytest.raises(AssertionError, match="no luck"):
        run_ranks(fail_on_rank_one, 2)
