"""Benchmarks: what measures, never what asserts. Each module is a command; `--help` says how."""
