"""Benchmarks: one runnable file a claim, ours and a peer alternating in one process."""
