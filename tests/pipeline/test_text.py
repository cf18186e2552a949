"""Text and tokens: what the assistant wrote, and nothing else."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import text
from pipeline.errors import ArtifactError, InputError
from pipeline.models.checkpoint import save
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat

TEXTS = ["What is 12 + 30?", "It is 42.\n", "be brief", "naïve 東京", "abcdefghijklmnopqrstuvwxyz 0123456789"]
USER, REPLY = {"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "It is 42.\n"}
SYSTEM, AGAIN = {"role": "system", "content": "be brief"}, {"role": "assistant", "content": "naïve 東京"}
KINDS = ["characters", "bpe"]
CONVERSATIONS = {
    "one turn": [USER, REPLY],
    "a system turn": [SYSTEM, USER, REPLY],
    "two turns": [SYSTEM, USER, REPLY, USER, AGAIN],
    "two replies": [USER, REPLY, AGAIN],
}

CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
STRICT = (
    "{% if not messages or messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
)


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    made = {}
    for kind in KINDS:
        spec = ModelSpec(layers=1, width=32, heads=1, kv_heads=1, max_position=64, tokenizer=kind, vocab_size=320)
        made[kind] = tmp_path_factory.mktemp("policies") / kind
        save(*create(spec, TEXTS, 0), made[kind])
    return made


@pytest.fixture
def with_template(policies, tmp_path):
    """A chat whose tokenizer has another template."""

    def make(template, **changes):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(policies["characters"])
        tokenizer.chat_template = template
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path / "checkpoint")
        return Chat(tmp_path / "checkpoint")

    return make


@pytest.fixture(scope="session")
def chats(policies):
    return {kind: Chat(path) for kind, path in policies.items()}


def written(chat, tokens, mask):
    """The assistant's tokens as text, a run of them after the other, special tokens included."""
    runs, last = [], False
    for token, mine in zip(tokens, mask, strict=True):
        if mine and not last:
            runs.append([])
        if mine:
            runs[-1].append(token)
        last = mine
    return [chat.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_mask_covers_what_the_assistant_wrote_and_its_end_token_and_nothing_else(chats, kind, turns):
    chat = chats[kind]
    tokens, mask = chat.demonstration(turns)
    replies = "".join(turn["content"] + "<eos>" for turn in turns if turn["role"] == "assistant")
    assert "".join(written(chat, tokens, mask)) == replies
    assert sum(token == chat.tokenizer.eos_token_id for token in tokens) == replies.count("<eos>")
    assert mask[-1] and tokens[-1] == chat.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_demonstration_begins_with_the_prompt_and_goes_on_with_the_response(chats, kind):
    chat = chats[kind]
    tokens, mask = chat.demonstration([SYSTEM, USER, REPLY])
    prompt = chat.prompt_tokens([SYSTEM, USER])
    assert tokens == prompt + chat.response_tokens(REPLY["content"])
    assert mask == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))


