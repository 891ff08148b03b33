"""A run as a folder: ask, build, loop, evaluate, save, stop, resume, compare, export."""
