"""On-policy distillation of large language models at scale: Megatron-Core learner, vLLM rollouts, streamed weights."""

__version__ = "0.1.0"
