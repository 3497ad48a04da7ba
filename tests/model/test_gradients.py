import pytest
import torch

from tests.model.conftest import MODELS
from tests.model.tiny import BATCHES, SIZES

pytestmark = pytest.mark.engines


def test_gradients_are_those_of_transformers_in_every_layout(ranks, transformers_says):
    for name, says in transformers_says.items():
        for layout, models in enumerate(ranks[0]):
            got, want = models[name]["gradients"], says["gradients"]
            assert got.keys() == want.keys()
            for parameter, gradient in want.items():
                error = (got[parameter] - gradient).norm() / gradient.norm()
                assert error < 1e-5, f"{name}, layout {layout}: gradient of {parameter} is off by {error:.1e}"


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_recompute_runs_every_layer_twice_and_changes_no_bit(ranks):
    plain, recomputed = ranks[0]
    for name in plain:
        layers = (SIZES | MODELS[name])["num_hidden_layers"] * len(BATCHES)
        assert (plain[name]["layers_run"], recomputed[name]["layers_run"]) == (layers, 2 * layers), name
        assert torch.equal(plain[name]["logits"], recomputed[name]["logits"])
        for parameter, gradient in plain[name]["gradients"].items():
            assert torch.equal(gradient, recomputed[name]["gradients"][parameter]), parameter
