"""Where data comes from: files as they are in the wild, and built-in worlds.

`stages/ingest.py` makes artifacts of what they give.
"""
