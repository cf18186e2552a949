"""Chat templates of the common families, in small: what begins, what ends, and what the assistant wrote.

The formats are those of the families' model cards; tokenizers are built here, with the same special tokens and habits.
"""

import json
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ArtifactError, InputError
from pipeline.text import Chat

TEXTS = ["What is 12 + 30?", "It is 42.", "be brief", "naïve 東京", "system user assistant model"]
SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "What is 12 + 30?"}
REPLY, AGAIN = {"role": "assistant", "content": "It is 42."}, {"role": "assistant", "content": "naïve 東京"}
MORE = {"role": "user", "content": "system user"}

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a model.<|im_end|>\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """How the models of a family talk."""

    template: str | None
    special: tuple[str, ...]
    end: str
    """Ends a turn."""
    pad: str
    eos: str | None = None
    """Of the tokenizer, where a turn ends otherwise: generation_config.json then names both."""
    bos: str | None = None
    begins: bool = False
    """Whether the tokenizer puts its start token before a text, too."""
    opens: str = ""
    """What the assistant writes before its first word."""
    system: bool = True
    turns: bool = True
    """Whether conversations of several turns can be told apart."""
    metaspace: str | None = None
    """Of tokenizers that write spaces as they do everything else (SentencePiece's): before which texts they put one
    more, `never` or `first`. Those of the others are of bytes."""


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "chatml": Family(TURNS, CHATML, "<|im_end|>", pad="<|im_end|>"),
    "qwen2.5": Family(DEFAULT_SYSTEM + TURNS, CHATML, "<|im_end|>", pad="<|endoftext|>"),
    "qwen3": Family(
        THINKING, (*CHATML, "<think>", "</think>"), "<|im_end|>", pad="<|endoftext|>",
        opens="<think>\n\n</think>\n\n", turns=False,
    ),
    "llama-3": Family(
        HEADERS, ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>", pad="<|eot_id|>", eos="<|end_of_text|>", bos="<|begin_of_text|>", begins=True,
    ),
    "gemma": Family(
        NO_SYSTEM, ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", pad="<pad>",
        eos="<eos>", bos="<bos>", begins=True, system=False, metaspace="never",
    ),
    "mistral": Family(
        INSTRUCTIONS, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", pad="</s>", bos="<s>", begins=True, opens=" ",
        system=False, metaspace="first",
    ),
}  # fmt: skip


def of_bytes():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return made


def of_sentencepiece(before):
    """As SentencePiece has them: spaces are letters, and what is in no token is spelled in bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=before)
    ascii_texts = [text for text in TEXTS if text.isascii()]
    made.train_from_iterator(ascii_texts, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    state = json.loads(made.to_str())
    for byte in range(256):
        state["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(state["model"]["vocab"]))
    made = Tokenizer.from_str(json.dumps(state | {"model": state["model"] | {"byte_fallback": True}}))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=before, split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=before)])
    return made


def tokenizer_of(family):
    made = of_bytes() if family.metaspace is None else of_sentencepiece(family.metaspace)
    made.add_special_tokens(list(family.special))
    if family.begins:
        made.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, made.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=family.bos, eos_token=family.eos or family.end, pad_token=family.pad,
        chat_template=family.template,
    )  # fmt: skip


@pytest.fixture
def chat_of(tmp_path):
    def make(family):
        tokenizer = tokenizer_of(family)
        tokenizer.save_pretrained(tmp_path)
        if family.eos:
            ends = [tokenizer.convert_tokens_to_ids(end) for end in (family.eos, family.end)]
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        return Chat(tmp_path)

    return make


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def chat(family, chat_of):
    return chat_of(family)


def conversations(family):
    found = [[USER, REPLY]]
    if family.system:
        found.append([SYSTEM, USER, REPLY])
    if family.turns:
        found += [[USER, REPLY, MORE, AGAIN], *([[SYSTEM, USER, REPLY, MORE, AGAIN]] if family.system else [])]
    return found


def text(chat, tokens):
    """Of tokens from the midst of a text: where one begins with a space, some tokenizers leave that out."""
    tokens = [chat.tokenizer.eos_token_id, *tokens]
    said = chat.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return said.removeprefix(chat.tokenizer.eos_token)


def runs(tokens, mask):
    """The assistant's tokens, a run after the other."""
    found, before = [], False
    for token, mine in zip(tokens, mask, strict=True):
        if mine:
            found = found if before else [*found, []]
            found[-1].append(token)
        before = mine
    return found


def test_a_dialogue_is_its_template_and_nothing_else(family, chat):
    for messages in conversations(family):
        tokens, _ = chat.demonstration(messages)
        assert text(chat, tokens) == chat.tokenizer.apply_chat_template(messages, tokenize=False)


