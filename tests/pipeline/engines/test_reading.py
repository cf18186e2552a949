"""Texts read together: what was read of each is right, however they part and end, and once where they share it."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from pipeline.engines import Request, Sampling, reading
from pipeline.engines.reading import Reader
from pipeline.models.checkpoint import load_policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["roomy", "sliding"])
def model(request, checkpoints):
    """One whose cache has room, and one that has another kind of cache."""
    if request.param == "roomy":
        return load_policy(checkpoints["tied_a"], "float32")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("seed", range(5))
def test_a_text_is_read_right_however_texts_part_and_end(model, seed, monkeypatch):
    monkeypatch.setattr(reading, "FEW", 8)
    monkeypatch.setattr(reading, "ROWS", 4)
    drawn = random.Random(seed)
    texts = [[drawn.randrange(3, 40) for _ in range(drawn.randint(1, 5))] for _ in range(3)]
    reader, rows = Reader(model, texts, 40, CPU), []
    with torch.inference_mode():
        for most in (3, 9, 30, 40, 20, 12, 30, 5, 1, 2):
            going = sorted(drawn.choices(range(len(texts)), k=drawn.randint(1, most)))
            tokens = [drawn.randrange(3, 40) for _ in going]
            reader.read(np.array(going), torch.tensor(tokens))
            texts = [[*texts[text], token] for text, token in zip(going, tokens, strict=True)]
            rows.append(len(reader.attended))
            expected = torch.cat([model(torch.tensor([text])).logits[:, -1] for text in texts])
            assert torch.allclose(reader.logits, expected, atol=1e-4)
            assert rows[-1] <= 40 + 3
    assert len(set(rows)) > 3


def test_what_responses_begin_with_is_read_once(build, checkpoints):
    engine = build("transformers", max_num_seqs=24)
    engine.load(checkpoints["tied_a"])
    read = []
    engine._model.register_forward_pre_hook(
        lambda _, args, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    plan = Sampling(group_size=8, max_tokens=6, stop_ids=(1,), temperature=0.7)
    groups = [[], [], []]
    for completion in engine.generate(Request([[5, 6], [7], [8, 9, 10]], [0, 1, 2]), plan):
        groups[completion.prompt].append(tuple(completion.tokens))
    going = [
        sum(len({text[:length] for text in group if len(text) > length}) for group in groups)
        for length in range(max(len(text) for group in groups for text in group))
    ]
    assert going[0] == read[0] == 3 < going[-1] < 24
    for number, (needed, there) in enumerate(zip(going, read, strict=True)):
        assert needed <= there <= max(going[: number + 1])
