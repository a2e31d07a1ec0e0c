"""The OpenAI API over HTTP: schemas, routes, streaming, errors. Knows the engine by its client alone."""
