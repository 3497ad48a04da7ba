"""A patch turns the old bytes into the new ones exactly, or there is none because it would not be shorter."""

import pytest
import torch

from megatron_opd.weights import delta


def changed(words, where):
    generator = torch.Generator().manual_seed(3)
    old = torch.randint(-(2**15), 2**15, (words,), dtype=torch.int16, generator=generator)
    new = old.clone()
    new[where] ^= 1
    return old.view(torch.uint8), new.view(torch.uint8)


@pytest.mark.parametrize(
    ("words", "where", "width"),
    [
        (40, [], 2),
        (40, [0], 2),
        (40, [0, 1, 39], 2),
        (70_000, [65_535], 2),  # a gap whose sign bit is set
        (70_000, [65_536], 4),
        (300_000, [3, 200_000, 200_001, 299_999], 4),
    ],
)
def test_a_patch_makes_old_new_and_costs_two_words_for_each_word_that_changed(words, where, width):
    old, new = changed(words, where)
    patch, found = delta.changes(old, new)
    assert found == width and patch.numel() == len(where) * (width + 2)
    delta.apply(patch, width, old)
    assert torch.equal(old, new)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.49])
def test_scattered_changes_come_through(share):
    old, new = changed(10_000, (torch.rand(10_000, generator=torch.Generator().manual_seed(1)) < share).nonzero()[:, 0])
    patch, width = delta.changes(old, new)
    delta.apply(patch, width, old)
    assert torch.equal(old, new) and width == 2


def test_there_is_no_patch_where_most_has_changed():
    old, new = changed(100, range(0, 100, 2))
    assert delta.changes(old, new) is None


@pytest.mark.parametrize("byte", range(8))
@pytest.mark.parametrize("width", [2, 4])
def test_a_damaged_patch_does_no_more_than_wrong_words(byte, width):
    old, new = changed(70_000, [1, 69_999] if width == 4 else [1, 60_000])
    patch, _ = delta.changes(old, new)
    patch[byte] ^= 0xFF
    delta.apply(patch, width, old)
