"""The Triton kernels without a GPU: the interpreter proves their numbers, the real compiler their tensor cores and registers.

`TRITON_INTERPRET` must be set before triton is imported and would reach every child, so each of the two ways has processes of its own.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

from megatron_opd.kernels import dense_kl, logps, reference_dense_kl, reference_logps
from megatron_opd.types import Divergence, VocabShard

pytestmark = pytest.mark.engines

T, D, E, V, K = 7, 48, 32, 507, 6
SHARDS = [(0, 301), (301, 509), (509, 512)]  # uneven, padding behind the last row, a rank of padding only
TAIL, OVERLAPPING = (slice(2, 6),), (slice(2, 6), slice(0, 4))
DIVERGENCES = [
    Divergence(kind="forward"),
    Divergence(kind="reverse"),
    Divergence(kind="jsd", weight=0.1),
    Divergence(kind="skewed", weight=0.3),
]
SHARED_BYTES = 227 * 1024  # that one program may use, of Hopper and of Blackwell alike
CHIPS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # compute capability -> its tensor-core instruction


def python(code, **env):
    """Runs `code` in a process of its own from the root of the repository."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


INTERPRETED = []  # names of the tests whose bodies run under the interpreter, in one process for all


def interpreted(body):
    """The test whose body runs under the interpreter."""

    @functools.wraps(body)
    def test(outcomes):
        assert outcomes[body.__name__] is None, outcomes[body.__name__]

    del test.__wrapped__  # pytest would look for the fixtures of the body
    test.body = body
    INTERPRETED.append(body.__name__)
    return test


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name of the test -> None, or the traceback of its body."""
    path = tmp_path_factory.mktemp("triton") / "outcomes.json"
    python(f"from tests.kernels import test_triton; test_triton.run_interpreted({str(path)!r})", TRITON_INTERPRET="1")
    return json.loads(path.read_text())


def run_interpreted(path):
    """Runs all those bodies in this process."""
    outcomes = dict.fromkeys(INTERPRETED)
    for name in INTERPRETED:
        try:
            globals()[name].body()
        except Exception:
            outcomes[name] = traceback.format_exc()
    Path(path).write_text(json.dumps(outcomes))


# ------------------------------------------------------------------------------------------------------------- numbers
def tiles(monkey, module, size, **options):
    """`module` with small tiles, so that small tensors have many."""
    from megatron_opd.kernels.triton_logits import Tiles

    monkey.setattr(module, "tiles_for", lambda *_: Tiles(tokens=16, rows=size, depth=16, warps=4, stages=2, **options))
    monkey.setattr("megatron_opd.kernels.triton_logits.WORKSPACE_BYTES", 4096)


def shards(head):
    """Every rank's shard with its true rows."""
    for start, stop in SHARDS:
        yield VocabShard(start=start, stop=stop, vocab_size=V), head[start : min(stop, V)]


def merged(maxima, *sums):
    """The largest maximum of all ranks, and the sums moved to it and added up."""
    top = torch.stack(maxima).amax(0)
    return top, *(sum(one * (own - top).exp() for one, own in zip(of_ranks, maxima)) for of_ranks in sums)


