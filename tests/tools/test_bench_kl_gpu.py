"""tools/bench_kl_gpu.py as far as a machine without a GPU can tell: its floors, and that what it measures runs."""

import pytest

from megatron_opd.types import VocabShard
from tools.bench_kl_gpu import CASES, CHIPS, Case, Inputs, ways, work


def test_floors_are_those_of_counting_by_hand():
    case, h100 = CASES[0], CHIPS[0]
    rows = 19_072  # 151,936 over 8 ranks, each a multiple of 128
    assert case.rows == rows
    forward, recompute = (work(case, "dense_kl", schedule) for schedule in ("forward", "recompute"))
    assert forward.logits + forward.gradients == pytest.approx((6 * 4096 + 2 * 5120) * 8192 * rows)
    assert recompute.logits + recompute.gradients == pytest.approx((8 * 4096 + 4 * 5120) * 8192 * rows)
    assert forward.seconds(h100) == pytest.approx((forward.logits + forward.gradients) / 989e12), "products, not memory, are the floor"
    assert forward.seconds(h100, fp8_gradients=True) == pytest.approx(forward.logits / 989e12 + forward.gradients / 1979e12)
    assert work(case, "logps", "recompute").logits == pytest.approx(4 * 4096 * 8192 * rows)


def test_what_torch_alone_can_do_runs():
    case = Case(tokens=16, hidden=32, teacher_hidden=48, vocabulary=256, ranks=1)
    inputs = Inputs(case, VocabShard(start=0, stop=256, vocab_size=256), "cpu")
    chunked = [loss for name, (*_, loss) in ways().items() if " chunked" in name]
    assert len(chunked) == 3
    for loss in chunked:
        inputs.head.main_grad.zero_()
        loss(inputs).backward()
        assert inputs.head.main_grad.isfinite().all() and inputs.head.main_grad.any()
