"""Teachers: finished rollouts in, token-level log-probabilities out."""
