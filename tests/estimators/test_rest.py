import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.estimators.rest import rest_mass


@given(st.lists(st.floats(-60, 60), min_size=3, max_size=12), st.integers(1, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rest_is_never_negative_and_its_log_is_finite(dtype, values, k):
    logp = torch.tensor([values], dtype=dtype).log_softmax(-1)
    mass, log_mass = rest_mass(logp.sort(descending=True).values[:, :k])
    assert 0 <= mass <= 1 and log_mass.isfinite()
    exact = torch.tensor(values, dtype=torch.float64).softmax(0).sort(descending=True).values[k:].sum()
    torch.testing.assert_close(mass[0].double(), exact, rtol=1e-4, atol=40 * torch.finfo(dtype).eps)


def test_a_rest_below_the_floor_is_exactly_zero():
    mass, log_mass = rest_mass(torch.tensor([[-1e-7], [1e-6], [-1e-4]]))
    assert mass[:2].tolist() == [0.0, 0.0] and (mass * log_mass)[:2].count_nonzero() == 0
    torch.testing.assert_close(mass[2], torch.tensor(1e-4), rtol=1e-3, atol=0)


def test_it_has_no_gradient():
    mass, log_mass = rest_mass(torch.zeros(2, 3, requires_grad=True) - 2)
    assert not mass.requires_grad and not log_mass.requires_grad
