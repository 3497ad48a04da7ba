"""A response that comes in pieces: each is journaled as it comes, so that an interrupted one goes on behind the last."""

from dataclasses import replace

import numpy as np

from megatron_opd.types import Rollout

_ALIGNED = ("response_ids", "logp", "head_ids", "head_logp", "draw_ids", "draw_counts", "draw_sizes", "draw_logp")


def joined(begun: Rollout | None, piece: Rollout) -> Rollout | None:
    """The response with its next piece; None if the piece starts neither where `begun` ends nor anew, or holds other things."""
    start = piece.segments[0].first_token if piece.segments else 0  # an empty response is whole, and somebody else's to judge
    if start == 0:
        return piece
    if begun is None or begun.finish_reason != "unfinished" or start != len(begun.response_ids):
        return None
    arrays = {name: (getattr(begun, name), getattr(piece, name)) for name in _ALIGNED}
    if any((before is None) != (after is None) for before, after in arrays.values()):
        return None
    whole = {name: None if before is None else np.concatenate((before, after)) for name, (before, after) in arrays.items()}
    same = piece.segments[0].version == begun.segments[-1].version
    return replace(piece, segments=begun.segments + piece.segments[same:], **whole)
