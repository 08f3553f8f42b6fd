"""The commands, a file a room: each is a few lines that call one function; `tokenflow.cli` lists them all.

Heavy imports stay inside the functions, so that every `--help` answers at once. A command takes what its
signature says, and its docstring is its help. One that returns a number chooses its exit code.
"""
