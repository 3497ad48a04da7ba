"""The Megatron-Core learner: trajectories in, one optimizer step and new weights out."""