def logps_by_shards(hidden, head, ids, rests, temperature, grad_TK, grad_TN):
    """What `logps` makes of what every rank knows: values, then gradients of hidden states and head."""
    from megatron_opd.kernels import triton_logps

    ranks = [triton_logps.local_sums(hidden, rows, ids, rests, shard, temperature) for shard, rows in shards(head)]
    picked, maxima, sums, moments, best = zip(*ranks)
    top, sum_TM = merged(maxima, sums)
    norm_TM = top + sum_TM.clamp_min(torch.finfo(torch.float32).tiny).log()
    moment_T = sum((m + (own - top)[:, 0] * s[:, 0]) * (own - top)[:, 0].exp() for m, s, own in zip(moments, sums, maxima))
    best_T = torch.stack([b.masked_fill(own[:, 0] < top[:, 0], V) for b, own in zip(best, maxima)]).amin(0)
    logp_TK, log_rest_TN = sum(picked) - norm_TM[:, :1], norm_TM[:, 1:] - norm_TM[:, :1]
    entropy_T = sum_TM[:, 0].log() - moment_T / sum_TM[:, 0]

    up = triton_logps.Upstream(logp_TK=logp_TK, norm_TM=norm_TM, grad_TK=grad_TK, grad_TN=grad_TN)
    grad_head, grad_hidden = torch.zeros_like(head), 0
    for shard, rows in shards(head):
        grad_rows = grad_head[shard.start : shard.start + rows.shape[0]]
        grad_hidden += triton_logps.local_gradients(hidden, rows, ids, rests, up, shard, temperature, grad_rows, True)
    assert grad_hidden.dtype == torch.float32 and grad_head.dtype == head.dtype
    return logp_TK, log_rest_TN, entropy_T, best_T, grad_hidden, grad_head


def logps_agree(num_tokens, rests, temperature, dtype=torch.float32, peak=0.0, rtol=1e-5, atol=1e-5):
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, D, generator=g) / 2 for n in (num_tokens, V))
    hidden[:, 0], head[:, 0], head[[3, 400], 0] = 1, 0, peak  # one id in a rest far above all others, one outside
    hidden, head = hidden.to(dtype), head.to(dtype)
    ids = torch.randint(V, (num_tokens, K), generator=g)
    ids[:, 1] = ids[:, 3]  # a duplicate across the border of a rest
    ids[0] = ids[0, 0]  # duplicates within
    ids[1] = torch.tensor([0, V - 1, 300, 301, V - 1, 3])  # first and last rows of shards, and a peak
    ids[2, 2] = 400
    grad_TK, grad_TN = (torch.randn(num_tokens, n, generator=g) for n in (K, len(rests)))
    wide = [x.double().requires_grad_() for x in (hidden, head)]
    wanted = reference_logps(*wide, ids, rests=rests, moments=True, temperature=temperature)
    ((wanted.logp * grad_TK).sum() + (wanted.log_rest * grad_TN).sum()).backward()
    wanted = wanted.logp, wanted.log_rest, wanted.entropy, wanted.best, wide[0].grad, wide[1].grad
    got = logps_by_shards(hidden, head, ids, rests, temperature, grad_TK, grad_TN)
    for name, ours, theirs in zip(("logp", "log_rest", "entropy", "best", "hidden", "head"), got, wanted):
        torch.testing.assert_close(ours.double(), theirs.detach().double(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
def test_logps_over_any_shards_agree_with_dense_autograd():
    for rests, temperature in [((), 0.7), (TAIL, 1.0), (OVERLAPPING, 1.3)]:
        logps_agree(T, rests, temperature)
    logps_agree(T, OVERLAPPING, 1.0, torch.bfloat16, rtol=0.02, atol=0.02)
    logps_agree(T, TAIL, 1.0, torch.bfloat16, rtol=0.02, atol=0.02)


@interpreted
def test_logps_peaked_sixty_nats_high_stay_right():
    logps_agree(T, OVERLAPPING, 1.0, peak=60.0, atol=3e-5)


@interpreted
def test_logps_do_not_depend_on_the_tiles():
    from megatron_opd.kernels import triton_logps

    with pytest.MonkeyPatch.context() as monkey:
        tiles(monkey, triton_logps, 64, pair=True)
        logps_agree(20, OVERLAPPING, 0.7)


@interpreted
def test_a_rest_that_covers_the_vocabulary_is_empty_and_has_no_gradient():
    from megatron_opd.kernels import triton_logps

    hidden, head, ids = torch.ones(2, 8), torch.eye(7, 8), torch.stack([torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 5, 5])])
    shard, rests = VocabShard(start=0, stop=7, vocab_size=7), (slice(0, 7),)
    picked, top, total, *_ = triton_logps.local_sums(hidden, head, ids, rests, shard, 1.0)
    assert top[0, 1] == -1e30 and total[0, 1] == 0 and total[1, 1] == 1
    norm = top + total.clamp_min(torch.finfo(torch.float32).tiny).log()
    up = triton_logps.Upstream(logp_TK=picked - norm[:, :1], norm_TM=norm, grad_TK=torch.zeros(2, 7), grad_TN=torch.zeros(2, 1))
    assert not triton_logps.local_gradients(hidden, head, ids, rests, up, shard, 1.0, None, True).any()


