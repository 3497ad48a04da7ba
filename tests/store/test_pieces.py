"""A response that came in pieces is the one that came at once."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from megatron_opd.rollout.scripted import ScriptedRollout, ScriptedSettings
from megatron_opd.store.pieces import joined
from megatron_opd.types import Needs, Prompt, Segment
from tests.runtime.test_wire import same

PROMPT = Prompt(index=3, token_ids=np.array([2, 3], dtype=np.int32))


def pieces(piece_tokens, needs):
    """What is sampled one after the other; versions rise by one with each piece."""
    script = ScriptedSettings(
        needs=needs, vocab_size=37, max_response_tokens=12, end_id=1, length=lambda index: 11, piece_tokens=piece_tokens
    )
    backend, found, begun_ids = ScriptedRollout(script), [], None
    while not found or found[-1].finish_reason == "unfinished":
        found.append(asyncio.run(backend.generate(replace(PROMPT, begun_ids=begun_ids))))
        begun_ids = np.concatenate([piece.response_ids for piece in found])
        asyncio.run(backend.receive_weights(len(found)))
    return found


@pytest.mark.parametrize("needs", [Needs(behaviour_logp=True, head=3, draws=2), Needs(behaviour_logp=True), Needs(draws=2)])
@pytest.mark.parametrize("piece_tokens", [1, 2, 5, 10, 11, 12])
def test_pieces_are_the_whole_with_the_version_of_each(piece_tokens, needs):
    (whole,), found = pieces(0, needs), pieces(piece_tokens, needs)
    assert len(found) == -(-11 // piece_tokens)
    response = None
    for piece in found:
        response = joined(response, piece)
    assert same(replace(response, segments=whole.segments), whole)
    assert response.segments == tuple(Segment(first_token=i * piece_tokens, version=i) for i in range(len(found)))


def test_one_version_is_one_segment():
    first, second = pieces(6, Needs())
    second = replace(second, segments=(Segment(first_token=6, version=0), Segment(first_token=8, version=1)))
    assert joined(first, second).segments == (Segment(first_token=0, version=0), Segment(first_token=8, version=1))


def test_a_piece_that_does_not_fit_is_none_and_one_that_starts_anew_replaces():
    first, second, third = pieces(4, Needs())
    for begun, piece in ((None, second), (first, third), (joined(first, second), second), (replace(first, finish_reason="length"), second)):
        assert joined(begun, piece) is None
    assert joined(first, replace(second, logp=np.zeros(4, np.float32))) is None
    assert joined(joined(first, second), first) is first
