"""Chunked log-probabilities equal the plain computation, in value and in gradient."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from pipeline.attention import attend_by_products
from pipeline.errors import ContractError, ExperimentError, NumericsError
from pipeline.models import chunked
from pipeline.models.checkpoint import load_critic, load_reward_model
from pipeline.models.forward import (
    PACKED,
    packs,
    response_logprobs,
    response_scores,
    response_values,
)
from pipeline.packing import rounded

PROMPTS = [[5, 6, 7], [9], [4] * 20, [8, 3]]
RESPONSES = [[10, 11, 1], [12] * 9, [7], []]


def plain(model, prompt, response, temperature=1.0):
    """One row at a time, all logits at once."""
    logits = model(torch.tensor([prompt + response])).logits[0].float() / temperature
    scores = torch.log_softmax(logits[len(prompt) - 1 : len(prompt) + len(response) - 1], dim=-1)
    chosen = scores[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]
    return chosen, -(scores.exp() * scores).sum(dim=-1)


@pytest.fixture
def model(policy):
    policy[0].zero_grad()
    return policy[0]


@pytest.fixture(params=[1, 4, 1024])
def tile(request, model, monkeypatch):
    monkeypatch.setitem(chunked.TILE_BYTES, "cpu", 4 * model.config.vocab_size * request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_values_equal_the_plain_computation(model, temperature):
    with torch.no_grad():
        found = response_logprobs(model, PROMPTS, RESPONSES, temperature=temperature, entropy=True)
        assert found.logprobs.shape == found.mask.shape == found.entropies.shape == (4, 9)
        assert found.logprobs.dtype == torch.float32
        assert not found.logprobs.requires_grad
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            assert found.mask[row].sum() == len(response)
            logprobs, entropies = plain(model, prompt, response, temperature)
            assert torch.allclose(found.logprobs[row][found.mask[row]], logprobs, atol=1e-5)
            assert torch.allclose(found.entropies[row][found.mask[row]], entropies, atol=1e-5)
        assert (found.logprobs[~found.mask] == 0).all()
        assert (found.logprobs <= 0).all()


@pytest.mark.usefixtures("tile")
def test_gradients_equal_the_plain_computation(model):
    found = response_logprobs(model, PROMPTS, RESPONSES, temperature=0.8, entropy=True)
    weights = torch.arange(found.mask.numel()).reshape(found.mask.shape).float().cos()
    ((found.logprobs + 0.3 * found.entropies) * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logprobs, entropies = plain(model, prompt, response, 0.8)
        total = total + ((logprobs + 0.3 * entropies) * weights[row, : len(response)]).sum()
    total.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-5 * float(p.grad.abs().max()) + 1e-6), name


def test_padding_and_company_change_nothing(model):
    with torch.no_grad():
        alone = response_logprobs(model, PROMPTS[:1], RESPONSES[:1], entropy=True)
        company = response_logprobs(model, [PROMPTS[0], [3] * 50, [4]], [RESPONSES[0], [5] * 30, [6] * 2], entropy=True)
    assert torch.allclose(alone.logprobs[0], company.logprobs[0, :3], atol=1e-5)
    assert torch.allclose(alone.entropies[0], company.entropies[0, :3], atol=1e-5)


def test_logits_exist_a_tile_at_a_time_and_only_for_responses(model, monkeypatch):
    seen, multiply = [], torch.mm

    def watched(first, second, **words):
        seen.append((len(first), second.shape[1]))
        return multiply(first, second, **words)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setitem(chunked.TILE_BYTES, "cpu", 4 * model.config.vocab_size * 5)
    found = response_logprobs(model, PROMPTS, RESPONSES)
    tiles = [(rows, model.config.vocab_size) for rows in (5, 5, 3)]
    assert seen == tiles
    found.logprobs.sum().backward()
    again = [shape for shape in seen[3:] if shape[1] == model.config.vocab_size]
    assert again == tiles


def test_no_logits_are_kept_for_the_backward_pass(model):
    vocabulary = model.config.vocab_size
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_logprobs(model, PROMPTS, RESPONSES, entropy=True)
    assert kept
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] == vocabulary]


def test_log_probability_at_a_temperature_is_the_design_vector():
    # metrics/logp_at_temperature of the design's vectors: logits (2, 1, 0), token 0.
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 3, bias=False)
            self.head.weight.data = torch.tensor([[2.0], [1.0], [0.0]])
            self.config = type("Config", (), {})()

        def get_output_embeddings(self):
            return self.head

        def base_model(self, input_ids, **_):
            ones = torch.ones(*input_ids.shape, 1)
            return type("Output", (), {"last_hidden_state": ones})()

    for temperature, expected in ((1.0, -0.407605964444), (0.5, -0.1429316285)):
        found = response_logprobs(Head(), [[1]], [[0]], temperature=temperature).logprobs
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_entropy_of_even_logits_is_the_logarithm_of_the_vocabulary(model):
    kept = model.lm_head.weight.data.clone()
    try:
        model.lm_head.weight.data.zero_()
        with torch.no_grad():
            found = response_logprobs(model, [[5]], [[6, 7]], entropy=True)
    finally:
        model.lm_head.weight.data.copy_(kept)
    expected = math.log(model.config.vocab_size)
    assert found.entropies[0].tolist() == pytest.approx([expected] * 2, abs=1e-5)
    assert found.logprobs[0].tolist() == pytest.approx([-expected] * 2, abs=1e-5)


def test_only_empty_responses_give_an_empty_table(model):
    found = response_logprobs(model, [[5], [6]], [[], []], entropy=True)
    assert found.logprobs.shape == found.mask.shape == found.entropies.shape == (2, 0)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ContractError, match="before it") as caught:
        response_logprobs(model, [[5], []], [[1], [1]])
    assert "[1]" in caught.value.where


def test_numbers_that_cannot_be_are_refused_with_their_rows(model):
    kept = model.model.embed_tokens.weight.data[9].clone()
    try:
        model.model.embed_tokens.weight.data[9] = torch.nan
        with pytest.raises(NumericsError, match="nan") as caught:
            response_logprobs(model, PROMPTS, RESPONSES)
    finally:
        model.model.embed_tokens.weight.data[9] = kept
    assert caught.value.where == "rows [1] of 4"


def test_a_model_that_bends_its_logits_is_refused(model):
    model.config.final_logit_softcapping = 30.0
    try:
        with pytest.raises(ExperimentError, match="final_logit_softcapping"):
            response_logprobs(model, [[5]], [[6]])
    finally:
        del model.config.final_logit_softcapping


ANSWERED = PROMPTS[:3], RESPONSES[:3]
"""Rows whose responses have a token."""


@pytest.fixture
def critic(judges):
    return load_critic(judges / "critic", "float32")


@pytest.fixture
def reward_model(judges):
    return load_reward_model(judges / "reward_model", "float32")


def plain_values(critic, prompt, response):
    """One row at a time, by the model's own forward pass."""
    logits = critic(torch.tensor([prompt + response])).logits[0, :, 0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1]


