import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ArtifactError, ContractError, ExperimentError
from pipeline.models.checkpoint import save
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from stages.sft import mixed, sft


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
