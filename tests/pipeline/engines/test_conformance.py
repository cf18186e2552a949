"""What every engine promises, asked of every engine."""

import pytest

from pipeline.engines import ENGINES, GREEDY, EngineOptions, Request, Sampling, open_engine
from pipeline.errors import EngineError, ExperimentError
from pipeline.models.checkpoint import load_policy
from pipeline.models.forward import response_logprobs

MODELS = ["vllm", "transformers"]
PROMPTS = [[5, 6, 7], [9], list(range(3, 43)) * 5, [12, 13]]
SEEDS = [11, 2**40, 303, 2**62]
PLAN = Sampling(group_size=3, max_tokens=12, stop_ids=(1, 4), greedy=True)


SEARCH = Sampling(group_size=3, beams=5, max_tokens=12, stop_ids=(1, 4))


@pytest.fixture(params=list(ENGINES))
def engine(request, loaded):
    return loaded(request.param)


@pytest.fixture(params=MODELS)
def model_engine(request, loaded):
    return loaded(request.param)


def sample(engine, prompts=PROMPTS, seeds=SEEDS, plan=PLAN):
    return {(c.prompt, c.sample): c for c in engine.generate(Request(prompts, seeds), plan)}


def test_every_group_is_complete_and_no_response_comes_twice(engine):
    keys = [(c.prompt, c.sample) for c in engine.generate(Request(PROMPTS, SEEDS), PLAN)]
    assert sorted(keys) == [(p, s) for p in range(len(PROMPTS)) for s in (GREEDY, 0, 1, 2)]


def test_a_response_ends_with_a_stop_token_exactly_when_it_says_so(engine):
    found = sample(engine, plan=PLAN.model_copy(update={"group_size": 24})).values()
    assert {c.finish for c in found} == {"stop", "length"}
    for c in found:
        assert 1 <= len(c.tokens) <= PLAN.max_tokens
        assert not set(c.tokens[:-1]) & set(PLAN.stop_ids)
        assert (c.finish == "stop") == (c.tokens[-1] in PLAN.stop_ids)
        assert c.finish == "stop" or len(c.tokens) == PLAN.max_tokens


def test_log_probabilities_belong_to_tokens_and_are_not_positive(engine):
    for c in sample(engine).values():
        assert len(c.logprobs) == len(c.tokens)
        assert all(-100 < logprob <= 0 for logprob in c.logprobs)


def test_tokens_are_plain_integers(engine):
    for c in sample(engine).values():
        assert {type(token) for token in c.tokens} == {int}
        assert {type(logprob) for logprob in c.logprobs} == {float}


def test_seeds_are_the_prompts_seed_plus_the_sample(engine):
    for (prompt, number), c in sample(engine).items():
        assert c.seed == SEEDS[prompt] + max(number, 0)


def test_the_same_seed_gives_the_same_tokens_in_any_order_and_company(engine):
    together = sample(engine)
    order = [2, 0, 3, 1]
    shuffled = sample(engine, [PROMPTS[i] for i in order], [SEEDS[i] for i in order])
    alone = {key[1]: c for key, c in sample(engine, PROMPTS[:1], SEEDS[:1]).items()}
    for (prompt, number), c in shuffled.items():
        assert c.tokens == together[order[prompt], number].tokens
        assert c.logprobs == pytest.approx(together[order[prompt], number].logprobs, abs=1e-5)
    for number, c in alone.items():
        assert c.tokens == together[0, number].tokens


@pytest.mark.parametrize("done", [{0}, {1, 2}, {0, 1, 2, 3}])
def test_what_is_done_is_not_sampled_again_and_the_rest_is_what_it_would_have_been(engine, done):
    """Bit for bit: a sampling that was cut off goes on to the same end."""
    whole = sample(engine)
    rest = {(c.prompt, c.sample): c for c in engine.generate(Request(PROMPTS, SEEDS, done), PLAN)}
    assert rest == {key: c for key, c in whole.items() if key[0] not in done}


