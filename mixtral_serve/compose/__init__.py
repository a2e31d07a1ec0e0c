"""Settings in, objects out: the only place where all rooms meet. No logic of its own.

plan      what the settings mean for memory and for the schedule; imports no tensor library
engine    builds and runs the engine process (``python -m mixtral_serve.compose.engine``)
server    builds and runs the API process
doctor    looks at a machine and a configuration without serving
"""
