"""The reference engine's sampling arithmetic, and what it refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engines import Request, Sampling
from pipeline.engines.transformers import cut, sample_tokens
from pipeline.errors import EngineError
from pipeline.models.checkpoint import load_policy

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def plan(**settings):
    return Sampling(**{"group_size": 1, "max_tokens": 8, "stop_ids": (1,), **settings})


def kept(**settings):
    return torch.isfinite(cut(LOGITS, **{"top_k": None, "top_p": 1.0, **settings}))[0].nonzero()[:, 0].tolist()


def test_top_k_keeps_the_likeliest():
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert kept(top_p=0.3) == [1]
    assert kept(top_p=0.5) == [1, 3]
    assert kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(top_p=1e-9) == [1]


def test_top_p_counts_the_share_of_what_top_k_left():
    # 0.4 / 0.7 is less than 0.6, so one token is not enough once the others are gone.
    assert kept(top_k=2, top_p=0.6) == [1, 3]
    assert kept(top_k=2, top_p=0.5) == [1]


def test_a_token_is_where_the_cumulated_probability_passes_the_uniform_number():
    uniforms = torch.tensor([0.0, 0.099, 0.101, 0.499, 0.501, 0.699, 0.701, 1 - 2**-53], dtype=torch.float64)
    rows = len(uniforms)
    tokens, logprobs = sample_tokens(LOGITS.expand(rows, -1), uniforms, torch.zeros(rows, dtype=torch.bool), plan())
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.allclose(logprobs, LOGITS[0, tokens])


def test_impossible_tokens_are_never_drawn():
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample_tokens(LOGITS.expand(2, -1), uniforms, torch.zeros(2, dtype=torch.bool), plan(top_k=2))
    assert tokens.tolist() == [1, 3]
    assert logprobs.exp().tolist() == pytest.approx([4 / 7, 3 / 7])


def test_shares_of_many_draws_are_the_probabilities_at_the_temperature():
    count = 40_000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_tokens(
        LOGITS.expand(count, -1), uniforms, torch.zeros(count, dtype=torch.bool), plan(temperature=0.5)
    )
    expected = torch.softmax(LOGITS[0] / 0.5, dim=0)
    assert torch.allclose(tokens.bincount(minlength=4) / count, expected, atol=0.01)


def test_greedy_rows_report_temperature_one():
    tokens, logprobs = sample_tokens(
        LOGITS, torch.zeros(1, dtype=torch.float64), torch.tensor([True]), plan(temperature=0.1, top_k=1)
    )
    assert tokens.tolist() == [1]
    assert logprobs.exp().item() == pytest.approx(0.4)


def test_small_batches_change_nothing(build, checkpoints):
    prompts, seeds = [[n % 40 + 3] * (n + 1) for n in range(9)], list(range(9))
    found = []
    for rows in (1, 7, 64):
        engine = build("transformers", max_num_seqs=rows)
        engine.load(checkpoints["tied_a"])
        found.append(
            {(c.prompt, c.sample): c.tokens for c in engine.generate(Request(prompts, seeds), plan(group_size=3))}
        )
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("stop_ids", [(1,), (1, 4), tuple(range(1, 20))])
def test_beams_are_those_of_transformers_without_a_length_penalty(loaded, checkpoints, stop_ids):
    chosen = plan(group_size=4, beams=6, max_tokens=10, stop_ids=stop_ids)
    prompts = [[5, 6, 7], [9, 30, 12, 8, 8]]
    found = {(c.prompt, c.sample): c.tokens for c in loaded("transformers").generate(Request(prompts, [0, 1]), chosen)}
    model = load_policy(checkpoints["untied_a"], "float32")
    for index, prompt in enumerate(prompts):
        theirs = model.generate(
            torch.tensor([prompt]), num_beams=6, num_return_sequences=4, do_sample=False, max_new_tokens=10,
            length_penalty=0.0, eos_token_id=list(stop_ids), pad_token_id=20,
        )  # fmt: skip
        for sample, row in enumerate(theirs[:, len(prompt) :].tolist()):
            assert row[: len(found[index, sample])] == found[index, sample]
            assert set(row[len(found[index, sample]) :]) <= {20}


def test_small_batches_change_no_beam(build, checkpoints):
    prompts = [[n % 40 + 3] * (n + 1) for n in range(9)]
    found = []
    for rows in (1, 16, 64):
        engine = build("transformers", max_num_seqs=rows)
        engine.load(checkpoints["tied_a"])
        chosen = plan(group_size=3, beams=4)
        found.append(
            {(c.prompt, c.sample): c.tokens for c in engine.generate(Request(prompts, list(range(9))), chosen)}
        )
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("damage", "message"), [("missing", "no tensor for"), ("nan", "not finite")])
def test_damaged_weights_are_refused(build, checkpoints, tmp_path, damage, message):
    for file in checkpoints["untied_a"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name][3, 60] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = build("transformers")
    with pytest.raises(EngineError, match=message):
        engine.load(tmp_path)
        list(engine.generate(Request([[5, 6]], [0]), plan()))
    assert engine.closed


def test_a_second_checkpoint_is_loaded_whole(build, checkpoints):
    engine = build("transformers")
    for name in ("untied_a", "untied_b"):
        engine.load(checkpoints[name])
        expected = load_policy(checkpoints[name], "float32").state_dict()
        assert all(torch.equal(of, expected[name]) for name, of in engine._model.state_dict().items())
