"""TransformerEngine's FP8 quantisation in plain torch, bit by bit, for machines that lack it; products are float32.

Knows the rules by which each recipe finds a scale (common/recipe/recipe_common.cuh, common/cast/mxfp8/quantize_mxfp8.cuh and
pytorch/quantization.py of TransformerEngine 2.9 to 2.11). A product of two FP8 numbers is exact in float32, so what differs from a GPU
is the order of a sum.

Dimension key: n rows, m columns of a tensor, b numbers that share a scale.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_opd.kernels.fp8 import E4M3, LARGEST, DelayedScale, Layout, Recipe, Role

BLOCK, MX_BLOCK = 128, 32  # numbers that share a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """FP8 numbers and what one of them is worth."""

    codes: torch.Tensor  # [n, m] float8
    scale_inv: torch.Tensor  # float32, one for each block, the blocks laid out as in the tensor
    block: tuple[int, int]  # rows and columns that share a scale

    def values(self) -> torch.Tensor:
        """What they stand for [n, m], float32."""
        wide = self.scale_inv.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return self.codes.float() * wide[: self.codes.shape[0], : self.codes.shape[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulated:
    """A quantised tensor by its values, which may differ by the direction that is summed over."""

    rowwise: torch.Tensor | None  # [n, m] float32
    columnwise: torch.Tensor | None  # [n, m] float32


class Emulation:
    """The backend of CPUs."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._delayed: dict[Role, DelayedScale] = {}

    def quantize(self, x: torch.Tensor, role: Role, *, rowwise: bool, columnwise: bool) -> Emulated:
        """See `Backend`."""
        if self.recipe == "current":
            both = per_tensor(x, current_scale(x)).values()
        elif self.recipe == "delayed":
            both = self._by_history(x, role)
        elif self.recipe == "blockwise" and role.operand == "rows":
            both = blocks(x, square=True).values()
        else:
            along = mx_blocks if self.recipe == "mxfp8" else blocks
            return Emulated(
                rowwise=along(x).values() if rowwise else None,
                columnwise=along(x.t()).values().t() if columnwise else None,
            )
        return Emulated(rowwise=both if rowwise else None, columnwise=both if columnwise else None)

    def values(self, quantized: Emulated) -> torch.Tensor:
        """See `Backend`."""
        assert quantized.rowwise is not None, "quantised without rowwise"
        return quantized.rowwise

    def product(self, a: Emulated, b: Emulated, layout: Layout, *, out: torch.Tensor | None = None, add: bool = False) -> torch.Tensor:
        """See `Backend`."""
        of_a = a.rowwise if layout == "TN" else a.columnwise
        of_b = b.columnwise if layout == "NT" else b.rowwise
        assert of_a is not None and of_b is not None, f"a product {layout} wants directions that were not quantised"
        first, second = of_b.t() if layout == "NT" else of_b, of_a.t() if layout == "TN" else of_a
        return torch.addmm(out, first, second, out=out) if add else torch.mm(first, second, out=out)

    def _by_history(self, x: torch.Tensor, role: Role) -> torch.Tensor:
        state = self._delayed.get(role) or self._delayed.setdefault(role, DelayedScale(x))
        values = per_tensor(x, state.scale).values()
        state.history[0] = x.abs().amax().float()
        state.update()
        return values


def to_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest, of two equally near to the even one; past the largest number that number."""
    return scaled.clamp(-LARGEST, LARGEST).to(E4M3)


def scale_from(amax: torch.Tensor, *, for_inf: float) -> torch.Tensor:
    """The power of 2 that takes `amax` nearest to the largest code without passing it, 1 where there is none."""
    scale = torch.full_like(amax, LARGEST) / amax  # a number over a tensor would be its reciprocal times the number
    scale = scale.masked_fill(scale.isinf(), for_inf)
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def current_scale(x: torch.Tensor) -> torch.Tensor:
    """[1], of a whole tensor."""
    return scale_from(x.abs().amax().float().view(1), for_inf=torch.finfo(torch.float32).max)


def per_tensor(x: torch.Tensor, scale: torch.Tensor) -> Codes:
    """One scale for all."""
    return Codes(codes=to_codes(x.float() * scale), scale_inv=scale.reciprocal().view(1, 1), block=tuple(x.shape))


def blocks(x: torch.Tensor, *, square: bool = False) -> Codes:
    """One power of 2 for 128 numbers of a row, or for 128 rows of them."""
    height = BLOCK if square else 1
    x_ahcb = _in_blocks(x, height, BLOCK)
    amax = x_ahcb.abs().amax((1, 3), keepdim=True).float()
    scale = scale_from(amax, for_inf=torch.finfo(x.dtype).max)
    codes = to_codes(x_ahcb.float() * scale).flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]]
    return Codes(codes=codes, scale_inv=scale.reciprocal()[:, 0, :, 0], block=(height, BLOCK))


def mx_blocks(x: torch.Tensor) -> Codes:
    """One power of 2 for 32 numbers of a row, the exponent rounded up so that none is too large."""
    x_ahcb = _in_blocks(x, 1, MX_BLOCK)
    amax = x_ahcb.abs().amax((1, 3), keepdim=True).float()
    bits = (amax * torch.tensor(1 / LARGEST, dtype=torch.float32)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    exponent = exponent + ((mantissa > 0) & (exponent < 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000)))
    scale = torch.where(exponent == 0, 1.0, ((254 - exponent) << 23).view(torch.float32))
    codes = to_codes(x_ahcb.float() * scale).flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]]
    scale_inv = (exponent << 23).view(torch.float32)
    return Codes(codes=codes, scale_inv=scale_inv[:, 0, :, 0], block=(1, MX_BLOCK))


def _in_blocks(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[n / height, height, m / width, width], filled up with zeros."""
    x = F.pad(x, (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    return x.unflatten(1, (-1, width)).unflatten(0, (-1, height))
