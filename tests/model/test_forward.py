import pytest
import torch

pytestmark = pytest.mark.engines


def test_hidden_states_times_head_are_the_logits_of_transformers_in_every_layout(ranks, transformers_says):
    for name, says in transformers_says.items():
        assert says["logits"].abs().max() > 1, "the test model is too flat to tell right from wrong"
        for by_rank in zip(*ranks, strict=True):
            found = [models[name]["logits"] for models in by_rank if models[name]["logits"] is not None]
            assert found, "no rank is on the last stage"
            for logits in found:
                torch.testing.assert_close(logits.double(), says["logits"], atol=1e-5, rtol=0)
