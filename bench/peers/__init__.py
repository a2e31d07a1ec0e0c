"""Ourselves against the other CPU servers, on one machine, in one run: see ``__main__``.

Nothing is imported here: the workers run in environments that hold one peer and nothing of ours.
"""