@pytest.mark.parametrize("longest", [12, 100])
def test_what_is_asked_next_may_be_begun_and_changes_nothing(engine, longest):
    """Nor does it where something else is asked then."""
    plan = PLAN.model_copy(update={"max_tokens": longest})
    first, second = Request(PROMPTS[:2], SEEDS[:2]), Request(PROMPTS[2:], SEEDS[2:], {1})

    def found(one, then=None):
        return {(c.prompt, c.sample): c for c in engine.generate(one, plan, then)}

    alone = found(first), found(second)
    for then in (second, second._replace(done=()), second._replace(seeds=[1, 2])):
        assert (found(first, then), found(second)) == alone


def test_what_is_done_is_not_searched_again(model_engine):
    whole = sample(model_engine, plan=SEARCH)
    rest = {(c.prompt, c.sample): c for c in model_engine.generate(Request(PROMPTS, SEEDS, {0, 2}), SEARCH)}
    assert rest == {key: c for key, c in whole.items() if key[0] not in (0, 2)}


def test_other_seeds_and_siblings_give_other_tokens(engine):
    one, other = sample(engine), sample(engine, seeds=[seed + 1000 for seed in SEEDS])
    assert any(one[key].tokens != other[key].tokens for key in one if key[1] != GREEDY)
    assert any(one[p, 0].tokens != one[p, 1].tokens for p in range(len(PROMPTS)))
    assert all(one[p, GREEDY].tokens == other[p, GREEDY].tokens for p in range(len(PROMPTS)))


def test_greedy_is_sample_minus_one_and_can_be_alone(engine):
    both = sample(engine)
    alone = sample(engine, plan=PLAN.model_copy(update={"group_size": 0}))
    assert set(alone) == {(p, GREEDY) for p in range(len(PROMPTS))}
    assert all(alone[key].tokens == both[key].tokens for key in alone)
    without = sample(engine, plan=PLAN.model_copy(update={"greedy": False}))
    assert {number for _, number in without} == {0, 1, 2}
    assert all(without[key].tokens == both[key].tokens for key in without)


def test_one_token_is_enough(engine):
    assert {len(c.tokens) for c in sample(engine, plan=PLAN.model_copy(update={"max_tokens": 1})).values()} == {1}


