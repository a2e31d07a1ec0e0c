"""The model at its true size, on weights made in memory, through the real engine: ``python -m bench.full_size``."""
