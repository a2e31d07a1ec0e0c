"""What holds for all tests: no example of Hypothesis has a deadline. How long one takes is the machine's affair, and a
slow hour must not fail a test; what must be fast is measured in ``bench``."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
