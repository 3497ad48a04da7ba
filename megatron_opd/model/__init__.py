"""Megatron-Core models from Hugging Face configs: built, sharded, run, filled and read out."""