def test_values_before_each_token_equal_those_of_the_plain_class(judges, critic):
    plain = AutoModelForTokenClassification.from_pretrained(judges / "critic").eval()
    with torch.no_grad():
        found = response_values(critic, PROMPTS, RESPONSES)
        assert found.values.shape == found.mask.shape == (4, 9)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            assert found.mask[row].sum() == len(response)
            expected = plain_values(plain, prompt, response)
            assert torch.allclose(found.values[row][found.mask[row]], expected, atol=1e-5)
        assert (found.values[~found.mask] == 0).all()
    assert found.values[found.mask].std() > 0.1


def test_a_value_does_not_know_its_token(critic):
    with torch.no_grad():
        one, other = (response_values(critic, [[5, 6]], [[10, last]]).values[0] for last in (11, 12))
        changed = response_values(critic, [[5, 6]], [[11, 11]]).values[0]
    assert torch.equal(one, other)
    assert one[0] == changed[0] and one[1] != changed[1]


@pytest.mark.parametrize("pad", [0, 1, 11, 40, None], ids=["pad", "end", "in a response", "other", "none"])
def test_scores_are_read_at_the_last_token_whatever_pads(judges, reward_model, pad):
    plain = AutoModelForSequenceClassification.from_pretrained(judges / "reward_model").eval()
    plain.config.pad_token_id = None  # it reads the last token of a row alone
    reward_model.config.pad_token_id = pad
    with torch.no_grad():
        found = response_scores(reward_model, *ANSWERED)
        for row, (prompt, response) in enumerate(zip(*ANSWERED, strict=True)):
            expected = plain(torch.tensor([prompt + response])).logits.item() - 0.75
            assert found[row].item() == pytest.approx(expected, abs=1e-5)
    assert found.shape == (3,) and found.dtype == torch.float32
    assert found.std() > 0.1


