"""What is computed straight from hidden states and the sharded LM head, token chunk by token chunk.

Doors: `logps` (log-probabilities at given ids and the tail mass, differentiable), `top_k` (the most probable ids) and
`reference_logps` (the slow twin of `logps`). This room alone knows tensor parallelism; it knows no objective.
"""

from megatron_opd.kernels.logps import EMPTY_TAIL, logps
from megatron_opd.kernels.reference import reference_logps
from megatron_opd.kernels.top_k import top_k

__all__ = ["EMPTY_TAIL", "logps", "reference_logps", "top_k"]
