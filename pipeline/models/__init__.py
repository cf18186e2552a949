"""Hugging Face checkpoints in, tensors out.

fresh.py         a small model and its tokenizer, made from a seed and some text
checkpoint.py    inspect, load and save a policy, a reward model or a critic: an ordinary Hugging Face directory
forward.py       log-probabilities, entropies, values and scores of responses
chunked.py       log-probabilities of a large vocabulary, a tile of positions at a time
precision.py     half precision over float32 weights, and activations that are made again
lora.py          what is asked of low-rank adapters
adapters.py      low-rank adapters in a model's layers, by peft; taken off and merged again
distributed.py   weights on several processes, by FSDP2 under torchrun
device.py        where this process computes
"""
