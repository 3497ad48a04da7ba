import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.kernels import Upstream, dense_kl, logps
from megatron_opd.kernels.logits import largest_in_row
from megatron_opd.types import Divergence, VocabShard
from tests.ranks import run_ranks

T, D, V = 8, 5, 300
WHOLE = VocabShard(start=0, stop=V + 4, vocab_size=V)  # four rows of padding


@given(columns=st.integers(1, 700), values=st.integers(1, 9), seed=st.integers(0, 9))
def test_the_largest_in_a_row_is_the_first_of_equal_ones(columns, values, seed):
    x = torch.randint(values, (3, columns), generator=torch.Generator().manual_seed(seed)).float()
    largest, column = largest_in_row(x)
    assert largest.tolist() == [max(row) for row in x.tolist()]
    assert column.tolist() == [row.index(max(row)) for row in x.tolist()]


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=g) for n in (T, V + 4, T, V + 4)]


def at_ids(hidden, head, *_):
    return logps(hidden, head, torch.arange(T * 3).view(T, 3), WHOLE, rests=[slice(0, 2)], chunk_tokens=3).logp.sum()


def forward(*models):
    return 2.0 * dense_kl(*models, WHOLE, Divergence(kind="reverse"), chunk_tokens=3, schedule="forward").divergence.sum()


def recompute(*models):
    return 2.0 * dense_kl(*models, WHOLE, Divergence(kind="reverse"), chunk_tokens=3, schedule="recompute").divergence.sum()


def uneven(*models):
    return (dense_kl(*models, WHOLE, Divergence(kind="jsd"), chunk_tokens=3).divergence * torch.arange(T)).sum()


def promised(*models):
    """As a learner calls it: time after time, with one memory of what arrived."""
    options = {"chunk_tokens": 3, "schedule": "forward", "upstream": SEEN.setdefault(id(models[1]), Upstream())}
    return 2.0 * dense_kl(*models, WHOLE, Divergence(kind="reverse"), **options).divergence.sum()


SEEN = {}
DOORS = [at_ids, forward, recompute, uneven, promised]


@pytest.mark.parametrize("door", DOORS)
def test_the_gradient_of_the_head_is_added_to_what_megatron_has_gathered_in_main_grad(door):
    hidden, head, *teacher = case()
    plain = torch.nn.Parameter(head.clone())
    door(hidden, plain, *teacher).backward()
    head = torch.nn.Parameter(head)
    head.main_grad, head.grad_added_to_main_grad = torch.ones_like(head), False
    door(hidden, head, *teacher).backward()
    torch.testing.assert_close(head.main_grad - 1, plain.grad)
    assert head.grad_added_to_main_grad and head.grad is not None, "Megatron's hook wants a gradient to look at"


@pytest.mark.parametrize("door", DOORS)
def test_a_narrow_main_grad_is_left_to_megatron(door):
    hidden, head, *teacher = case()
    head = torch.nn.Parameter(head)
    head.main_grad, head.grad_added_to_main_grad = torch.zeros_like(head, dtype=torch.bfloat16), False
    door(hidden, head, *teacher).backward()
    assert not head.main_grad.any() and not head.grad_added_to_main_grad and head.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_whatever_gradient_arrives_a_promised_one_is_made_good(temperature):
    hidden, head, *teacher = case()
    upstream, numbers = Upstream(), [1.0, 1.0, 2.0, 2.0, torch.arange(T), 3.0]
    promised = torch.nn.Parameter(head.clone())
    promised.main_grad, promised.grad_added_to_main_grad = torch.zeros_like(head), False
    hidden.requires_grad_()
    for number, even_before in zip(numbers, [True] * 5 + [False]):
        assert upstream.even == even_before
        plain = torch.nn.Parameter(head.clone())
        of_hidden = []
        for one, options in ((plain, {}), (promised, {"upstream": upstream})):
            promised.main_grad.zero_()
            found = dense_kl(hidden, one, *teacher, WHOLE, Divergence(kind="reverse"), chunk_tokens=3, temperature=temperature, **options)
            (found.divergence * number).sum().backward()
            of_hidden.append(hidden.grad)
            hidden.grad = None
        torch.testing.assert_close(promised.main_grad, plain.grad)
        torch.testing.assert_close(*of_hidden)


def test_the_gradient_of_a_head_needs_no_memory_of_its_own_where_what_arrives_is_known(monkeypatch):
    hidden, head, *teacher = case()
    head = torch.nn.Parameter(head)
    head.main_grad, head.grad_added_to_main_grad = torch.zeros_like(head), False
    zeros_like, made = torch.zeros_like, []
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **options: made.append(args[0].shape) or zeros_like(*args, **options))
    upstream = Upstream()
    for number in (1.0, 1.0):
        (
            number * dense_kl(hidden, head, *teacher, WHOLE, Divergence(kind="jsd"), chunk_tokens=3, upstream=upstream).divergence.sum()
        ).backward()
    assert head.shape not in made and upstream.number == 1.0


def through_megatron():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_opd.model import parallel

    parallel.initialize(parallel.ParallelConfig(), device="cpu", seed=0)
    for tied in (True, False):
        for door in DOORS:
            gradients = []
            for wrapped in (False, True):
                _, head, *teacher = case()
                model = torch.nn.Module()
                model.head = torch.nn.Parameter(head)
                model.embedding = model.head if tied else torch.nn.Parameter(head + 1)
                model.head.zero_out_wgrad = tied
                if wrapped:
                    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
                    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
                    ddp.zero_grad_buffer()
                for first in (0, 100):  # two micro-batches
                    door(model.embedding[first : first + T].tanh(), model.head, *teacher).backward()
                gradients.append([(p.main_grad if wrapped else p.grad) for p in (model.head, model.embedding)])
            for name, plain, ours in zip(("head", "embedding"), *gradients):
                assert torch.allclose(plain, ours, rtol=1e-5, atol=1e-6), f"{name}, tied {tied}, {door.__name__}"
    return 1


def test_under_megatrons_data_parallelism_head_and_embedding_get_their_gradients_tied_or_not():
    assert run_ranks(through_megatron, 1) == [1]
