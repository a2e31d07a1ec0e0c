"""Text and tokens: the tokenizer, chat templates, incremental detokenising and stop strings.

Nothing here knows a request, a stream or a model; the API process turns text into ids with it, the engine
process turns ids into text.
"""
