"""Benchmarks of the flagship workloads, and the figures drawn from their results.

`python -m perf_plots` draws figures from result files alone, `python -m perf_plots.gpu` measures on a machine with a
GPU, `python -m perf_plots.host_overhead` times the Python side of a call.
"""
