"""tools/fp8_error.py on random states: what it reports, and that the recommendation follows from it."""

import pytest
import torch

from megatron_opd.types import Divergence
from tools.fp8_error import POLICIES, RECIPES, States, measure


@pytest.fixture(scope="module")
def figures():
    g = torch.Generator().manual_seed(0)
    head, hidden = torch.randn(507, 128, generator=g) / 4, torch.randn(128, 128, generator=g)
    near = hidden + torch.logspace(-2.5, 0.4, 128)[:, None] * torch.randn(128, 128, generator=g)
    states = States(name="random", hidden=near, head=head, teacher_hidden=hidden, teacher_head=head)
    return measure([states], Divergence(kind="forward"))


def test_every_policy_and_recipe_is_measured_by_how_large_the_kl_is(figures):
    for policy in POLICIES:
        assert set(figures[policy]) == set(RECIPES)
        for found in figures[policy].values():
            kls = [group["kl"] for group in found["groups"]]
            assert len(kls) == 4 and kls == sorted(kls)
            worst = min(group["grad_hidden_cosine"] for group in found["groups"])
            assert found["grad_hidden_cosine"] == worst, "the summary is the worst group"


def test_the_default_keeps_gradients_two_terms_keep_logits_and_one_loses_both(figures):
    for recipe, found in figures["bf16"].items():
        assert min(found["grad_hidden_cosine"], found["grad_head_cosine"]) >= 0.998, recipe
        assert figures["fp8x2"][recipe]["float32_states"]["logit_rmse"] < found["float32_states"]["logit_rmse"], recipe
        assert figures["fp8"][recipe]["grad_hidden_cosine"] < 0.9 and figures["fp8"][recipe]["kl_bias_over_kl"] > 0.5, recipe