@interpreted
def test_equal_logits_have_the_lowest_id_as_the_best():
    from megatron_opd.kernels import triton_dense_kl, triton_logps

    hidden, head = torch.ones(1, 8), torch.zeros(V, 8)
    head[[77, 200, 490]] = 1.0
    head[[77, 61]] = 1.0
    shard = VocabShard(start=0, stop=V, vocab_size=V)
    assert triton_logps.local_sums(hidden, head, torch.zeros(1, 1, dtype=torch.int64), (), shard, 1.0)[-1].tolist() == [61]
    assert triton_dense_kl.local_sums((hidden, head), (-hidden, head), shard, 1.0)[-1].tolist() == [[61, 0]]


@interpreted
def test_no_tokens_are_no_work():
    from megatron_opd.kernels import triton_dense_kl, triton_logps

    hidden, head, ids, shard = (
        torch.ones(0, D),
        torch.ones(V, D),
        torch.zeros(0, K, dtype=torch.int64),
        VocabShard(start=0, stop=V, vocab_size=V),
    )
    assert [len(one) for one in triton_logps.local_sums(hidden, head, ids, TAIL, shard, 1.0)] == [0] * 5
    assert [len(one) for one in triton_dense_kl.local_sums((hidden, head), (hidden, head), shard, 1.0)] == [0] * 5
    up = triton_logps.Upstream(logp_TK=hidden[:, :K], norm_TM=hidden[:, :2], grad_TK=hidden[:, :K], grad_TN=hidden[:, :1])
    grad_head = torch.zeros_like(head)
    assert triton_logps.local_gradients(hidden, head, ids, TAIL, up, shard, 1.0, grad_head, True).shape == (0, D) and not grad_head.any()


def dense_by_shards(student, teacher, divergence, temperature, grad_T):
    """What `dense_kl` makes of what every rank knows: values, then gradients of hidden states and head."""
    from megatron_opd.kernels import triton_dense_kl

    (hidden, head), (teacher_hidden, teacher_head) = student, teacher
    ranks = [((hidden, rows), (teacher_hidden, teacher_head[shard.start :][: len(rows)]), shard) for shard, rows in shards(head)]
    maxima, sums, moments, gaps, best = zip(*(triton_dense_kl.local_sums(*rank, temperature) for rank in ranks))
    top = torch.stack(maxima).amax(0)
    shifts = [own - top for own in maxima]
    moments = [moment + shift * total for moment, shift, total in zip(moments, shifts, sums)]
    gaps = [gap + (shift[:, :1] - shift[:, 1:]) * total for gap, shift, total in zip(gaps, shifts, sums)]
    top, total, moment, gap = merged(maxima, sums, moments, gaps)
    norm, entropy = top + total.log(), total.log() - moment / total
    mean_gap = gap / total - (total.log()[:, :1] - total.log()[:, 1:])
    reverse, forward = mean_gap[:, 0], -mean_gap[:, 1]
    best_T2 = torch.stack([b.masked_fill(own < top, V) for b, own in zip(best, maxima)]).amin(0)
    weight = {"forward": 1.0, "reverse": 0.0}.get(divergence.kind, divergence.weight)
    mean, loss = reverse, weight * forward + (1 - weight) * reverse
    if divergence.kind == "jsd":
        mean, of_teacher = sum(triton_dense_kl.local_to_mixture(own, other, norm, weight, temperature) for own, other, _ in ranks).unbind(1)
        loss = weight * of_teacher + (1 - weight) * mean
    grad_head, grad_hidden = torch.zeros_like(head), 0
    for own, other, shard in ranks:
        grad_rows = grad_head[shard.start :][: len(own[1])]
        grad_hidden += triton_dense_kl.local_gradients(own, other, norm, mean, grad_T, divergence, temperature, grad_rows, True)
    return loss, reverse, *entropy.unbind(1), (best_T2[:, 0] == best_T2[:, 1]).float(), grad_hidden, grad_head


