"""What vLLM does not look after: stale and damaged weights, a poisoned engine, the process around it."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import engines
from pipeline.engines import Memory, Request, Sampling
from pipeline.engines.vllm import CPU_BATCH_TOKENS, _completions
from pipeline.errors import EngineError
from pipeline.models.checkpoint import load_policy
from pipeline.models.forward import response_logprobs

ROOT = Path(__file__).parents[3]
PLAN = Sampling(group_size=2, max_tokens=8, stop_ids=(1,))


def damaged(source, target, damage):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = target / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return target
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "nan matrix":
        tensors[name][3, 60] = torch.nan
    elif damage == "nan embedding":
        tensors["model.embed_tokens.weight"][5, 60] = torch.nan
    else:
        tensors[name] = tensors[name][:, :10].contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


def test_more_prompt_tokens_than_one_step_takes_are_sampled_as_if_alone(loaded):
    """A batch that vLLM would cut through the middle of a prompt: with seeds, on a CPU, that fails inside it."""
    engine = loaded("vllm")
    prompts = [[5 + (row + place) % 30 for place in range(150)] for row in range(40)]
    assert sum(map(len, prompts)) > CPU_BATCH_TOKENS
    together = {(c.prompt, c.sample): c.tokens for c in engine.generate(Request(prompts, range(0, 4000, 100)), PLAN)}
    alone = {(31, c.sample): c.tokens for c in engine.generate(Request([prompts[31]], [3100]), PLAN)}
    assert len(together) == 80
    assert {key: together[key] for key in alone} == alone


def test_responses_do_not_depend_on_their_batch_with_several_threads_either(build, checkpoints):
    """Attention that vLLM splits among threads by how much there is to do adds up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    engine = build("vllm")
    engine.load(checkpoints["untied_a"])
    prompts = [[5 + (row + place) % 30 for place in range(10 + 3 * row)] for row in range(24)]
    plan = Sampling(group_size=1, max_tokens=60, stop_ids=(1,))
    whole = {c.prompt: c for c in engine.generate(Request(prompts, range(24)), plan)}
    rest = {c.prompt: c for c in engine.generate(Request(prompts, range(24), set(range(0, 24, 2))), plan)}
    engine.close()
    torch.set_num_threads(threads)
    assert rest == {row: whole[row] for row in range(1, 24, 2)}


def test_a_plain_reload_keeps_a_tied_head_and_the_probe_sees_it(loaded, checkpoints):
    engine = loaded("vllm", "tied_a")
    assert engine._stale(checkpoints["tied_a"]) == ""
    assert engine._stale(checkpoints["tied_b"]) == "model.embed_tokens"
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints["tied_b"])})
    assert engine._stale(checkpoints["tied_b"]) == "lm_head"
    engine.load(checkpoints["tied_b"])
    assert engine._stale(checkpoints["tied_b"]) == ""


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_the_probe_sees_the_smallest_change_of_any_tensor(loaded, checkpoints, tmp_path, name):
    engine = loaded("vllm")
    tensors = load_file(checkpoints["untied_a"] / "model.safetensors")
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert name.removesuffix(".weight").rpartition(".")[0] in engine._stale(tmp_path)
    assert engine._stale(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "shape"])
def test_a_damaged_checkpoint_closes_a_warm_engine(loaded, checkpoints, tmp_path, damage):
    engine = loaded("vllm")
    with pytest.raises(EngineError):
        engine.load(damaged(checkpoints["untied_a"], tmp_path / damage, damage))
    assert engine.closed
    with pytest.raises(EngineError, match="closed"):
        engine.generate(Request([[5]], [0]), PLAN)


