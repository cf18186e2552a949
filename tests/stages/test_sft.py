import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.algorithms.recipe import Recipe
from pipeline.errors import ArtifactError, ContractError, ExperimentError, NumericsError
from pipeline.experiment import Experiment
from pipeline.models.checkpoint import save
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from stages.sft import Settings, mixed, sft

ROOT = Path(__file__).parents[2]


def mean_nll(path, demonstrations):
    """Mean negative log-likelihood of the assistant's tokens, counted one demonstration at a time."""
    model, chat = AutoModelForCausalLM.from_pretrained(path), Chat(path)
    total = tokens = 0
    for messages in demonstrations.table()["messages"].to_pylist():
        ids, mask = chat.demonstration(messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0, :-1]
        wanted = torch.tensor(mask[1:])
        total -= logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][wanted].sum().item()
        tokens += int(wanted.sum())
    return total / tokens


def test_it_makes_a_policy_from_nothing(policy, demonstrations, sft_settings, sound):
    sound(policy)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy.path), AutoTokenizer.from_pretrained(policy.path)
    asked = sft_settings().new
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (asked.layers, asked.width)
    assert model.config.vocab_size == len(tokenizer)
    text = {
        character
        for row in demonstrations.table()["messages"].to_pylist()
        for turn in row
        for character in turn["content"]
    }
    assert text <= set(tokenizer.get_vocab())
    assert Chat(policy.path).prompt_tokens([{"role": "user", "content": "1+2="}])


def test_the_loss_falls_and_is_the_mean_over_the_assistants_tokens(room, demonstrations, policy, sft_settings, numbers):
    made = sft.run(
        room / "one-step", sft_settings(epochs=1, batch=30, warmup_share=0.0), demonstrations=demonstrations.path
    )
    assert made.stats["steps"] == 1
    untrained = sft.run(
        room / "no-step", sft_settings(epochs=1, batch=30, learning_rate=1e-12), demonstrations=demonstrations.path
    )
    before, after = mean_nll(untrained.path, demonstrations), mean_nll(policy.path, demonstrations)
    assert numbers(made)["loss/nll", 1] == pytest.approx(before, rel=1e-5)
    assert before > 2.0
    assert after < 0.3
    losses = numbers(policy)
    assert losses["loss/nll", 90] < losses["loss/nll", 30] < losses["loss/nll", 1]
    assert losses["learning_rate", 90] < losses["learning_rate", 30]
    assert policy.stats["steps"] == 90


def test_the_same_twice_and_something_else_with_another_seed(room, demonstrations, sft_settings):
    def digest(name, **changes):
        settings = sft_settings(epochs=2, **changes)
        return sft.run(room / name, settings, demonstrations=demonstrations.path).manifest.digest

    assert digest("once") == digest("twice") != digest("another seed", seed=1)


def test_the_cut_into_micro_batches_changes_nothing_but_rounding(room, demonstrations, sft_settings):
    models = [
        AutoModelForCausalLM.from_pretrained(
            sft.run(
                room / f"sft-{budget}", sft_settings(epochs=1, micro_batch_tokens=budget),
                demonstrations=demonstrations.path,
            ).path
        )
        for budget in (1, 10**6)
    ]  # fmt: skip
    one, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert torch.linalg.vector_norm(one - other) < 1e-5 * torch.linalg.vector_norm(one)


def test_too_long_demonstrations_are_counted_and_left_out(room, demonstrations, policy, sft_settings, tmp_path):
    chat = Chat(policy.path)
    lengths = [len(chat.demonstration(m)[0]) for m in demonstrations.table()["messages"].to_pylist()]
    limit = max(lengths) - 1
    too_long = sum(length > limit for length in lengths)
    assert 0 < too_long < len(lengths)
    made = sft.run(room / "short", sft_settings(epochs=1, batch=1, tokens=limit), demonstrations=demonstrations.path)
    assert made.stats["rejected"] == too_long
    assert made.stats["steps"] == len(lengths) - too_long
    with pytest.raises(ContractError, match=f"all {len(lengths)} demonstrations are longer than 2 tokens"):
        sft.run(tmp_path / "none", sft_settings(tokens=2), demonstrations=demonstrations.path)
    assert not list(tmp_path.iterdir())


def test_it_starts_from_a_given_policy(room, demonstrations, policy, other_policy, sft_settings):
    settings = sft_settings(new=None, epochs=1, batch=30, learning_rate=1e-12)
    kept = sft.run(room / "kept", settings, demonstrations=demonstrations.path, policy=policy.path)
    before, after = (AutoModelForCausalLM.from_pretrained(p.path).state_dict() for p in (policy, kept))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-9) for name in before)
    assert [record.digest for record in kept.manifest.inputs["policy"]] == [policy.manifest.digest]
    further = sft.run(
        room / "further", sft_settings(new=None, epochs=5), demonstrations=demonstrations.path, policy=other_policy
    )
    assert mean_nll(further.path, demonstrations) < mean_nll(other_policy, demonstrations) - 1


