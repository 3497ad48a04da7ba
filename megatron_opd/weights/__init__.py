"""Weights on their way between Megatron-Core and Hugging Face: names, shards, files, wires. No modules, no Megatron."""