def test_a_padded_batch_of_plain_transformers_scores_the_same_but_for_the_bias(judges, reward_model, policy):
    plain = AutoModelForSequenceClassification.from_pretrained(judges / "reward_model").eval()
    assert plain.config.pad_token_id == policy[1].pad_token_id
    rows = [prompt + response for prompt, response in zip(*ANSWERED, strict=True)]
    batch = policy[1].pad({"input_ids": rows}, return_tensors="pt")
    assert batch["attention_mask"].sum() < batch["input_ids"].numel()
    with torch.no_grad():
        expected = plain(**batch).logits[:, 0] - 0.75
        assert torch.allclose(response_scores(reward_model, *ANSWERED), expected, atol=1e-5)


@pytest.mark.parametrize("number", ["value", "score"])
def test_gradients_of_heads_equal_the_plain_computation_and_dropout_is_never_called(critic, reward_model, number):
    model = critic if number == "value" else reward_model
    assert number != "value" or model.dropout.p > 0

    def plain(prompt, response):
        if number == "value":
            return plain_values(model, prompt, response).square().sum()
        return (model(torch.tensor([prompt + response])).logits - 0.75).square().sum()

    model.train()
    found = response_values(model, *ANSWERED).values if number == "value" else response_scores(model, *ANSWERED)
    found.square().sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.eval()
    model.config.pad_token_id = None
    model.zero_grad()
    sum(plain(prompt, response) for prompt, response in zip(*ANSWERED, strict=True)).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0
        assert torch.allclose(ours[name], p.grad, atol=1e-5 * float(p.grad.abs().max()) + 1e-6), name


def test_padding_and_company_change_no_value_and_no_score(critic, reward_model):
    company = [PROMPTS[0], [3] * 50, [4]], [RESPONSES[0], [5] * 30, [6] * 2]
    with torch.no_grad():
        values = [response_values(critic, *rows).values[0, :3] for rows in ((PROMPTS[:1], RESPONSES[:1]), company)]
        scores = [response_scores(reward_model, *rows)[0] for rows in ((PROMPTS[:1], RESPONSES[:1]), company)]
    assert torch.allclose(*values, atol=1e-5)
    assert torch.allclose(*scores, atol=1e-5)


def test_rows_that_cannot_be_read_are_refused(critic, reward_model):
    with pytest.raises(ContractError, match="before it") as caught:
        response_values(critic, [[5], []], [[1], [1]])
    assert "[1]" in caught.value.where
    with pytest.raises(ContractError, match="no score") as caught:
        response_scores(reward_model, PROMPTS, RESPONSES)
    assert "[3]" in caught.value.where


def test_a_value_or_a_score_that_is_not_finite_is_refused_with_its_rows(critic, reward_model):
    for model, read, what in ((critic, response_values, "value"), (reward_model, response_scores, "score")):
        with torch.no_grad():
            model.model.embed_tokens.weight[9] = torch.inf
        with pytest.raises(NumericsError, match=f"a {what} is nan") as caught:
            read(model, *ANSWERED)
        assert caught.value.where == "rows [1] of 3"


def tiny(family, attention="sdpa", **more):
    """A reward model of a family, wide enough for opinions and without dropout."""
    config = AutoConfig.for_model(family)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 256, "max_position_embeddings": 256, "initializer_range": 0.3,
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0,
        "num_experts": 1,
    }  # fmt: skip
    known = {name: value for name, value in sizes.items() if hasattr(config, name)}
    config = type(config)(**(known | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1} | more), num_labels=1)
    config.reward_bias = 0.25
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    attend_by_products(model)
    return model


def drawn(seed, prompt=(1, 60), response=(1, 12), most=9, groups=5):
    """Prompts and groups of responses of random lengths, of which some begin alike; a prompt and a response of one
    token."""
    source = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (1,), generator=source))

    def text(length):
        return torch.randint(2, 40, (length,), generator=source).tolist()

    def group(count):
        texts = [text(number(*response)) for _ in range(count)]
        return [other[: number(0, len(own))] + own for other, own in zip([[], *texts], texts, strict=False)]

    prompts = [text(number(*prompt)) for _ in range(groups)]
    made = [group(number(1, most)) for _ in range(groups)]
    return [prompts[0][:1], *prompts[1:]], [*made[:-1], [made[-1][0][:1], *made[-1][1:]]]


