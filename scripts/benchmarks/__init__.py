"""Benchmarks of p2pmoe: every case beside its baseline in the same run."""
