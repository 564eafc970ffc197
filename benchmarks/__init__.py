"""Benchmarks: how fast the platform is, each number beside its limit and beside what others do."""
