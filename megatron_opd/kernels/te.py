"""The one place that calls TransformerEngine's quantisers and products. It has not run on a GPU yet.

Every call here is bound, in the tests, to the signatures that the sources of the supported versions have. Split accumulators are asked
for in every product: what TransformerEngine takes for forward products of current scaling by default sums in fewer bits.
"""

from importlib import metadata

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from transformer_engine.pytorch.cpp_extensions import general_gemm

from megatron_opd.errors import ConfigError
from megatron_opd.kernels.fp8 import DelayedScale, Layout, Recipe, Role

OLDEST, TOO_NEW = (2, 9), (2, 12)
GIVES_ITSELF_A_WORKSPACE = (2, 10)  # general_gemm, from this version on


class TransformerEngine:
    """The backend of GPUs."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ConfigError where version or chip do not know the recipe."""
        self.recipe = recipe
        self._delayed: dict[Role, DelayedScale] = {}
        version = metadata.version("transformer_engine")
        self._version = tuple(int(part) for part in version.split(".")[:2])
        if not OLDEST <= self._version < TOO_NEW:
            raise ConfigError(
                f"learner.kernels=te knows TransformerEngine 2.9 to 2.11, found {version}; install transformer-engine>=2.9,<2.12"
            )
        known = {"mxfp8": te.is_mxfp8_available, "blockwise": te.is_fp8_block_scaling_available}.get(recipe, te.is_fp8_available)
        available, reason = known(return_reason=True)
        if not available:
            raise ConfigError(f"learner.fp8.recipe={recipe} does not run here: {reason}; choose another recipe or another learner.kernels")

    def quantize(self, x: torch.Tensor, role: Role, *, rowwise: bool, columnwise: bool) -> te.QuantizedTensor:
        """See `Backend`."""
        x = x.contiguous()
        dtype = tex.DType.kFloat8E4M3
        directions = {"rowwise": rowwise, "columnwise": columnwise}
        match self.recipe:
            case "current":
                return te.Float8CurrentScalingQuantizer(dtype, device=x.device, force_pow_2_scales=True, **directions)(x)
            case "blockwise":
                return te.Float8BlockQuantizer(dtype, block_scaling_dim=2 if role.operand == "rows" else 1, **directions)(x)
            case "mxfp8":
                return te.MXFP8Quantizer(dtype, **directions)(x)
            case "delayed":
                state = self._delayed.get(role) or self._delayed.setdefault(role, DelayedScale(x))
                quantized = te.Float8Quantizer(state.scale, state.history[0], dtype, **directions)(x)  # writes history[0]
                state.update()
                return quantized

    def values(self, quantized: te.QuantizedTensor) -> torch.Tensor:
        """See `Backend`."""
        return quantized.dequantize(dtype=torch.float32)

    def product(
        self, a: te.QuantizedTensor, b: te.QuantizedTensor, layout: Layout, *, out: torch.Tensor | None = None, add: bool = False
    ) -> torch.Tensor:
        """See `Backend`."""
        found, *_ = general_gemm(
            a,
            b,
            **self._workspace(),
            out_dtype=torch.float32,
            layout=layout,
            out=out,
            accumulate=add,
            use_split_accumulator=True,
            grad=layout != "TN",
        )
        return found

    def _workspace(self) -> dict[str, torch.Tensor]:
        if self._version >= GIVES_ITSELF_A_WORKSPACE:
            return {}
        from transformer_engine.pytorch.module.base import get_workspace

        return {"workspace": get_workspace()}
