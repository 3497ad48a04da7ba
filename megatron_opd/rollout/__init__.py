"""Sampling from the student: vLLM and its scripted twin."""
