"""What is computed straight from hidden states and the sharded LM head, token chunk by token chunk.

Doors: `logps` (log-probabilities at given ids and the mass outside them, differentiable), `dense_kl` (a divergence from
the teacher over the whole vocabulary, differentiable), `top_k` (the most probable ids), and the slow twins
`reference_logps` and `reference_dense_kl`. Behind both differentiable doors stand four implementations: "reference", "chunked" (torch),
"triton", and "te" (FP8 products); what the ranks say to each other is the same for the last three. This room alone knows tensor
parallelism; it knows no objective but these divergences. examples/KERNELS.md has formulas, costs and errors.
"""

from megatron_opd.kernels.dense_kl import Schedule, Upstream, dense_kl
from megatron_opd.kernels.fp8 import FP8Products, fp8_products
from megatron_opd.kernels.logits import Implementation
from megatron_opd.kernels.logps import logps
from megatron_opd.kernels.products import TORCH, Products
from megatron_opd.kernels.reference import reference_dense_kl, reference_logps
from megatron_opd.kernels.results import EMPTY_REST, DenseKL, TokenLogps
from megatron_opd.kernels.select import choose, fp8_noise
from megatron_opd.kernels.top_k import top_k

__all__ = [
    "EMPTY_REST",
    "TORCH",
    "DenseKL",
    "FP8Products",
    "Implementation",
    "Products",
    "Schedule",
    "TokenLogps",
    "Upstream",
    "choose",
    "dense_kl",
    "fp8_noise",
    "fp8_products",
    "logps",
    "reference_dense_kl",
    "reference_logps",
    "top_k",
]
