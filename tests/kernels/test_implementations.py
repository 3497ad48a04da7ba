"""One contract for every implementation behind the doors: values and gradients of dense float64 autograd, over any shards."""

import itertools

import pytest
import torch

from megatron_opd.kernels import choose, dense_kl, fp8_products, logps, reference_dense_kl, reference_logps
from megatron_opd.kernels.fp8 import FP8Products
from megatron_opd.kernels.fp8_emulation import Emulated, Emulation
from megatron_opd.types import Divergence
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of, whole_head_gradient, whole_hidden_gradient
from tests.ranks import run_ranks

T, D, E, K = 8, 16, 24, 6
DIVERGENCES = [Divergence(kind=kind, weight=weight) for kind, weight in (("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("skewed", 0.3))]
SOME = torch.tensor([True, False, False, True, True, False, True, False])
RESTS = (slice(2, 6), slice(0, 4))
ALL_WAYS = "padded", "even", "uneven", "a rank of padding"
DTYPES = torch.float32, torch.bfloat16
RTOL = {torch.float32: 1e-5, torch.bfloat16: 0.02}


class Unquantised(Emulation):
    """A backend that rounds nothing: what is left of "te" are layouts, padding, terms and sums, which must be right to the last bit."""

    def quantize(self, x, role, *, rowwise, columnwise):
        return Emulated(rowwise=x.float() if rowwise else None, columnwise=x.float() if columnwise else None)


def options_of(implementation):
    """How the doors are called, and by how much more than others it may be off, in values and in gradients."""
    match implementation:
        case "te unquantised":
            return {"implementation": "te", "products": FP8Products(policy="fp8x2", backend=Unquantised("mxfp8"))}, 0, 0
        case "te":
            return {"implementation": "te", "products": fp8_products("bf16", "blockwise", "cpu")}, 0.01, 0.08
        case _:
            return {"implementation": implementation}, 0, 0


def case(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = (T, D), (V, D), (T, E), (V, E)
    return [(torch.randn(shape, generator=g) / 2).to(dtype) for shape in shapes], torch.randint(V, (T, K), generator=g)


def gradients_of(loss, hidden, head, shard):
    loss.backward()
    return whole_hidden_gradient(hidden.grad, shard), whole_head_gradient(head.grad, shard)


def compare(got, wanted, more, rtol, where):
    """Values, relative to a nat each or more, and then two gradients, relative to their norms."""
    for n, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        gradient = n >= len(got) - 2
        tolerance = rtol + more[gradient]
        error = (ours.double() - theirs.double()).norm() / max(theirs.double().norm(), 0 if gradient else theirs.numel() ** 0.5)
        assert error <= tolerance, f"number {n} is off by {error:.1e} with {where}"


def dense(inputs, divergence, shard, **options):
    hidden, head, teacher_hidden, teacher_head = inputs
    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
    found = dense_kl(
        hidden, head, teacher_hidden, rows_of(teacher_head, shard), shard, divergence, rows=SOME, temperature=0.7, chunk_tokens=3, **options
    )
    values = found.divergence, found.kl, found.student_entropy, found.teacher_entropy
    return *(one.detach() for one in values), *gradients_of(-0.7 * found.divergence.sum(), hidden, head, shard)


def dense_reference(inputs, divergence):
    hidden, head, *teacher = (x.double().clone() for x in inputs)
    hidden.requires_grad_(), head.requires_grad_()
    found = reference_dense_kl(hidden, head, *teacher, divergence, temperature=0.7)
    (-0.7 * found.divergence * SOME).sum().backward()
    values = found.divergence, found.kl, found.student_entropy, found.teacher_entropy
    return *(one.detach() * SOME for one in values), hidden.grad, head.grad


def upstream():
    return torch.randn(T, K + 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def at_ids(inputs, ids, shard, **options):
    hidden, head = tokens_of(inputs[0], shard).clone().requires_grad_(), rows_of(inputs[1], shard).requires_grad_()
    found = logps(hidden, head, ids, shard, rows=SOME, rests=RESTS, moments=True, temperature=0.7, chunk_tokens=3, **options)
    loss = (torch.cat([found.logp, found.log_rest], 1) * upstream()).sum()
    return found.logp.detach(), found.log_rest.detach(), found.entropy, *gradients_of(loss, hidden, head, shard)


def at_ids_reference(inputs, ids):
    hidden, head = (x.double().clone().requires_grad_() for x in inputs[:2])
    found = reference_logps(hidden, head, ids, rests=RESTS, moments=True, temperature=0.7)
    (torch.cat([found.logp, found.log_rest], 1) * upstream() * SOME[:, None]).sum().backward()
    values = found.logp, found.log_rest, found.entropy[:, None]
    return *((one.detach() * SOME[:, None]).squeeze(1) for one in values), hidden.grad, head.grad


def contract(implementations, sequence_parallel, dtypes, names):
    """On every rank: each implementation, each way to split, each divergence, each schedule."""
    ways = [(tp, group, name, cuts) for tp, group in groups().items() for name, cuts in CUTS[tp] if name in names]
    for dtype in dtypes:
        inputs, ids = case(dtype)
        wanted_at_ids, wanted = at_ids_reference(inputs, ids), {d: dense_reference(inputs, d) for d in DIVERGENCES}
        for (tp, group, name, cuts), implementation in itertools.product(ways, implementations):
            shard = split(cuts, group, sequence_parallel and tp > 1)
            options, *more = options_of(implementation)
            where = f"{implementation}, {dtype}, tp {tp}, {name}"
            compare(at_ids(inputs, ids, shard, **options), wanted_at_ids, more, RTOL[dtype], f"logps by {where}")
            schedules = ["recompute"] if implementation in ("triton", "reference") else ["forward", "recompute"]
            for divergence, schedule in itertools.product(DIVERGENCES, schedules):
                got = dense(inputs, divergence, shard, schedule=schedule, **options)
                compare(got, wanted[divergence], more, RTOL[dtype], f"{divergence} by {where}, {schedule}")
    return 1


def test_values_and_gradients_are_those_of_dense_autograd():
    assert run_ranks(contract, 4, ["reference", "chunked", "te unquantised", "te"], True, DTYPES, ALL_WAYS) == [1] * 4


@pytest.mark.engines
def test_triton_keeps_the_same_contract(monkeypatch):
    """On four ranks; test_triton.py has other dtypes and shards without the collectives."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # of the ranks, which import triton themselves
    assert run_ranks(contract, 4, ["triton"], False, [torch.float32], ["a rank of padding"]) == [1] * 4


def test_a_cpu_gets_torch_and_what_is_named_is_taken():
    assert choose("auto", "cpu") == "chunked"
    assert [choose(name, "cpu") for name in ("reference", "chunked", "triton", "te")] == ["reference", "chunked", "triton", "te"]


@pytest.mark.parametrize("capability, wanted", [((8, 9), "chunked"), ((9, 0), "triton"), ((10, 0), "triton")])
def test_a_gpu_gets_triton_from_hopper_on(monkeypatch, capability, wanted):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert choose("auto", "cuda") == wanted
