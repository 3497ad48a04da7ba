"""Where trajectories wait: first in, first out, by start."""
