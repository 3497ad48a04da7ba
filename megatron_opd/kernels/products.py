"""The matrix products of an LM head: logits from hidden states, and the gradients of both from those of logits.

Knows dtypes and the memory of a product, nothing of shards, tokens that count or what logits are for. `TorchProducts` here takes
torch's own; `kernels/fp8.py` takes quantised ones.

Dimension key: C tokens of one chunk, D hidden size, v vocabulary rows of this rank without padding.
"""

from typing import Literal, Protocol

import torch

Owner = Literal["student", "teacher"]  # of a head

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}  # numbers of a head's gradient that are added up at a time: what a cache holds, or few launches


class HeadProducts(Protocol):
    """The products of one head, prepared for any number of chunks."""

    def logits(self, hidden_CD: torch.Tensor, out_Cv: torch.Tensor) -> torch.Tensor:
        """hidden @ rows.T into `out`, before the temperature."""
        ...

    def add_gradients(
        self,
        dz_Cv: torch.Tensor,
        hidden_CD: torch.Tensor,
        grad_hidden_CD: torch.Tensor | None,
        grad_rows_vD: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Adds `scale` times what follows from the gradient of the logits, which may be written to, to those sums that are given."""
        ...


class Products(Protocol):
    """How heads are multiplied."""

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Of the logits of these hidden states."""
        ...

    def head(self, rows_vD: torch.Tensor, owner: Owner) -> HeadProducts:
        """What multiplies with the rows of one head."""
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of accumulation: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What `matmul` leaves: a GPU its float32 sums, a CPU the same rounded to the dtype of the inputs."""
    return wide(dtype) if device.type == "cuda" else dtype


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b` in `product_dtype`."""
    if product_dtype(a.dtype, a.device) == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=wide(a.dtype), out=out)


class TorchProducts:
    """Torch's own products in the dtype of the head."""

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Of the logits of these hidden states."""
        return product_dtype(hidden.dtype, hidden.device)

    def head(self, rows_vD: torch.Tensor, owner: Owner) -> "_TorchHead":
        """What multiplies with the rows of one head, whoever owns it."""
        return _TorchHead(rows_vD)


class _TorchHead:
    """Rows of a head, multiplied in their own dtype."""

    def __init__(self, rows_vD: torch.Tensor) -> None:
        self._rows_vD = rows_vD

    def logits(self, hidden_CD: torch.Tensor, out_Cv: torch.Tensor) -> torch.Tensor:
        return matmul(hidden_CD, self._rows_vD.t(), out=out_Cv)

    def add_gradients(
        self,
        dz_Cv: torch.Tensor,
        hidden_CD: torch.Tensor,
        grad_hidden_CD: torch.Tensor | None,
        grad_rows_vD: torch.Tensor | None,
        scale: float,
    ) -> None:
        rows_vD = self._rows_vD
        dz_Cv = dz_Cv.to(rows_vD.dtype)
        if grad_hidden_CD is not None:
            grad_hidden_CD.add_(matmul(dz_Cv, rows_vD), alpha=scale)
        if grad_rows_vD is not None:
            size = max(1, BLOCK[rows_vD.device.type] // rows_vD.shape[1])
            for first in range(0, rows_vD.shape[0], size):
                b = slice(first, first + size)
                grad_rows_vD[b].add_(matmul(dz_Cv[:, b].t(), hidden_CD).to(grad_rows_vD.dtype), alpha=scale)


TORCH = TorchProducts()