def dense_agrees(divergence, num_tokens=T, temperature=0.8, dtype=torch.float32, peak=0.0, rtol=1e-5, atol=1e-5):
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=g) / 2 for shape in ((num_tokens, D), (V, D), (num_tokens, E), (V, E))]
    if peak:
        for x in inputs:
            x[:, 0] = 0
        inputs[0][:, 0] = inputs[2][:, 0] = 1
        inputs[1][3, 0], inputs[3][400, 0] = peak, peak
    hidden, head, teacher_hidden, teacher_head = (x.to(dtype) for x in inputs)
    grad_T = torch.randn(num_tokens, generator=g)
    wide = [x.double().requires_grad_() for x in (hidden, head)]
    wanted = reference_dense_kl(*wide, teacher_hidden.double(), teacher_head.double(), divergence, temperature=temperature)
    (wanted.divergence * grad_T).sum().backward()
    watched = wanted.kl, wanted.student_entropy, wanted.teacher_entropy, wanted.agree
    got = dense_by_shards((hidden, head), (teacher_hidden, teacher_head), divergence, temperature, grad_T)
    names = "divergence", "kl", "student entropy", "teacher entropy", "agree", "hidden", "head"
    for name, ours, theirs in zip(names, got, (wanted.divergence, *watched, wide[0].grad, wide[1].grad)):
        torch.testing.assert_close(
            ours.double(), theirs.detach(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name} of {divergence}: {m}"
        )


@interpreted
def test_divergences_over_any_shards_agree_with_dense_autograd():
    for divergence in DIVERGENCES:
        dense_agrees(divergence)
    dense_agrees(DIVERGENCES[2], dtype=torch.bfloat16, rtol=0.02, atol=0.02)
    dense_agrees(DIVERGENCES[3], dtype=torch.bfloat16, rtol=0.02, atol=0.02)


@interpreted
def test_divergences_peaked_sixty_nats_high_stay_right():
    for divergence in DIVERGENCES:
        dense_agrees(divergence, temperature=1.0, peak=60.0, atol=1e-3)  # gradients are multiples of 60


@interpreted
def test_divergences_do_not_depend_on_the_tiles():
    from megatron_opd.kernels import triton_dense_kl

    with pytest.MonkeyPatch.context() as monkey:
        tiles(monkey, triton_dense_kl, 64)
        dense_agrees(DIVERGENCES[2], num_tokens=20)


@interpreted
def test_the_doors_give_the_same_by_either_implementation():
    g = torch.Generator().manual_seed(2)
    hidden, head, teacher_hidden, teacher_head = (torch.randn(shape, generator=g) / 2 for shape in ((T, D), (512, D), (T, E), (512, E)))
    ids, rows = torch.randint(V, (T, K), generator=g), torch.tensor([True, False, True, True, False, True, True])
    upstream, shard = torch.randn(T, K, generator=g), VocabShard(start=0, stop=512, vocab_size=V)

    def both(call):
        """Values and gradients of hidden states and head by each."""
        for implementation in ("chunked", "triton"):
            leaves = [x.clone().requires_grad_() for x in (hidden, head)]
            loss, seen = call(*leaves, implementation)
            yield [loss.detach(), *seen, *torch.autograd.grad(loss, leaves)]

    def at_ids(hidden, head, implementation):
        found = logps(hidden, head, ids, shard, rows=rows, rests=OVERLAPPING, moments=True, temperature=0.7, implementation=implementation)
        return (found.logp * upstream).sum() + (found.log_rest * upstream[:, :2]).sum(), (found.entropy, found.best)

    def dense(divergence):
        def call(hidden, head, implementation):
            options = {"rows": rows, "temperature": 0.7, "implementation": implementation}
            found = dense_kl(hidden, head, teacher_hidden, teacher_head, shard, divergence, **options)
            watched = found.kl, found.student_entropy, found.teacher_entropy, found.agree
            return (found.divergence * upstream[:, 0]).sum(), watched

        return call

    for call in (at_ids, *map(dense, DIVERGENCES)):
        for ours, theirs in zip(*both(call)):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ compiler