def repeated(prompts, groups):
    """A prompt for each response, and the responses."""
    together = [(prompt, response) for prompt, group in zip(prompts, groups, strict=True) for response in group]
    return [prompt for prompt, _ in together], [response for _, response in together]


def group_scores(model, prompts, groups):
    """Scores of all responses, which are read together."""
    return response_scores(model, *repeated(prompts, groups))


def one_by_one(model, prompts, groups):
    """The same scores, every response read for itself."""
    pairs = zip(*repeated(prompts, groups), strict=True)
    return torch.cat([response_scores(model, [prompt], [response]) for prompt, response in pairs])


@pytest.fixture
def read():
    """Has a model say the shapes of what it reads."""
    handles, shapes = [], []

    def listen(model):
        note = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        handles.append(model.base_model.register_forward_pre_hook(note, with_kwargs=True))
        return shapes

    yield listen
    for handle in handles:
        handle.remove()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(model, prompts, groups):
    """Scores and gradients of groups are those of responses one by one."""
    model.zero_grad()
    found = group_scores(model, prompts, groups)
    weights = torch.arange(len(found)).float().cos()
    (found * weights).sum().backward()
    ours = gradients(model)
    expected = one_by_one(model, prompts, groups)
    (expected * weights).sum().backward()
    theirs = gradients(model)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=2e-5 * float(gradient.abs().max()) + 1e-6), name


def tokens_of(prompts, groups):
    texts = [(*prompt, *response) for prompt, response in zip(*repeated(prompts, groups), strict=True)]
    return rounded(len({text[: end + 1] for text in texts for end in range(len(text))}))


@pytest.mark.parametrize("response", [(1, 12), (80, 130)], ids=["short", "long"])
@pytest.mark.parametrize("family", sorted(PACKED))
def test_tokens_behind_one_another_give_the_scores_and_gradients_of_rows_of_their_own(family, response, read):
    model, (prompts, groups) = tiny(family), drawn(0, prompt=(30, 60), response=response, most=4)
    shapes = read(model)
    with torch.no_grad():
        assert group_scores(model, prompts, groups).std() > 0.05
    assert shapes == [(1, tokens_of(prompts, groups))]
    assert_same(model, prompts, groups)


@pytest.mark.parametrize("family", sorted(PACKED))
def test_so_they_do_where_layers_are_computed_again_for_the_backward_pass(family):
    model, (prompts, groups) = tiny(family), drawn(1, most=4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model.train(), prompts, groups)


def test_log_probabilities_and_entropies_of_packed_responses_are_those_of_each(model):
    prompts, responses = repeated(*drawn(3))
    prompts, responses = [*prompts, prompts[0]], [*responses, []]
    together = response_logprobs(model, prompts, responses, temperature=0.7, entropy=True)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logprobs, entropies = plain(model, prompt, response, 0.7)
        assert together.mask[row].sum() == len(response)
        assert torch.allclose(together.logprobs[row, : len(response)], logprobs, atol=1e-5)
        assert torch.allclose(together.entropies[row, : len(response)], entropies, atol=1e-5)


def test_a_family_that_does_not_ask_for_attention_as_it_is_told_is_refused(monkeypatch):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**model.config.to_dict(), attn_implementation="sdpa")
    with pytest.raises(ExperimentError, match="llama attends by other means"):
        response_scores(model, [[5]], [[6]])


@pytest.mark.parametrize("seed", range(12))
def test_scores_of_any_groups_are_those_of_their_responses(reward_model, seed):
    assert_same(reward_model, *drawn(seed))
    assert_same(reward_model, *drawn(seed, prompt=(20, 40), most=2, groups=4))


@pytest.mark.parametrize(
    ("prompts", "groups"),
    [
        ([[5, 6, 7] * 9], [[[8], [9], [10]]]),
        ([[5] * 20, [6] * 30], [[[8, 9]], [[7], [7], [7, 7]]]),
        ([[5, 6, 7] * 9], [[[8, 9, 10]] * 9]),
        ([[5] * 20, [6] * 30], [[], [[8], [9]]]),
        ([[], [6] * 30], [[[8, 9], [10]], [[8], [9]]]),
        ([[5]], [[[6]]]),
    ],
    ids=[
        "one token each",
        "a group of one",
        "nine that are equal",
        "no response",
        "no prompt",
        "one row of two tokens",
    ],
)
def test_scores_of_small_and_empty_groups(reward_model, prompts, groups):
    assert_same(reward_model, prompts, groups)


