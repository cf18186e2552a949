"""Hugging Face checkpoints in, tensors out.

fresh.py         a small model and its tokenizer, made from a seed and some text
checkpoint.py    inspect, load and save a policy, a reward model or a critic: an ordinary Hugging Face directory
forward.py       log-probabilities, entropies, values and scores of responses
"""
