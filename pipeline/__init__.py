"""The library: contracts, artifacts, the stage protocol, the algorithm room, engines, graders and training.

It knows nothing of the stages and flows built on it. Floors import downwards only; `pyproject.toml` holds them to it.
"""