def test_a_response_does_not_see_the_others(reward_model, read):
    prompts, groups = [[5, 6, 7] * 9, [9] * 25], [[[10, 11], [12, 13, 14], [15]], [[16, 17], [18, 19]]]
    shapes = read(reward_model)
    with torch.no_grad():
        before = group_scores(reward_model, prompts, groups)
        for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
            changed = [[list(response) for response in group] for group in groups]
            changed[row][column] = [token + 15 for token in changed[row][column]]
            moved = (group_scores(reward_model, prompts, changed) - before).abs()
            assert moved[place] > 1e-3
            assert moved[torch.arange(5) != place].max() <= 1e-6
    assert {rows for rows, _ in shapes} == {1}


def test_a_score_of_a_group_that_is_not_finite_is_refused_with_its_response(reward_model):
    prompts, groups = [[5, 6, 7] * 9, [9] * 25], [[[10, 11], [12, 13], [14]], [[12, 11], [10, 14]]]
    with torch.no_grad():
        reward_model.model.embed_tokens.weight[13] = torch.inf
    with pytest.raises(NumericsError, match="a score is nan") as caught:
        group_scores(reward_model, prompts, groups)
    assert caught.value.where == "rows [1] of 5"


def test_a_response_of_a_group_without_a_token_is_refused(reward_model):
    with pytest.raises(ContractError, match="no score") as caught:
        group_scores(reward_model, [[5], [6]], [[[7], [8]], [[9], []]])
    assert "[3]" in caught.value.where


def test_as_many_prompts_as_groups(reward_model):
    with pytest.raises(ValueError, match="zip"):
        group_scores(reward_model, [[5]], [[[7]], [[8]]])


@pytest.mark.parametrize(
    ("family", "more"),
    [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})],
    ids=["mistral", "qwen2"],
)
@pytest.mark.parametrize(("window", "rows"), [(33, 1), (32, 4)])
def test_what_does_not_fit_in_the_window_of_a_layer_is_read_in_rows(family, more, window, rows, read):
    # Texts have 33 tokens; together they have 42, more than either window.
    model = tiny(family, sliding_window=window, **more)
    assert model.config.sliding_window == window
    prompts, groups = [list(range(2, 32))], [[[token] * 3 for token in range(35, 39)]]
    with torch.no_grad():
        shapes = read(model)
        found = group_scores(model, prompts, groups)
        assert shapes[0][0] == rows
        assert torch.allclose(found, one_by_one(model, prompts, groups), atol=1e-5)
        # The window matters: the same weights without one say something else of texts that are longer.
        free = tiny(family, sliding_window=None)
        assert torch.allclose(found, group_scores(free, prompts, groups), atol=1e-5) == (window == 33)


def test_a_row_may_have_more_tokens_than_the_model_has_positions(read):
    model, prompts = tiny("gpt2", max_position_embeddings=33), [[5] * 30, [6] * 25]
    groups = [[[token] * 3 for token in range(7, 16)], [[8, 9], [9]]]
    shapes = read(model)
    assert_same(model, prompts, groups)
    assert shapes[0] == (1, tokens_of(prompts, groups))


def test_eager_attention_is_left_alone(read):
    model, (prompts, groups) = tiny("llama", "eager"), drawn(0)
    shapes = read(model)
    assert_same(model, prompts, groups)
    assert not packs(model)
    assert shapes[0][0] == sum(map(len, groups))


@pytest.mark.parametrize("family", ["bloom", "jamba"])
def test_a_family_that_takes_no_positions_or_is_recurrent_is_read_in_rows(family, read):
    more = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False} if family == "jamba" else {}
    model = tiny(family, None if family == "bloom" else "sdpa", **more)
    prompts, groups = drawn(0, prompt=(30, 60))
    count = sum(map(len, groups))
    shapes = read(model)
    assert_same(model, prompts, groups)
    assert shapes[0][0] == count and {rows for rows, _ in shapes[1:]} == {1}
