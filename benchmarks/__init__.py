"""Benchmarks of speed, memory and memory traffic, each comparing two or more tasks in one run."""
