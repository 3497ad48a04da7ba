"""The probability outside K known ids. Knows rounding; refuses to know whose probability it is.

Dimension key: T packed targets, K ids per target.
"""

import torch

FLOOR_EPS = 32  # below this many units of rounding a difference to 1 is noise: 3.8e-6 in float32, 7.1e-15 in float64


def rest_mass(logp_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass [T] outside K distinct ids and its log [T], from cached log-probabilities: constants without gradient.

    `1 - sum p` is known only to the rounding of log p, which is a logit minus a log-sum-exp of some tens of nats. Noise of
    that size is no mass: below the floor the mass is exactly 0, and its log that of the floor, so that a product of both
    is 0 and never NaN.
    """
    logp_TK = logp_TK.detach()
    floor = FLOOR_EPS * torch.finfo(logp_TK.dtype).eps
    mass_T = -torch.expm1(logp_TK.logsumexp(-1))
    mass_T = torch.where(mass_T > floor, mass_T, 0.0)
    return mass_T, mass_T.clamp_min(floor).log()