def test_no_prompts_give_no_responses(engine):
    assert list(engine.generate(Request([], []), PLAN)) == []


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([[5], []], [1, 2], "empty"),
        ([[5], [6] * 310], [1, 2], "do not fit into 320"),
        ([[5], [10**6]], [1, 2], "outside the vocabulary"),
        ([[5], [-1]], [1, 2], "outside the vocabulary"),
        ([[5], [6]], [1, 2**63 - 1], "seed"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_whole_and_names_the_prompt(engine, prompts, seeds, message):
    with pytest.raises(EngineError, match=message) as caught:
        engine.generate(Request(prompts, seeds), PLAN)
    assert caught.value.where == "prompt 1"
    assert len(sample(engine)) == len(PROMPTS) * 4


def test_prompts_and_seeds_must_be_as_many(engine):
    with pytest.raises(EngineError, match="4 prompts but 1 seeds"):
        engine.generate(Request(PROMPTS, [1]), PLAN)


def test_a_prompt_that_just_fits_is_served(engine):
    plan = PLAN.model_copy(update={"max_tokens": 20})
    assert len(sample(engine, [[5] * 300], [1], plan)) == 4


def test_reading_can_stop_half_way_and_sampling_goes_on_afterwards(engine):
    reading = engine.generate(Request(PROMPTS, SEEDS), PLAN)
    next(reading)
    reading.close()
    assert len(sample(engine)) == len(PROMPTS) * 4


def test_sleeping_forgets_nothing(engine):
    before = sample(engine)
    engine.sleep()
    assert {key: c.tokens for key, c in sample(engine).items()} == {key: c.tokens for key, c in before.items()}


def test_only_one_engine_knows_several_devices(checkpoints):
    with pytest.raises(ExperimentError, match="transformers samples on one device, and tensor_parallel = 2"):
        open_engine("transformers", checkpoints["untied_a"], EngineOptions(tensor_parallel=2))


def test_describe_says_what_log_probabilities_depend_on(engine):
    assert set(engine.describe()) == {"engine", "version", "dtype", "logprobs_mode"}
    assert all(isinstance(value, str) and value for value in engine.describe().values())


@pytest.mark.parametrize("name", ENGINES)
def test_a_closed_engine_refuses_and_closing_twice_is_harmless(build, checkpoints, name):
    engine = build(name)
    engine.close()
    engine.close()
    assert engine.closed
    with pytest.raises(EngineError, match="closed"):
        engine.load(checkpoints["untied_a"])
    with pytest.raises(EngineError, match="closed"):
        engine.generate(Request(PROMPTS, SEEDS), PLAN)


@pytest.mark.parametrize("name", ENGINES)
def test_no_checkpoint_is_an_engine_error_and_closes(build, tmp_path, name):
    engine = build(name)
    with pytest.raises(EngineError, match=r"loading|reading") as caught:
        engine.load(tmp_path)
    assert engine.closed
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("checkpoint", ["untied_b", "tied_a"])
def test_greedy_tokens_are_the_same_in_both_engines(loaded, checkpoint):
    found = [sample(loaded(name, checkpoint)) for name in MODELS]
    for prompt in range(len(PROMPTS)):
        one, other = (engine[prompt, GREEDY] for engine in found)
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_trainers_forward(model_engine, checkpoints, temperature):
    found = sample(model_engine, plan=PLAN.model_copy(update={"temperature": temperature}))
    policy = load_policy(checkpoints["untied_a"], "float32")
    for greedy, at in ((False, temperature), (True, 1.0)):
        rows = [c for c in found.values() if (c.sample == GREEDY) == greedy]
        ours = response_logprobs(policy, [PROMPTS[c.prompt] for c in rows], [c.tokens for c in rows], temperature=at)
        for c, logprobs, mask in zip(rows, ours.logprobs.detach(), ours.mask, strict=True):
            assert c.logprobs == pytest.approx(logprobs[mask].tolist(), abs=1e-4)


def test_a_low_temperature_is_nearly_greedy(model_engine):
    found = sample(model_engine, plan=PLAN.model_copy(update={"temperature": 1e-3}))
    assert all(found[p, s].tokens == found[p, GREEDY].tokens for p in range(len(PROMPTS)) for s in range(3))


def test_one_candidate_leaves_no_choice(model_engine):
    found = sample(model_engine, plan=PLAN.model_copy(update={"top_k": 1}))
    for prompt in range(len(PROMPTS)):
        assert found[prompt, 0].tokens == found[prompt, GREEDY].tokens
        assert found[prompt, 0].logprobs == pytest.approx([0.0] * len(found[prompt, 0].tokens))


def test_cut_distributions_agree_between_the_engines(loaded):
    plan = PLAN.model_copy(update={"top_k": 8, "top_p": 0.7, "temperature": 1.3, "max_tokens": 1, "group_size": 40})
    seen = {}
    for name in MODELS:
        for c in sample(loaded(name), plan=plan).values():
            seen.setdefault((c.prompt, c.sample == GREEDY, c.tokens[0]), {})[name] = c.logprobs[0]
    both = [pair for pair in seen.values() if len(pair) == 2]
    assert len(both) >= 10
    for pair in both:
        assert pair["vllm"] == pytest.approx(pair["transformers"], abs=1e-4)


def scored(checkpoint, pairs):
    """Log-probability of each (prompt, response), summed."""
    read = response_logprobs(load_policy(checkpoint, "float32"), *zip(*pairs, strict=True))
    return read.logprobs.detach().double().sum(dim=1).tolist()


def test_a_group_of_beams_is_complete_and_the_likeliest_comes_first(model_engine, checkpoints):
    found = sample(model_engine, plan=SEARCH)
    assert sorted(found) == [(p, s) for p in range(len(PROMPTS)) for s in range(3)]
    for prompt in range(len(PROMPTS)):
        group = [found[prompt, s] for s in range(3)]
        scores = scored(checkpoints["untied_a"], [(PROMPTS[prompt], c.tokens) for c in group])
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(c.tokens) for c in group}) == 3
    for c in found.values():
        assert (c.logprobs, c.seed) == (None, SEEDS[c.prompt])
        assert (c.finish == "stop") == (c.tokens[-1] in SEARCH.stop_ids)
        assert c.finish == "stop" or len(c.tokens) == SEARCH.max_tokens