def test_a_tensor_that_is_missing_from_the_start_is_named_and_the_next_engine_is_sound(
    build, loaded, checkpoints, tmp_path
):
    engine = build("vllm")
    with pytest.raises(EngineError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        engine.load(damaged(checkpoints["untied_a"], tmp_path / "missing", "missing"))
    assert engine.closed
    assert len(list(loaded("vllm").generate(Request([[5]], [0]), PLAN))) == 2


@pytest.mark.parametrize(
    ("damage", "message"), [("nan embedding", "cannot be"), ("nan matrix", r"does not compute .*\.mlp\.gate_up_proj")]
)
def test_numbers_that_are_not_finite_are_not_sampled_from(loaded, checkpoints, tmp_path, damage, message):
    engine = loaded("vllm")
    with pytest.raises(EngineError, match=message):
        engine.load(damaged(checkpoints["untied_a"], tmp_path / "nan", damage))
        list(engine.generate(Request([[5]], [0]), PLAN))
    assert engine.closed


def test_two_readers_at_once_are_refused_and_the_first_goes_on(loaded, checkpoints):
    engine = loaded("vllm")
    reading = engine.generate(Request([[5], list(range(3, 40))], [0, 1]), PLAN.model_copy(update={"max_tokens": 200}))
    first = next(reading)
    with pytest.raises(EngineError, match="still generating"):
        next(engine.generate(Request([[5]], [0]), PLAN))
    with pytest.raises(EngineError, match="still generating"):
        engine.load(checkpoints["untied_b"])
    assert len([first, *reading]) == 4


LONG, SHORT = Request([[5, 6], [7]], [0, 1]), Request([[8], [9, 10]], [20, 21])
UNEVEN = Sampling(group_size=2, max_tokens=200, stop_ids=(1,))


def sampled(engine, one, then=None):
    return {(c.prompt, c.sample): c for c in engine.generate(one, UNEVEN, then)}


@pytest.fixture
def steps(loaded, monkeypatch):
    """One entry for each step that the engine takes."""
    engine, taken = loaded("vllm"), []
    step = engine._llm.llm_engine.step
    monkeypatch.setattr(engine._llm.llm_engine, "step", lambda: taken.append(1) or step())
    return taken


def test_what_is_asked_next_takes_the_places_that_become_free(loaded, steps):
    engine = loaded("vllm")
    apart = [sampled(engine, one) for one in (LONG, SHORT)]
    taken = len(steps)
    assert [sampled(engine, LONG, SHORT), sampled(engine, SHORT)] == apart
    longest = max(len(c.tokens) for some in apart for c in some.values())
    assert len(steps) - taken <= longest + 2 < taken


@pytest.mark.parametrize("end", ["load", "sleep", "close the reader", "ask for something else"])
def test_what_was_begun_and_is_not_asked_for_is_dropped(loaded, checkpoints, end):
    engine = loaded("vllm")
    expected = sampled(loaded("vllm", "untied_b"), SHORT)
    engine.load(checkpoints["untied_a"])
    reading = engine.generate(LONG, UNEVEN, then=SHORT)
    if end == "close the reader":
        next(reading)
        reading.close()
    else:
        list(reading)
        assert engine._ahead is not None
    if end == "sleep":
        engine.sleep()
    elif end == "ask for something else":
        assert len(list(engine.generate(Request([[5]], [0]), PLAN))) == 2
    engine.load(checkpoints["untied_b"])
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert sampled(engine, SHORT) == expected  # of these weights, not of those before


def test_what_was_begun_is_not_handed_out_while_the_one_before_is_read(loaded):
    engine = loaded("vllm")
    reading = engine.generate(LONG, UNEVEN, then=SHORT)
    first = next(reading)
    with pytest.raises(EngineError, match="still generating"):
        next(engine.generate(SHORT, UNEVEN))
    assert len([first, *reading]) == len(sampled(engine, SHORT)) == 4


def test_a_search_drops_what_was_begun(loaded):
    engine = loaded("vllm")
    list(engine.generate(LONG, UNEVEN, then=SHORT))
    assert engine._ahead is not None
    found = list(engine.generate(LONG, Sampling(group_size=2, beams=2, max_tokens=4, stop_ids=(1,))))
    assert (len(found), engine._llm.llm_engine.has_unfinished_requests()) == (4, False)


def test_what_is_asked_next_is_refused_before_anything_is_sampled(loaded):
    engine = loaded("vllm")
    with pytest.raises(EngineError, match="outside the vocabulary"):
        engine.generate(LONG, UNEVEN, then=Request([[10**6]], [0]))
    assert len(sampled(engine, LONG)) == 4


def test_the_process_is_left_as_it_was(build, checkpoints, capfd):
    setter, filters = torch.set_num_threads, list(warnings.filters)
    inherited = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    engine = build("vllm")
    engine.load(checkpoints["tied_a"])
    list(engine.generate(Request([[5]], [0]), PLAN))
    engine.close()
    assert torch.set_num_threads is setter
    assert warnings.filters == filters
    assert {name: os.environ.get(name) for name in inherited} == inherited
    assert capfd.readouterr() == ("", "")


def test_a_second_engine_in_the_process_is_refused_and_the_first_goes_on(loaded, checkpoints):
    engine = loaded("vllm")
    second = type(engine)(engine.options)
    with pytest.raises(EngineError, match="one vLLM engine"):
        second.load(checkpoints["untied_a"])
    assert len(list(engine.generate(Request([[5]], [0]), PLAN))) == 2


def test_bfloat16_reloads_exactly_and_is_close_to_float32(build, checkpoints):
    half = build("vllm", dtype="bfloat16")
    half.load(checkpoints["tied_b"])
    half.load(checkpoints["tied_a"])
    assert half.describe()["dtype"] == "bfloat16"
    found = list(half.generate(Request([[5], [6, 7]], [0, 1]), PLAN))
    half.close()
    policy = load_policy(checkpoints["tied_a"], "float32")
    prompts = [[[5], [6, 7]][c.prompt] for c in found]
    exact = response_logprobs(policy, prompts, [c.tokens for c in found]).logprobs.detach()
    for c, row in zip(found, exact, strict=True):
        assert c.logprobs == pytest.approx(row[: len(c.tokens)].tolist(), abs=0.5)


def test_log_probabilities_of_other_tokens_than_the_response_has_are_refused():
    said = SimpleNamespace(token_ids=[5, 7], logprobs=[-0.5, -0.25])
    response = SimpleNamespace(token_ids=[5, 6], logprobs=said, index=0, finish_reason="stop")
    with pytest.raises(EngineError, match="log-probabilities of other tokens"):
        list(_completions(SimpleNamespace(outputs=[response]), 3, 0, 1))


def test_what_sleeping_and_waking_do_to_the_memory_is_told(build, checkpoints, monkeypatch, capsys):
    """A CPU's vLLM cannot sleep: what it would be asked to do, and the weights that it has after that."""
    engine = build("vllm")
    engine.load(checkpoints["untied_a"])
    before = [(c.sample, c.tokens) for c in engine.generate(Request([[5, 6]], [1]), PLAN)]
    asked, used = [], iter([71.25, 3.5, 3.5, 71.25])
    monkeypatch.setattr(engines.vllm, "ON_GPU", True)
    monkeypatch.setattr(engines.vllm, "_in_use", lambda worker: next(used))
    monkeypatch.setattr(engine._llm, "sleep", lambda level: asked.append(f"sleep {level}"))
    monkeypatch.setattr(engine._llm, "wake_up", lambda: asked.append("wake up"))
    assert engine.sleep() == Memory(awake=71.25, asleep=3.5)
    assert engine.sleep() is None
    assert [(c.sample, c.tokens) for c in engine.generate(Request([[5, 6]], [1]), PLAN)] == before
    assert asked == ["sleep 2", "wake up"]
    told = capsys.readouterr().err
    assert "engine asleep: 71.2 -> 3.5 GB" in told and "engine awake: 3.5 -> 71.2 GB" in told


def test_options_are_what_vllm_is_built_with(build, checkpoints):
    engine = build("vllm", max_num_seqs=7, gpu_memory_utilization=0.35)
    engine.load(checkpoints["untied_a"])
    config = engine._llm.llm_engine.vllm_config
    engine.close()
    assert config.scheduler_config.max_num_seqs == 7
    assert config.cache_config.gpu_memory_utilization == 0.35
    assert config.parallel_config.tensor_parallel_size == 1


SHARED = """
    import json, sys
    from pathlib import Path

    import psutil

    from pipeline.engines import EngineOptions, Request, Sampling, vllm
    from pipeline.engines.vllm import VllmEngine

    if __name__ == "__main__":
        engine = VllmEngine(EngineOptions(dtype="float32", max_model_len=320, max_num_seqs=64, tensor_parallel=2))
        vllm._in_use = lambda worker: 2.0 + worker.rank
        said = []
        for checkpoint in sys.argv[1:]:
            engine.load(Path(checkpoint))
            plan = Sampling(group_size=2, max_tokens=8, stop_ids=(1,))
            said.append([[c.sample, c.tokens, c.logprobs] for c in engine.generate(Request([[5, 6]], [1]), plan)])
        processes = len(psutil.Process().children(recursive=True))
        in_use = engine._in_use()
        engine.close()
        print(json.dumps({"said": said, "processes": processes, "in_use": in_use}))
"""


def test_two_processes_that_share_the_weights_say_what_one_says(loaded, checkpoints, tmp_path):
    """Another checkpoint is built anew: the weights are those of the new one."""
    script, names = tmp_path / "shared.py", ("untied_a", "tied_b")
    script.write_text(textwrap.dedent(SHARED))
    paths = [str(checkpoints[name]) for name in names]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run(
        [sys.executable, str(script), *paths], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["processes"] >= 2
    assert told["in_use"] == 2.0 + 3.0  # on a CPU there is nothing to ask of the two, but for who they are
    for name, said in zip(names, told["said"], strict=True):
        one = {c.sample: c for c in loaded("vllm", name).generate(Request([[5, 6]], [1]), PLAN)}
        assert {sample: tokens for sample, tokens, _ in said} == {sample: c.tokens for sample, c in one.items()}
        for sample, _, logprobs in said:
            assert logprobs == pytest.approx(one[sample].logprobs, abs=1e-4)
