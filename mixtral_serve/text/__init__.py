"""Text and tokens: the tokenizer, chat formats, detokenising, stop strings, grammars, and calls of functions as text.

Nothing here knows a request, a stream or a model; the API process turns text into ids with it, the engine
process turns ids into text.
"""
