"""The products of an LM head in FP8: which operand is quantised where, and what it costs in truth.

Knows policies and roles; refuses to know how a tensor is quantised and multiplied, which is a backend's: TransformerEngine
(kernels/te.py) on a GPU, its rules in plain torch (kernels/fp8_emulation.py) on a CPU.

Gradients are always made from FP8: relative errors of a few per cent that average out. Tokens' gradients differ by orders of magnitude,
so each is scaled to the order of 1 by a power of 2, which goes into the token's hidden states where tokens are summed; then e4m3 has
range enough, and its third bit of mantissa halves the error of the usual e5m2. Logits are another matter, because what is trained is the
small difference p - q of two large vectors, and the error of an FP8 logit does not shrink with it. So there are three policies for them:

- "bf16": operands in bfloat16, sums in float32. The default.
- "fp8x2": both operands as a sum of two FP8 terms, x = hi + lo, and all four products of them: nearer to the truth than bfloat16. Scales
  are powers of 2, so that two terms of 4 bits hold the 8 of a bfloat16 number whole.
- "fp8": one FP8 product. Adds noise that `noise` measures.

Dimension key: T packed targets, C tokens of one chunk, D hidden size, v vocabulary rows of this rank.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from megatron_opd.errors import ConfigError
from megatron_opd.kernels.products import HeadProducts, Owner

Policy = Literal["bf16", "fp8x2", "fp8"]
Recipe = Literal["current", "delayed", "blockwise", "mxfp8"]
Operand = Literal["hidden", "rows", "gradient", "weighted"]  # weighted: hidden states times the order of their gradient
Layout = Literal["TN", "NN", "NT"]

E4M3 = torch.float8_e4m3fn  # the format of everything
LARGEST = torch.finfo(E4M3).max
HISTORY = 1024  # amaxes that delayed scaling looks back on
MARGIN = 2  # powers of 2 that it leaves to what its past did not foresee: chunks differ, and floating point loses nothing by it
MULTIPLE = {"current": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}  # of every size of an operand; zeros fill it up


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What a tensor is, which decides its blocks and, under delayed scaling, its history."""

    owner: Owner
    operand: Operand
    low: bool = False  # the second term of two


class Backend(Protocol):
    """Quantises, and multiplies what it has quantised. `Any` is its own quantised tensor, for the directions that were asked for."""

    recipe: Recipe

    def quantize(self, x: torch.Tensor, role: Role, *, rowwise: bool, columnwise: bool) -> Any:
        """For products that sum along the rows of `x`, and for those that sum along its columns."""
        ...

    def values(self, quantized: Any) -> torch.Tensor:
        """What it stands for, float32; wants `rowwise`."""
        ...

    def product(self, a: Any, b: Any, layout: Layout, *, out: torch.Tensor | None = None, add: bool = False) -> torch.Tensor:
        """float32: "TN" is b @ a.T, "NN" b @ a, "NT" b.T @ a; into `out` if given, added to it if `add`."""
        ...


class DelayedScale:
    """The scale of one role from the largest magnitudes of its past, by TransformerEngine's rule, rounded down to a power of 2. The first
    tensor is its own past.
    """

    def __init__(self, first: torch.Tensor) -> None:
        self.scale = torch.ones(1, device=first.device)
        self._largest = torch.full_like(self.scale, LARGEST)  # a number over a tensor would be divided otherwise
        self.history = torch.zeros(HISTORY, 1, device=first.device)  # the quantiser writes the magnitude of its tensor to the first place
        self.history[0] = first.detach().abs().amax().float() if first.numel() else 0
        self.update()

    def update(self) -> None:
        """After each tensor."""
        amax = self.history.amax(0)
        scale = torch.where((amax > 0) & amax.isfinite(), self._largest / amax / 2**MARGIN, self.scale)
        self.scale.copy_(torch.ldexp(torch.ones_like(scale), torch.frexp(scale.clamp_max_(2.0**126)).exponent - 1))
        self.history.copy_(self.history.roll(1, 0))
        self.history[0] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Products:
    """`Products` whose gradients, and by policy logits, are made from FP8."""

    policy: Policy
    backend: Backend

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Of the logits."""
        assert hidden.dtype in (torch.bfloat16, torch.float32), f"FP8 products are made from bfloat16 or float32, not {hidden.dtype}"
        return torch.float32

    def head(self, rows_vD: torch.Tensor, owner: Owner) -> HeadProducts:
        """What multiplies with the rows of one head; quantises them here, once for all chunks."""
        return _NoRows() if not rows_vD.shape[0] else _FP8Head(rows_vD, owner, self.policy, self.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstBF16:
    """The student's logits by `products`, the teacher's in bfloat16: with the same hidden states and head, KL(p||q) is noise alone."""

    products: FP8Products

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Of the logits."""
        return self.products.dtype(hidden)

    def head(self, rows_vD: torch.Tensor, owner: Owner) -> HeadProducts:
        """What multiplies with the rows of one head."""
        exact = FP8Products(policy="bf16", backend=self.products.backend)
        return (self.products if owner == "student" else exact).head(rows_vD, owner)


def fp8_products(policy: Policy, recipe: Recipe, device: torch.device | str) -> FP8Products:
    """On a GPU by TransformerEngine, on a CPU by the emulation of its rules.

    Raises:
        ConfigError: TransformerEngine is missing, too old or new, or the chip does not know the recipe.
    """
    if torch.device(device).type == "cuda":
        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError(
                "learner.kernels=te needs TransformerEngine; install transformer-engine[pytorch]>=2.9,<2.12 or choose another"
            )
        from megatron_opd.kernels.te import TransformerEngine

        return FP8Products(policy=policy, backend=TransformerEngine(recipe))
    from megatron_opd.kernels.fp8_emulation import Emulation

    return FP8Products(policy=policy, backend=Emulation(recipe))


