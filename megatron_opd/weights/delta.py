"""What changed between two versions of a bucket, as a patch of 16-bit words. Pure functions; they know no network.

One optimizer step moves few weights of a bfloat16 model by a whole unit in the last place, and they lie scattered, so a patch
lists single words: the gap to the word that changed before it, and the new word.
"""

import torch
from torch import Tensor

HEADER_WORDS = 4
_GAP = {2: torch.int16, 4: torch.int32}  # bytes of a gap -> how it is stored; the short one wraps and is read without its sign


def changes(old: Tensor, new: Tensor) -> tuple[Tensor, int] | None:
    """The patch from `old` to `new`, and the bytes of each of its gaps; None if the patch would not be shorter than `new`.

    All are flat uint8 tensors, `old` and `new` of one even size.
    """
    new_words = new.view(torch.int16)
    where = (old.view(torch.int16) != new_words).nonzero()[:, 0]
    gaps = where.diff(prepend=where.new_tensor([-1])) - 1
    width = 2 if not len(gaps) or int(gaps.max()) < 1 << 16 else 4
    if len(where) * (width + 2) >= new.numel():
        return None
    return torch.cat([gaps.to(_GAP[width]).view(torch.uint8), new_words[where].view(torch.uint8)]), width


def header(size: int, width: int) -> Tensor:
    """[4] int64: what is said before a patch of `size` bytes, or with width 0 before all of the new bytes, said twice."""
    return torch.tensor([size, width, ~size, ~width])


def announced(head: Tensor, most: int) -> tuple[int, int] | None:
    """Size and width that a header says; None if it is damaged, as `most` bytes at most can follow."""
    size, width, not_size, not_width = head.tolist()
    whole = (width == 0 and size == most) or (width in _GAP and 0 <= size < most and size % (width + 2) == 0)
    return (size, width) if whole and (not_size, not_width) == (~size, ~width) else None


def apply(patch: Tensor, width: int, old: Tensor) -> None:
    """Makes `old` new, in place; a patch that points past its end, which is a damaged one, is left out."""
    count = patch.numel() // (width + 2)
    gaps = patch[: count * width].view(_GAP[width]).long()
    where = ((gaps & 0xFFFF if width == 2 else gaps) + 1).cumsum(0) - 1
    words = old.view(torch.int16)
    if count and int(where.min()) >= 0 and int(where.max()) < words.numel():
        words[where] = patch[count * width :].view(torch.int16)