def test_a_given_policy_may_end_its_turns_with_another_token(room, demonstrations, sft_settings):
    model, tokenizer = create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1), ["0123456789+=,;|"], 0)
    end = tokenizer.convert_tokens_to_ids("|")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "|")
    model.generation_config.eos_token_id = [end]
    save(model, tokenizer, room / "bar")
    made = sft.run(
        room / "from-bar", sft_settings(new=None, epochs=1), demonstrations=demonstrations.path, policy=room / "bar"
    )
    assert end in Chat(made.path).stop_ids
    assert json.loads((made.path / "generation_config.json").read_text())["eos_token_id"] == [end, 1]


def test_neither_a_policy_nor_a_description_of_one(tmp_path, demonstrations, sft_settings):
    with pytest.raises(ExperimentError, match="no model to train"):
        sft.run(tmp_path / "out", sft_settings(new=None), demonstrations=demonstrations.path)


def test_a_broken_policy_is_refused(tmp_path, demonstrations, policy, sft_settings):
    broken = shutil.copytree(policy.path, tmp_path / "broken", ignore=shutil.ignore_patterns("manifest.json"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="safetensors"):
        sft.run(tmp_path / "out", sft_settings(new=None), demonstrations=demonstrations.path, policy=broken)


def test_the_prompts_tokens_are_not_imitated(policy, demonstrations):
    chat = Chat(policy.path)
    messages = demonstrations.table()["messages"].to_pylist()[0]
    tokens, mask = chat.demonstration(messages)
    start = mask.index(True)
    assert chat.decode(tokens[:start]) == messages[0]["content"]
    assert chat.decode(tokens[start:]) == messages[1]["content"]
    assert all(mask[start:])
    read = response_logprobs(AutoModelForCausalLM.from_pretrained(policy.path), [tokens[:start]], [tokens[start:]])
    assert read.logprobs.shape == (1, len(tokens) - start)


def test_a_new_model_must_hold_the_longest_demonstration(sft_settings):
    with pytest.raises(ExperimentError, match=r"max_position = 64 is less than tokens = 65"):
        sft_settings(tokens=65)


@pytest.fixture(scope="module")
def documents(room, made_of):
    return made_of(room / "sft-documents", "documents", 12)


def document_nll(path, documents):
    """Summed negative log-likelihood of all documents, one at a time, and the number of tokens predicted."""
    model, chat = AutoModelForCausalLM.from_pretrained(path), Chat(path)
    total = count = 0
    for text in documents.table()["text"].to_pylist():
        [tokens] = chat.document_tokens(text, 1000)
        ids = torch.tensor(tokens)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(logprobs.gather(1, ids[1:, None]).sum())
        count += len(tokens) - 1
    return total, count


def test_documents_are_the_asked_share_of_the_examples_of_every_epoch(sft_settings):
    plan = mixed(30, 7, sft_settings(documents_share=0.25, epochs=4, batch=16))
    assert [len(rows) for rows in plan] == [20, 20] * 4
    epochs = [np.concatenate(plan[start : start + 2]) for start in range(0, 8, 2)]
    assert all(sorted(rows[rows < 30]) == list(range(30)) for rows in epochs)
    assert all(sum(rows >= 30) == 10 for rows in epochs)
    drawn = np.concatenate([rows[rows >= 30] - 30 for rows in epochs])
    assert sorted(np.bincount(drawn)) == [5] * 2 + [6] * 5
    assert not np.array_equal(np.sort(epochs[0]), np.sort(epochs[1]))


def test_without_a_share_documents_change_nothing(room, demonstrations, documents, sft_settings, numbers):
    paths = {"demonstrations": demonstrations.path}
    one = sft.run(room / "no-documents", sft_settings(epochs=1), **paths)
    other = sft.run(room / "unused-documents", sft_settings(epochs=1), documents=documents.path, **paths)
    assert one.manifest.digest == other.manifest.digest
    assert numbers(one)["rows/documents", 0] == 0


def test_the_loss_is_the_mean_over_the_tokens_of_demonstrations_and_documents(
    room, demonstrations, documents, sft_settings, numbers
):
    share = 12 / 42
    made = sft.run(
        room / "mixed", sft_settings(epochs=1, batch=42, documents_share=share, learning_rate=1e-12, tokens=60),
        demonstrations=demonstrations.path, documents=documents.path,
    )  # fmt: skip
    assert made.stats["steps"] == 1
    assert numbers(made)["rows/documents", 0] == 12
    chat, rows = Chat(made.path), demonstrations.table()["messages"].to_pylist()
    targets = sum(sum(chat.demonstration(messages)[1]) for messages in rows)
    total, count = document_nll(made.path, documents)
    wanted = (mean_nll(made.path, demonstrations) * targets + total) / (targets + count)
    assert numbers(made)["loss/nll", 1] == pytest.approx(wanted, rel=1e-5)


def test_what_is_in_documents_alone_is_learnt_from_them(room, demonstrations, documents, policy, sft_settings):
    """A prompt's tokens are no target in a demonstration; in a document they are."""
    made = sft.run(
        room / "learnt", sft_settings(new=None, epochs=3, documents_share=0.5), demonstrations=demonstrations.path,
        documents=documents.path, policy=policy.path,
    )  # fmt: skip
    before, after = (document_nll(path, documents)[0] for path in (policy.path, made.path))
    assert after < 0.7 * before


def test_a_share_of_documents_without_documents(tmp_path, demonstrations, sft_settings):
    with pytest.raises(ExperimentError, match=r"data\.documents"):
        sft.run(tmp_path / "out", sft_settings(documents_share=0.1), demonstrations=demonstrations.path)
    assert not list(tmp_path.iterdir())


def test_killed_while_it_trains_it_goes_on_to_the_same_policy(survives, demonstrations, documents, sft_settings):
    chosen = sft_settings(epochs=3, documents_share=0.25, save_every=4)
    made = survives(sft, chosen, before=7, saved=4, demonstrations=demonstrations.path, documents=documents.path)
    assert made.stats["steps"] == 12


def test_dropout_is_the_same_after_a_crash(survives, demonstrations, forgetting, policy, sft_settings, tmp_path):
    chosen, paths = sft_settings(new=None, epochs=2, save_every=2), {"demonstrations": demonstrations.path}
    made = survives(sft, chosen, before=6, saved=4, policy=forgetting, **paths)
    plain = sft.run(tmp_path / "plain", chosen, policy=policy.path, **paths)
    assert plain.manifest.files["model.safetensors"] != made.manifest.files["model.safetensors"]


KILLED = """
import os, signal, sys
from itertools import count
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from stages.sft import sft

torch.set_num_threads(1)
steps = count(1)
register_optimizer_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == 6 else None)
sft.main(sys.argv[1:])
"""


def test_a_process_that_the_system_kills_is_survived(demonstrations, sft_settings, tmp_path):
    chosen, paths = sft_settings(epochs=3, save_every=2), {"demonstrations": demonstrations.path}
    words = sft.command(tmp_path / "killed", chosen, **paths)
    died = subprocess.run(
        [sys.executable, "-c", KILLED, *words[3:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    [scratch] = tmp_path.iterdir()
    assert [path.name[:9] for path in (scratch / "working" / "progress").iterdir()] == ["00000004-"]
    made, whole = (sft.run(tmp_path / name, chosen, **paths) for name in ("killed", "whole"))
    assert "going on from step 4 of 9" in (made.path / "log.txt").read_text()
    assert made.manifest.digest == whole.manifest.digest
    assert not (made.path / "working").exists()


def test_how_often_it_saves_changes_nothing(demonstrations, sft_settings, tmp_path):
    digests = {
        sft.run(
            tmp_path / str(every), sft_settings(epochs=1, save_every=every), demonstrations=demonstrations.path
        ).manifest.digest
        for every in (0, 1, 2)
    }  # fmt: skip
    assert len(digests) == 1


def test_a_policy_that_the_last_step_broke_is_not_written(demonstrations, sft_settings, tmp_path):
    with pytest.raises(NumericsError, match="weights are not finite after step 1") as error:
        sft.run(
            tmp_path / "out",
            sft_settings(
                new=sft_settings().new.model_copy(update={"init_std": 5.0}), epochs=1, batch=30, warmup_share=0.0,
                learning_rate=1e19, weight_decay=3e19,
            ),
            demonstrations=demonstrations.path,
        )  # fmt: skip
    assert error.value.where.endswith("weight")
    assert not (tmp_path / "out").exists()


def test_settings_come_from_the_experiment():
    experiment = Experiment(
        name="run", base="base", recipe=Recipe.load("grpo"), models={"new": {"layers": 2}},
        data={"prompts": {}, "demonstrations": {}}, sft={"batch": 9},
        resources={"save_every": 7, "micro_batch_tokens": 50},
        scale={"iterations": 1, "groups": 4, "prompt_tokens": 8, "response_tokens": 16, "learning_rate": 1e-3},
    )  # fmt: skip
    found = Settings.of(experiment)
    assert (found.batch, found.tokens, found.save_every, found.micro_batch_tokens) == (9, 24, 7, 50)
    longer = experiment.model_copy(update={"sft": experiment.sft.model_copy(update={"tokens": 40})})
    assert Settings.of(longer) == found.model_copy(update={"tokens": 40})