class _NoRows:
    """The head of a rank that holds padding only."""

    def logits(self, hidden_CD: torch.Tensor, out_Cv: torch.Tensor) -> torch.Tensor:
        return out_Cv

    def add_gradients(self, *_: object) -> None:
        return


class _FP8Head:
    """Rows of a head, quantised; the head of a teacher only for logits."""

    def __init__(self, rows_vD: torch.Tensor, owner: Owner, policy: Policy, backend: Backend) -> None:
        self._owner, self._policy, self._backend, self._shape = owner, policy, backend, rows_vD.shape
        self._bf16_vD = rows_vD.to(torch.bfloat16) if policy == "bf16" else None
        self._rows, self._low = None, None
        if policy != "bf16" or owner == "student":
            self._rows, self._low = self._terms(rows_vD, "rows", columnwise=owner == "student")

    def logits(self, hidden_CD: torch.Tensor, out_Cv: torch.Tensor) -> torch.Tensor:
        if self._bf16_vD is not None:
            return _float32_sums(hidden_CD.to(torch.bfloat16), self._bf16_vD.t(), out_Cv)
        hidden, low = self._terms(hidden_CD, "hidden", columnwise=False)
        place = self._place(out_Cv)
        self._backend.product(self._rows, hidden, "TN", out=place)
        if self._policy == "fp8x2":
            self._backend.product(self._low, hidden, "TN", out=place, add=True)
            self._backend.product(self._rows, low, "TN", out=place, add=True)
            self._backend.product(self._low, low, "TN", out=place, add=True)
        return out_Cv if place is out_Cv else out_Cv.copy_(place[: out_Cv.shape[0], : out_Cv.shape[1]])

    def add_gradients(
        self,
        dz_Cv: torch.Tensor,
        hidden_CD: torch.Tensor,
        grad_hidden_CD: torch.Tensor | None,
        grad_rows_vD: torch.Tensor | None,
        scale: float,
    ) -> None:
        to_hidden, to_rows = grad_hidden_CD is not None, grad_rows_vD is not None
        order_C1 = _order(dz_Cv)
        dz = self._quantize(dz_Cv.div_(order_C1), self._role("gradient"), rowwise=to_hidden, columnwise=to_rows)
        if grad_hidden_CD is not None:
            found = self._backend.product(self._rows, dz, "NN")
            grad_hidden_CD.addcmul_(found[: grad_hidden_CD.shape[0], : grad_hidden_CD.shape[1]], order_C1, value=scale)
        if grad_rows_vD is not None:
            hidden = self._quantize(hidden_CD * order_C1, self._role("weighted"), rowwise=False, columnwise=True)
            if scale == 1 and self._place(grad_rows_vD) is grad_rows_vD:
                self._backend.product(hidden, dz, "NT", out=grad_rows_vD, add=True)
            else:
                found = self._backend.product(hidden, dz, "NT")
                grad_rows_vD.add_(found[: grad_rows_vD.shape[0], : grad_rows_vD.shape[1]], alpha=scale)

    def _role(self, operand: Operand, low: bool = False) -> Role:
        return Role(owner=self._owner, operand=operand, low=low)

    def _terms(self, x: torch.Tensor, operand: Operand, *, columnwise: bool) -> tuple[Any, Any]:
        """The quantised tensor and, where the policy has two, what it leaves, quantised as well."""
        rowwise = self._policy != "bf16"
        high = self._quantize(x, self._role(operand), rowwise=rowwise, columnwise=columnwise)
        if self._policy != "fp8x2":
            return high, None
        left = _filled_up(x.float(), self._backend.recipe) - self._backend.values(high)
        return high, self._backend.quantize(left, self._role(operand, low=True), rowwise=True, columnwise=False)

    def _quantize(self, x: torch.Tensor, role: Role, *, rowwise: bool, columnwise: bool) -> Any:
        return self._backend.quantize(_filled_up(x, self._backend.recipe), role, rowwise=rowwise, columnwise=columnwise)

    def _place(self, out: torch.Tensor) -> torch.Tensor:
        """`out` itself where a product may be written to it, else one as large as padded operands make it."""
        sizes = _multiples(out.shape, self._backend.recipe)
        return out if sizes == tuple(out.shape) else out.new_empty(sizes)


def _order(dz_Cv: torch.Tensor) -> torch.Tensor:
    """The power of 2 [C, 1] below the largest gradient of each token, 1 where there is none; none so small that its inverse overflows."""
    amax_C1 = dz_Cv.abs().amax(1, keepdim=True)
    exponent_C1 = torch.frexp(amax_C1).exponent.clamp_min(-100) - 1
    return torch.ldexp(torch.ones_like(amax_C1), exponent_C1).masked_fill(amax_C1 == 0, 1)


def _float32_sums(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A product of bfloat16 operands as a GPU makes it: exact products, float32 sums."""
    return torch.mm(a, b, out_dtype=torch.float32, out=out) if a.is_cuda else torch.mm(a.float(), b.float(), out=out)


def _multiples(shape: torch.Size, recipe: Recipe) -> tuple[int, ...]:
    return tuple(-(-size // MULTIPLE[recipe]) * MULTIPLE[recipe] for size in shape)


def _filled_up(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """With zeros, to sizes that the matrix unit takes; they change no scale and no product."""
    wanted = _multiples(x.shape, recipe)
    return x if wanted == tuple(x.shape) else F.pad(x, (0, wanted[1] - x.shape[1], 0, wanted[0] - x.shape[0]))
