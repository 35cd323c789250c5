"""Benchmarks: ggcl_fast against what one would do instead."""