def test_the_best_beam_is_at_least_as_likely_as_the_greedy_response_and_one_beam_is_that_response(
    model_engine, checkpoints
):
    greedy = sample(model_engine)
    best, only = (
        sample(model_engine, plan=SEARCH.model_copy(update={"group_size": 1, "beams": beams})) for beams in (5, 1)
    )
    for prompt, tokens in enumerate(PROMPTS):
        pair = [(tokens, found.tokens) for found in (best[prompt, 0], greedy[prompt, GREEDY])]
        one, other = scored(checkpoints["untied_a"], pair)
        assert one >= other - 1e-5
        assert only[prompt, 0].tokens == greedy[prompt, GREEDY].tokens


def test_as_many_beams_as_tokens_find_the_likeliest_of_all_short_responses(model_engine, checkpoints):
    size = load_policy(checkpoints["untied_a"], "float32").config.vocab_size
    responses = [[token] for token in SEARCH.stop_ids]
    responses += [[a, b] for a in range(size) if a not in SEARCH.stop_ids for b in range(size)]
    scores = scored(checkpoints["untied_a"], [([9], response) for response in responses])
    ranked = sorted(zip(scores, responses, strict=True), reverse=True)
    plan = SEARCH.model_copy(update={"beams": size, "group_size": 9, "max_tokens": 2})
    found = sample(model_engine, [[9]], [0], plan)
    assert [found[0, s].tokens for s in range(9)] == [response for _, response in ranked[:9]]


@pytest.mark.parametrize("checkpoint", ["untied_b", "tied_a"])
def test_beams_are_the_same_in_both_engines(loaded, checkpoint):
    one, other = (sample(loaded(name, checkpoint), plan=SEARCH) for name in MODELS)
    assert {key: c.tokens for key, c in one.items()} == {key: c.tokens for key, c in other.items()}


def test_more_beams_than_tokens_are_refused(model_engine):
    with pytest.raises(EngineError, match="1000 beams are more than the vocabulary"):
        model_engine.generate(Request([[5]], [0]), SEARCH.model_copy(update={"beams": 1000}))


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("name", MODELS)
def test_after_load_an_engine_samples_like_a_fresh_one(loaded, name, kind):
    old = sample(loaded(name, f"{kind}_a"))
    swapped = sample(loaded(name, f"{kind}_b"))
    again = sample(loaded(name, f"{kind}_a"))
    new = sample(loaded(name, f"{kind}_b", fresh=True))
    for key, c in new.items():
        assert swapped[key].tokens == c.tokens
        assert swapped[key].logprobs == pytest.approx(c.logprobs, abs=1e-5)
    assert any(old[key].tokens != new[key].tokens for key in new)
    assert {key: c.tokens for key, c in again.items()} == {key: c.tokens for key, c in old.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", [PLAN, SEARCH], ids=["sampling", "search"])
def test_sampling_longer_than_the_timeout_is_an_error_and_closes(build, checkpoints, name, plan):
    engine = build(name, timeout=1e-3)
    engine.load(checkpoints["untied_a"])
    with pytest.raises(EngineError, match="took longer than"):
        list(engine.generate(Request(PROMPTS, SEEDS), plan))
    assert engine.closed