@pytest.mark.parametrize("kind", KINDS)
@given(reply=st.text("It is 42.\nWhatbe", min_size=1, max_size=20), question=st.text("What is 12 + 30?", max_size=20))
def test_every_reply_is_masked_as_it_stands(chats, kind, reply, question):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}, USER]
    tokens, mask = chats[kind].demonstration(turns)
    assert written(chats[kind], tokens, mask) == [f"{reply}<eos>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_without_the_assistant_has_nothing_to_imitate(chats, kind):
    tokens, mask = chats[kind].demonstration([USER])
    assert len(tokens) == len(mask) and not any(mask)


def test_a_line_break_after_the_end_token_is_the_templates(with_template):
    chat = with_template(CHATML)
    tokens, mask = chat.demonstration([SYSTEM, USER, REPLY, USER, AGAIN])
    assert written(chat, tokens, mask) == [REPLY["content"] + "<eos>", AGAIN["content"] + "<eos>"]
    assert not mask[-1] and chat.decode(tokens[-1:]) == "\n"


def test_end_tokens_of_generation_config_end_a_turn_too(with_template, tmp_path):
    template = CHATML.replace("eos_token + ", "pad_token + ")
    with pytest.raises(InputError, match="does not end the assistant's turn with an end token"):
        with_template(template).demonstration([USER, REPLY])
    pad = with_template(template).tokenizer.pad_token_id
    for ends in (pad, [pad]):
        (tmp_path / "checkpoint" / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
        chat = Chat(tmp_path / "checkpoint")
        assert chat.stop_ids == tuple(sorted({pad, chat.tokenizer.eos_token_id}))
        tokens, mask = chat.demonstration([USER, REPLY])
        assert written(chat, tokens, mask) == [REPLY["content"] + "<pad>"]
    (tmp_path / "checkpoint" / "generation_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        assert Chat(tmp_path / "checkpoint").stop_ids


def test_a_template_that_rewrites_earlier_turns_is_refused(with_template, tmp_path):
    chat = with_template(FORGETFUL)
    assert any(chat.demonstration([USER, REPLY])[1])
    with pytest.raises(InputError, match="not prefix-preserving") as caught:
        chat.demonstration([USER, REPLY, USER, AGAIN])
    assert caught.value.where == str(tmp_path / "checkpoint")


def test_a_template_that_opens_the_turn_otherwise_is_refused(with_template):
    chat = with_template(CHATML.replace("'[assistant]'", "'[assistant] <think>'"))
    with pytest.raises(InputError, match="not prefix-preserving"):
        chat.demonstration([USER, REPLY])


def test_a_conversation_that_the_assistant_begins_is_refused(chats):
    with pytest.raises(InputError, match=r"begins with the assistant, answering nothing: 'It is 42"):
        chats["bpe"].demonstration([REPLY, USER, AGAIN])


def test_a_template_without_end_token_is_refused(with_template):
    with pytest.raises(InputError, match="would not learn to stop"):
        with_template(ENDLESS).demonstration([USER, REPLY])


def test_turns_that_the_template_refuses_are_an_input_error(with_template):
    chat = with_template(STRICT)
    assert chat.prompt_tokens([USER])
    with pytest.raises(InputError, match=r"refuses the turns \(system, user\): the user begins"):
        chat.prompt_tokens([SYSTEM, USER])


def test_a_tokenizer_without_template_or_end_token_is_refused(with_template, tmp_path):
    with pytest.raises(ArtifactError, match="no chat template") as caught:
        with_template(None)
    assert caught.value.where == str(tmp_path / "checkpoint")


def test_a_tokenizer_without_end_token_is_refused(with_template):
    with pytest.raises(ArtifactError, match="no end token"):
        with_template(CHATML, eos_token=None)


def test_a_directory_without_a_tokenizer_is_refused(policies, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ArtifactError, match="no tokenizer") as caught:
            Chat(path)
        assert caught.value.where == str(path)
    (tmp_path / "tokenizer_config.json").write_bytes((policies["characters"] / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="no tokenizer"):
        Chat(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_has_its_end_token_when_it_was_finished(chats, kind):
    chat = chats[kind]
    cut, whole = chat.response_tokens("It is 42.", finished=False), chat.response_tokens("It is 42.")
    assert whole == [*cut, chat.tokenizer.eos_token_id]
    assert chat.decode(whole) == chat.decode(cut) == "It is 42."


def test_metadata_changes_with_tokenizer_and_template(chats, with_template):
    one, other = chats["characters"].metadata(), chats["bpe"].metadata()
    assert one["tokenizer_digest"] != other["tokenizer_digest"]
    templated = with_template(CHATML).metadata()
    assert templated["tokenizer_digest"] == one["tokenizer_digest"]
    assert templated["chat_template_digest"] != one["chat_template_digest"]
    assert one["end_tokens"] == ",".join(map(str, chats["characters"].stop_ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_its_text_and_the_end_token_without_any_template(chats, kind):
    chat = chats[kind]
    [tokens] = chat.document_tokens(TEXTS[4], 1000)
    assert tokens == [*chat.tokenizer.encode(TEXTS[4], add_special_tokens=False), chat.tokenizer.eos_token_id]
    assert chat.decode(tokens) == TEXTS[4]


@pytest.mark.parametrize("limit", [2, 3, 7, 26, 38, 100])
def test_long_documents_are_cut_into_windows_and_only_a_lonely_last_token_is_lost(chats, limit):
    chat = chats["characters"]
    [whole], windows = chat.document_tokens(TEXTS[4], 1000), chat.document_tokens(TEXTS[4], limit)
    kept = [token for window in windows for token in window]
    assert kept == whole[: len(whole) - (len(whole) % limit == 1)]
    assert all(1 < len(window) <= limit for window in windows)


def test_a_document_begins_with_the_start_token_where_there_is_one(policies):
    chat = Chat(policies["characters"])
    plain = chat.document_tokens("brief", 100)
    chat.tokenizer.bos_token = "<pad>"
    assert chat.document_tokens("brief", 100) == [[chat.tokenizer.pad_token_id, *plain[0]]]
    assert chat.document_tokens("", 100) == [[chat.tokenizer.pad_token_id, chat.tokenizer.eos_token_id]]


def test_a_document_without_text_has_nothing_to_predict(chats):
    assert chats["characters"].document_tokens("", 100) == []


def test_a_tokenizer_of_the_same_bytes_is_read_once(policies, tmp_path):
    one = next(iter(policies.values()))
    first = Chat(one)
    shutil.copytree(one, tmp_path / "copy")
    copied = Chat(tmp_path / "copy")
    assert copied.tokenizer is first.tokenizer
    assert copied.checkpoint != first.checkpoint
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    changed = Chat(tmp_path / "copy").tokenizer
    assert changed is not first.tokenizer and changed.model_max_length == 77


def test_few_tokenizers_are_kept(policies, tmp_path):
    one = next(iter(policies.values()))
    config = json.loads((one / "tokenizer_config.json").read_text())
    for number in range(10):
        shutil.copytree(one, tmp_path / str(number))
        (tmp_path / str(number) / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": number}))
        assert Chat(tmp_path / str(number)).tokenizer.model_max_length == number
    assert len(text._tokenizers) <= text._KEPT
