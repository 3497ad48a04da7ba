"""FP8 quantisation against TransformerEngine's own rules, its adapter against its own signatures, and what either costs in truth."""

import hashlib
import importlib
import math
import sys

import pytest
import torch

from megatron_opd.errors import ConfigError
from megatron_opd.kernels import dense_kl, fp8_noise, fp8_products
from megatron_opd.kernels.fp8 import DelayedScale, FP8Products, Role
from megatron_opd.kernels.fp8_emulation import Emulation, blocks, current_scale, mx_blocks, per_tensor
from megatron_opd.types import Divergence, VocabShard
from tests.kernels.te_signatures import SIGNATURES, stand_in

RECIPES = "current", "delayed", "blockwise", "mxfp8"
POLICIES = "bf16", "fp8x2", "fp8"


def awkward(dtype, rows=260, columns=390):
    """Numbers of all magnitudes, rows of zeros, blocks that overflow and underflow a scale."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, columns)
    x[7], x[:, 300:] = 0, x[:, 300:] * 1e-10
    x[20, 256:] = torch.linspace(-3e-44, 3e-44, columns - 256)
    x[21, :128] = torch.linspace(-1, 1, 128) * 3e38
    return x.to(dtype)


# Of (codes, scale_inv) that TransformerEngine's published references give for `awkward`: tests/pytorch/references of its repository,
# blockwise_quantizer_reference.py and ref_per_tensor_cs.py
DIGESTS = {
    "current float32": "8c1ac510224d36ae",
    "1x128 float32": "d73c491776f21de9",
    "128x1 float32": "d43e2f0d3392e2ef",
    "128x128 float32": "238d696ea8f618bf",
    "current bfloat16": "c905869221c70915",
    "1x128 bfloat16": "7506cda32b94a02b",
    "128x1 bfloat16": "6b1fa73c82ce3bf2",
    "128x128 bfloat16": "71b12591d9727d32",
}


def digest(codes, scale_inv):
    return hashlib.sha256(codes.contiguous().view(torch.uint8).numpy().tobytes() + scale_inv.contiguous().numpy().tobytes()).hexdigest()[
        :16
    ]


def cases():
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield name, awkward(dtype)


def ours():
    for name, x in cases():
        for rule, found in (
            ("current", per_tensor(x[:20], current_scale(x[:20]))),
            ("1x128", blocks(x)),
            ("128x1", blocks(x.t())),
            ("128x128", blocks(x, square=True)),
        ):
            yield f"{rule} {name}", digest(found.codes, found.scale_inv)


def test_codes_and_scales_are_those_of_the_published_references_bit_by_bit():
    assert dict(ours()) == DIGESTS


def test_a_scale_of_32_numbers_is_the_least_power_of_2_under_which_none_is_too_large():
    found, largest = mx_blocks(awkward(torch.float32)), 448
    for row, of_row in zip(awkward(torch.float32).tolist(), found.scale_inv.tolist()):
        for block, scale_inv in enumerate(of_row):
            amax = max(map(abs, row[block * 32 : block * 32 + 32]))
            if 2.0**-125 * largest < amax:  # above what has no normal scale
                assert amax / largest <= scale_inv * (1 + 1e-7) and (amax / largest > scale_inv / 2 * (1 - 1e-7)), (amax, scale_inv)
                assert math.frexp(scale_inv)[0] == 0.5
    assert found.codes.float().isfinite().all()


def test_a_delayed_scale_follows_the_largest_magnitude_of_its_past():
    scale = DelayedScale(torch.tensor([[2.0, -4.0]]))
    assert scale.scale.item() == 16, "448 / 4 with a margin of two powers of 2, down to one; the first tensor is its own past"
    for amax, wanted in ((8.0, 8), (1.0, 8), (0.0, 8), (math.inf, 8)):
        scale.history[0] = amax
        scale.update()
        assert scale.scale.item() == wanted
    assert per_tensor(torch.tensor([[100.0]]), scale.scale).codes.item() == 448, "what its past did not foresee is cut"


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantised_numbers_are_near_and_the_directions_are_those_of_the_sum(recipe):
    x = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 2, 70)[:, None]
    for operand in ("hidden", "rows", "gradient", "weighted"):
        found = Emulation(recipe).quantize(x, Role(owner="student", operand=operand), rowwise=True, columnwise=True)
        for values in (found.rowwise, found.columnwise):
            assert (values - x).norm() < 0.04 * x.norm()
    along_columns = Emulation(recipe).quantize(x.t(), Role(owner="student", operand="hidden"), rowwise=False, columnwise=True)
    along_rows = Emulation(recipe).quantize(x, Role(owner="student", operand="hidden"), rowwise=True, columnwise=False)
    assert torch.equal(along_columns.columnwise.t(), along_rows.rowwise)


# --------------------------------------------------------------------------------------------------- through the doors
T, D, E, V = 40, 144, 200, 507
WHOLE = VocabShard(start=0, stop=512, vocab_size=V)


def case(dtype=torch.bfloat16, apart=0.3):
    """Student and, `apart` from it, teacher."""
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(T, D, generator=g), torch.randn(512, D, generator=g) / D**0.5 * 3
    return [x.to(dtype) for x in (hidden, head, hidden + apart * torch.randn(T, D, generator=g), head)]


def gradients(products, inputs=None, **options):
    """KL, and the gradients of its sum in hidden states and head; by torch in float64 if `products` is None."""
    hidden, head, *teacher = inputs or case()
    if products is None:
        hidden, head, *teacher = (x.double() for x in (hidden, head, *teacher))
    else:
        options |= {"implementation": "te", "products": products}
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    found = dense_kl(*leaves, *teacher, WHOLE, Divergence(kind="reverse"), chunk_tokens=16, **options)
    found.divergence.sum().backward()
    return found.kl, *(x.grad.double() for x in leaves)


def cosine(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_in_fp8_point_where_the_exact_ones_do(recipe):
    _, *exact = gradients(None)
    for schedule in ("forward", "recompute"):
        _, *found = gradients(fp8_products("bf16", recipe, "cpu"), schedule=schedule)
        for ours, theirs in zip(found, exact):
            assert cosine(ours, theirs) > 0.998


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gradient_of_a_token_does_not_drown_in_that_of_another(recipe):
    weights = torch.logspace(-12, 3, T)
    of_hidden = []
    for products in (fp8_products("bf16", recipe, "cpu"), None):
        hidden, head, *teacher = case(torch.float32)
        hidden.requires_grad_()
        way = {"implementation": "te", "products": products} if products else {}
        (dense_kl(hidden, head, *teacher, WHOLE, Divergence(kind="reverse"), chunk_tokens=16, **way).divergence * weights).sum().backward()
        of_hidden.append(hidden.grad)
    assert min(cosine(ours, theirs) for ours, theirs in zip(*of_hidden)) > 0.99


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_terms_are_near_bfloat16_and_one_drowns_a_small_divergence(recipe):
    inputs = case(apart=0.03)
    kl, *_ = gradients(None, inputs=inputs)
    for policy, within in (("bf16", 0.02), ("fp8x2", 0.2)):
        found, *_ = gradients(fp8_products(policy, recipe, "cpu"), inputs=inputs)
        assert (found.mean() / kl.mean() - 1).abs() < within, policy
    found, *_ = gradients(fp8_products("fp8", recipe, "cpu"), inputs=inputs)
    assert found.mean() > 1.5 * kl.mean()


def test_noise_is_the_divergence_from_the_same_logits_in_bfloat16():
    hidden, head, *_ = case()
    rows = torch.arange(T) % 3 > 0
    noise = {
        policy: fp8_noise(hidden, head, WHOLE, fp8_products(policy, "current", "cpu"), rows=rows, chunk_tokens=16) for policy in POLICIES
    }
    assert not noise["bf16"].any() and not noise["fp8"][~rows].any()
    assert noise["fp8"].mean() > 20 * noise["fp8x2"].mean() > 0


def test_float64_is_refused():
    with pytest.raises(AssertionError, match="bfloat16 or float32"):
        gradients(fp8_products("bf16", "current", "cpu"), inputs=case(torch.float64))


# ---------------------------------------------------------------------------------------------------------- the adapter
@pytest.fixture(params=SIGNATURES)
def te(request, monkeypatch):
    """kernels/te.py over a stand-in that takes what a version of TransformerEngine takes, and the calls it gets."""
    modules, calls = stand_in(request.param, Emulation)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"transformer_engine": request.param}[name])
    monkeypatch.delitem(sys.modules, "megatron_opd.kernels.te", raising=False)
    yield importlib.import_module("megatron_opd.kernels.te"), calls
    sys.modules.pop("megatron_opd.kernels.te")


def test_every_call_of_the_adapter_fits_the_source_of_each_supported_version(te):
    adapter, calls = te
    for recipe in RECIPES:
        for policy in POLICIES:
            ours = gradients(FP8Products(policy=policy, backend=adapter.TransformerEngine(recipe)))
            for a, b in zip(ours, gradients(fp8_products(policy, recipe, "cpu"))):
                assert torch.equal(a, b), f"{policy} by {recipe} is not what the emulation gives"
    assert calls.seen == set(SIGNATURES[calls.version]), "something is recorded that is never called"


def test_a_gpu_without_transformer_engine_is_told_so():
    with pytest.raises(ConfigError, match="needs TransformerEngine; install"):
        fp8_products("bf16", "current", "cuda")


def test_a_chip_that_lacks_the_recipe_and_a_version_that_is_not_known_are_refused(te, monkeypatch):
    adapter, _ = te
    monkeypatch.setattr(adapter.te, "is_mxfp8_available", lambda return_reason: (False, "compute capability 10.0 is needed"))
    with pytest.raises(ConfigError, match=r"learner\.fp8\.recipe=mxfp8 does not run here: compute capability 10\.0"):
        adapter.TransformerEngine("mxfp8")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")
    with pytest.raises(ConfigError, match=r"knows TransformerEngine 2\.9 to 2\.11, found 2\.13\.0"):
        adapter.TransformerEngine("current")
