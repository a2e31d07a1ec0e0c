"""What clients may send and what they get: pydantic models with every field bounded."""