def kernels():
    """Every kernel at every shipped size: name -> kernel, tiles, dtype, constants."""
    from megatron_opd.kernels import triton_dense_kl as dense
    from megatron_opd.kernels import triton_logps as logps

    narrow, many, wide = logps.NARROW, logps.MANY_RESTS, logps.FLOAT32
    yield "logps sums", logps.sums_kernel, narrow, "bf16", {"N": 1, "N2": 1}
    yield "logps dlogits", logps.dlogits_kernel, narrow, "bf16", {"M": 2}
    yield "logps sums, two rests", logps.sums_kernel, many, "bf16", {"N": 2, "N2": 2}
    yield "logps dlogits, two rests", logps.dlogits_kernel, many, "bf16", {"M": 3}
    yield "logps sums, float32", logps.sums_kernel, wide, "fp32", {"N": 2, "N2": 2}
    yield "logps dlogits, float32", logps.dlogits_kernel, wide, "fp32", {"M": 3}
    for name, tile, dtype in (("", dense.NARROW, "bf16"), (", float32", dense.FLOAT32, "fp32")):
        yield f"dense_kl sums{name}", dense.sums_kernel, tile, dtype, {"E": 5120}
        yield f"dense_kl mixture{name}", dense.mixture_kernel, tile, dtype, {"E": 5120}
        yield f"dense_kl dlogits{name}", dense.dlogits_kernel, tile, dtype, {"E": 5120, "JSD": False}
        yield f"dense_kl dlogits of jsd{name}", dense.dlogits_kernel, tile, dtype, {"E": 5120, "JSD": True}


def build(kernel, tile, dtype, constants, capability):
    """The kernel as the launcher would have it compiled -> PTX, what a thread uses, shared bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = tile.constants()
    options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"D": 4096, **constants, **given}
    types = {name: "fp32" for name in ("scale", "weight", "log_beta", "log_rest")} | dict.fromkeys(constants, "constexpr")
    types |= {f"{name}_ptr": "*i32" for name in ("ids", "struck", "offsets", "best")} | {"dz_ptr": f"*{dtype}"}
    for name, extent in {"hidden": tile.tokens, "head": tile.rows, "teacher": tile.tokens, "teacher_head": tile.rows}.items():
        types[name] = f"tensordesc<{dtype}[{extent},{tile.depth}]>"
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    uses = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return built.asm["ptx"], uses, built.metadata.shared


def every_kernel_fits(capability):
    for name, *kernel in kernels():
        ptx, uses, shared = build(*kernel, capability)
        print(f"sm_{capability} {name}: {uses}, {shared} bytes shared")
        assert CHIPS[capability] in ptx, f"{name} does not use the tensor cores of sm_{capability}"
        assert uses["STACK"] == uses["LOCAL"] == 0, f"{name} spills on sm_{capability}: {uses}"
        assert shared <= SHARED_BYTES, f"{name} wants {shared} bytes of shared memory on sm_{capability}"


@pytest.mark.parametrize("capability", CHIPS)
def test_every_kernel_compiles_to_tensor_cores_without_spills_and_within_shared_memory(capability):
    python(f"from tests.kernels import test_triton; test_triton.every_kernel_fits({capability})")


def test_the_kernels_room_does_not_load_triton():
    python("import sys, megatron_opd.kernels; assert not {'triton', 'megatron_opd.kernels.triton_logits'} & set(sys.modules)")
