"""A policy from nothing: a tokenizer trained on some text and a small Qwen3 with random weights."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from pipeline.attention import attend_by_products
from pipeline.errors import ExperimentError
from pipeline.settings import Settings

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"

# One token, so that no merge crosses from the prompt into the response, whatever either of them is.
ANSWER = "\nAssistant: "

CHARACTER_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
BPE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\nAssistant: ' }}{% endif %}"
)


class ModelSpec(Settings):
    """The shape of a fresh policy."""

    architecture: Literal["qwen3"] = "qwen3"
    """Transformer family."""
    layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    width: int = Field(default=128, ge=2)
    """Size of the residual stream. vLLM's CPU attention wants width / heads to be a multiple of 32."""
    heads: int = Field(default=4, ge=1)
    """Query heads."""
    kv_heads: int = Field(default=2, ge=1)
    """Key and value heads, each shared by heads / kv_heads query heads."""
    ffn: int = Field(default=4, ge=1)
    """Width of the gated feed-forward layer, as a multiple of `width`."""
    tokenizer: Literal["characters", "bpe"] = "characters"
    """One token per character, or byte-pair encoding over UTF-8 bytes."""
    vocab_size: int = Field(default=1024, ge=300)
    """Most tokens that `bpe` may learn, its 256 bytes and 3 special tokens included. Unused by `characters`."""
    max_position: int = Field(default=1024, ge=2)
    """Longest sequence, prompt plus response, in tokens."""
    tied: bool = False
    """The output head is the transposed embedding."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSpec":
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width} must be an even multiple of heads {self.heads}, and heads a multiple of "
                f"kv_heads {self.kv_heads}"
            )
        return self


def create(spec: ModelSpec, texts: Iterable[str], seed: int) -> tuple[Any, PreTrainedTokenizerFast]:
    """Return a float32 model with random weights and a tokenizer trained on `texts`; the same seed, the same bytes.

    With the chat template of both tokenizers, the tokens of a conversation that ends before the assistant speaks
    (`add_generation_prompt=True`) are a prefix of the tokens of the whole, and the whole ends with `<eos>`.
    `characters` writes contents as they are; `bpe` writes `User: ...`, a line break, `Assistant: ...`.
    """
    tokenizer = _characters(texts) if spec.tokenizer == "characters" else _bpe(texts, spec.vocab_size)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.width // spec.heads,
        intermediate_size=spec.ffn * spec.width,
        max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tied,
        initializer_range=spec.init_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attend_by_products(model)
    return model.eval(), tokenizer


def _characters(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    characters = sorted({character for text in texts for character in text})
    if not characters:
        raise ExperimentError(
            "no text to make a tokenizer from", do="hand over prompts or demonstrations that have text"
        )
    vocabulary = {token: index for index, token in enumerate([PAD, END, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    return _wrap(tokenizer, CHARACTER_TEMPLATE, unk_token=UNKNOWN)


def _bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, ANSWER],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, END, ANSWER)])
    return _wrap(tokenizer, BPE_TEMPLATE)


def _wrap(tokenizer: Tokenizer, template: str, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=template,
        **special,
    )
