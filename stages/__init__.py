"""The stages: one file each, settings, inputs, pure functions, and the shell that reads and writes. They never meet
but on disk."""