def test_there_is_one_start_token_or_none(family, chat):
    wanted = int(family.bos is not None)
    for messages in conversations(family):
        for tokens in (chat.prompt_tokens(messages[:-1]), chat.demonstration(messages)[0]):
            assert tokens.count(chat.tokenizer.bos_token_id) == wanted
            assert not wanted or tokens[0] == chat.tokenizer.bos_token_id
    assert chat.tokenizer.bos_token_id not in chat.response_tokens("It is 42.")


def test_the_mask_is_what_the_assistant_writes_and_the_token_that_ends_its_turn(family, chat):
    for messages in conversations(family):
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        found = [text(chat, run) for run in runs(*chat.demonstration(messages))]
        assert found == [f"{family.opens}{reply}{family.end}" for reply in replies]


def test_special_tokens_are_never_split(family, chat):
    known = {token: chat.tokenizer.convert_tokens_to_ids(token) for token in family.special}
    for messages in conversations(family):
        tokens, _ = chat.demonstration(messages)
        rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
        assert {token: tokens.count(number) for token, number in known.items()} == {
            token: rendered.count(token) for token in known
        }


def test_what_ends_a_turn_ends_a_response_even_where_it_pads_too(family, chat):
    ends = {chat.tokenizer.convert_tokens_to_ids(end) for end in (family.eos, family.end) if end}
    assert set(chat.stop_ids) == ends
    tokens, mask = chat.demonstration([USER, REPLY])
    assert [token for token, mine in zip(tokens, mask, strict=True) if mine][-1] in ends


def test_a_dialogue_round_trips_without_being_tokenized_again(family, chat):
    """What was sampled is learned from: the prompt's tokens and then the reply's, as they were."""
    for messages in conversations(family):
        tokens, mask = chat.demonstration(messages)
        prompt = chat.prompt_tokens(messages[:-1])
        *_, reply = runs(tokens, mask)
        assert tokens[: len(prompt) + len(reply)] == prompt + reply
        assert chat.decode(reply).strip().removeprefix("<think>\n\n</think>").strip() == messages[-1]["content"]


OPENING = [
    name for name, family in FAMILIES.items() if family.opens.strip() or (family.opens and family.metaspace is None)
]
"""Families whose assistant opens with something else than its reply; a tokenizer's own space is no such thing."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OPENING])
def test_a_response_from_elsewhere_has_the_tokens_that_the_template_gives_it(name, chat_of):
    family, chat = FAMILIES[name], chat_of(FAMILIES[name])
    for reply in (REPLY, AGAIN):
        tokens, mask = chat.demonstration([USER, reply])
        (written,) = runs(tokens, mask)
        ended = chat.tokenizer.convert_tokens_to_ids(family.end)
        assert [*chat.response_tokens(reply["content"], finished=False), ended] == written
        assert chat.decode(written) == reply["content"]


def test_spaces_are_those_of_the_text_whoever_writes_them(family, chat):
    for said in ("two  words", "naïve 東京 🙂", "a\n b", "1 + 1"):
        assert chat.decode(chat.response_tokens(said)) == said
        for tokens in chat.document_tokens(said, limit=1000):
            assert chat.decode(tokens) == said


def test_a_family_without_a_system_turn_says_so(chat_of):
    for name in ("gemma", "mistral"):
        with pytest.raises(InputError, match="the chat template refuses the turns"):
            chat_of(FAMILIES[name]).prompt_tokens([SYSTEM, USER])


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_its_turns(chat_of):
    messages = [USER, REPLY, MORE, AGAIN]
    with pytest.raises(InputError, match="not prefix-preserving"):
        chat_of(FAMILIES["qwen3"]).demonstration(messages)
    family = Family(MARKED, FAMILIES["qwen3"].special, "<|im_end|>", pad="<|endoftext|>")
    chat = chat_of(family)
    tokens, mask = chat.demonstration(messages)
    assert [text(chat, run) for run in runs(tokens, mask)] == [
        "It is 42.<|im_end|>", "<think>\n\n</think>\n\nnaïve 東京<|im_end|>"
    ]  # fmt: skip
    assert text(chat, tokens) == chat.tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_that_marks_a_turn_without_its_end_is_refused(chat_of):
    template = MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}")
    with pytest.raises(InputError, match="does not end the assistant's turn with an end token"):
        chat_of(Family(template, CHATML, "<|im_end|>", pad="<|endoftext|>")).demonstration([USER, REPLY])


def test_a_tokenizer_without_a_template_is_refused_and_told_what_to_do(chat_of):
    with pytest.raises(ArtifactError, match=r"no chat template[\s\S]*chat_template\.jinja"):
        chat_of(Family(None, CHATML, "<|im_end|>", pad="<|endoftext|>"))
