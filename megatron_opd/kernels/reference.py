"""The slow twin of `logps`: full logits in plain autograd on one rank. What the kernel means, for readers and tests.

Dimension key: T packed targets, K ids per target, D hidden size, V vocabulary.
"""

import torch

from megatron_opd.kernels.logps import EMPTY_TAIL


def reference_logps(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, ids_TK: torch.Tensor, *, tail_columns: slice | None = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [T, K] at `ids` and the log of the mass [T] outside `ids[:, tail_columns]`; `head` holds no padding."""
    z_TV = hidden_TD @ head_VD.t() / temperature
    norm_T = z_TV.logsumexp(-1)
    logp_TK = z_TV.gather(1, ids_TK) - norm_T[:, None]
    if tail_columns is None:
        return logp_TK, None
    outside_TV = torch.ones_like(z_TV, dtype=torch.bool).scatter(1, ids_TK[:, tail_columns], False)
    empty_T = ~outside_TV.any(-1)
    outside_TV = outside_TV | empty_T[:, None]  # keeps -inf, and the NaN of its gradient, out of an empty row
    tail_norm_T = z_TV.masked_fill(~outside_TV, -torch.inf).logsumexp(-1)
    return logp_TK, torch.where(empty_T, EMPTY_TAIL, tail_norm_T - norm_T)
