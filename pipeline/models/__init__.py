"""Hugging Face checkpoints in, tensors out.

fresh.py         a small model and its tokenizer, made from a seed and some text
checkpoint.py    inspect, load and save a policy: an ordinary Hugging Face directory
forward.py       log-probabilities and entropies of responses
"""
