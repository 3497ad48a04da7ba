import torch

from megatron_opd.estimators.sft import SFT
from tests.estimators.cases import dense_scores, logits, micro_batch


def test_the_loss_is_the_cross_entropy_of_the_completion():
    z = logits(5, 11, 0).requires_grad_()
    tokens = torch.tensor([[0], [10], [3], [3], [7]])
    loss = SFT()(dense_scores(z, micro_batch(SFT().needs, z.detach(), z.detach(), tokens, None), SFT().needs)).loss
    expected = torch.nn.functional.cross_entropy(z, tokens[:, 0], reduction="none")
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(grad, z.detach().softmax(-1).scatter_add(1, tokens, -torch.ones(5, 1, dtype=torch.float64)))


def test_nothing_is_generated_and_no_teacher_asked():
    assert not SFT().needs.generation and not SFT().needs.teacher
