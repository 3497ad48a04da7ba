"""What is computed straight from hidden states and the sharded LM head, token chunk by token chunk.

Doors: `logps` (log-probabilities at given ids and the mass outside them, differentiable), `dense_kl` (a divergence from
the teacher over the whole vocabulary, differentiable), `top_k` (the most probable ids), and the slow twins
`reference_logps` and `reference_dense_kl`. Both differentiable doors have two implementations of one rank's work, torch in chunks and
Triton, between which nothing else differs. This room alone knows tensor parallelism; it knows no objective but these
divergences.
"""

from megatron_opd.kernels.dense_kl import DenseKL, dense_kl
from megatron_opd.kernels.logits import Implementation
from megatron_opd.kernels.logps import EMPTY_REST, TokenLogps, logps
from megatron_opd.kernels.reference import reference_dense_kl, reference_logps
from megatron_opd.kernels.top_k import top_k

__all__ = ["EMPTY_REST", "DenseKL", "Implementation", "TokenLogps", "dense_kl", "logps", "reference_dense_kl", "reference_logps", "top_k"]
