"""Benchmarks: training, sampling, data and commands, compared with plain loops, other packages and limits."""
