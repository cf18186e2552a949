"""Text to tokens and back: the only place that tokenizes.

Responses are tokenized once, by whoever wrote them; here are prompts, demonstrations and responses from elsewhere.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.disk import json_object
from pipeline.errors import ArtifactError, InputError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Where a chat template says that the assistant writes."""

Messages = Sequence[Mapping[str, str]]


class Chat:
    """A checkpoint's tokenizer with its chat template.

    Raises `ArtifactError` when the directory has no tokenizer, no chat template or no end token.
    """

    def __init__(self, checkpoint: Path) -> None:
        try:
            self.tokenizer = _tokenizer(checkpoint)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"no tokenizer: {error}", str(checkpoint), "name a Hugging Face model directory"
            ) from error
        if self.tokenizer.chat_template is None:
            raise ArtifactError("the tokenizer has no chat template", str(checkpoint), "add chat_template.jinja to it")
        if self.tokenizer.eos_token_id is None:
            raise ArtifactError("the tokenizer has no end token", str(checkpoint), "set eos_token in its config")
        self.checkpoint = checkpoint

    def prompt_tokens(self, messages: Messages) -> list[int]:
        """The conversation up to where the assistant begins to write."""
        return list(self._apply(messages, add_generation_prompt=True))

    def demonstration(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Tokens of a whole conversation, and True where the assistant wrote them (its end token included).

        A template that marks the assistant's turns (`{% generation %}`) tells which those are. Of another, the
        conversation up to a turn must be the beginning of the whole.
        Raises `InputError` for a conversation that the assistant begins, for a turn that does not end with an end
        token, and for a template without marks that writes a turn differently once more turns follow.
        """
        if messages[0]["role"] == "assistant":
            raise InputError(
                f"a conversation begins with the assistant, answering nothing: {messages[0]['content'][:60]!r}",
                do="leave such conversations out",
            )
        if _MARKS.search(self.tokenizer.chat_template):
            return self._marked(messages)
        tokens = self._apply(messages)
        mask = [False] * len(tokens)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._apply(messages[:turn], add_generation_prompt=True), self._apply(messages[: turn + 1])
            if end[: len(start)] != start or tokens[: len(end)] != end:
                raise InputError(
                    "the chat template is not prefix-preserving: the assistant's tokens cannot be told apart",
                    str(self.checkpoint),
                    "use a variant of the template that marks the assistant's turns with {% generation %}",
                )
            written = self._until_end(tokens[len(start) : len(end)])
            mask[len(start) : len(start) + written] = [True] * written
        return tokens, mask

    def _marked(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Tokens and mask where the template says whose they are; each turn up to its end token."""
        made = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = list(made["input_ids"]), [bool(mine) for mine in made["assistant_masks"]]
        start = 0
        for mine, run in groupby(mask):
            end = start + len(list(run))
            if mine:
                written = self._until_end(tokens[start:end])
                mask[start + written : end] = [False] * (end - start - written)
            start = end
        return tokens, mask

    def _until_end(self, tokens: Sequence[int]) -> int:
        """How many of a turn's tokens the assistant writes: a template may add a line break after the end token."""
        for index in range(len(tokens) - 1, -1, -1):
            if tokens[index] in self.stop_ids:
                return index + 1
        raise InputError(
            "the chat template does not end the assistant's turn with an end token: the model would not learn to stop",
            str(self.checkpoint),
            "add the end token to generation_config.json (eos_token_id), or correct the template",
        )

    def response_tokens(self, text: str, finished: bool = True) -> list[int]:
        """Tokens of a response from elsewhere; with the end token when it was finished."""
        tokens = list(self.tokenizer.encode(text, add_special_tokens=False))
        return [*tokens, int(self.tokenizer.eos_token_id)] if finished else tokens

    def document_tokens(self, text: str, limit: int) -> list[list[int]]:
        """Tokens of a plain text, without chat template, in windows of at most `limit` tokens.

        The start token comes first where the tokenizer has one, the end token last. No token is lost but where fewer
        than two are left for a window: there is nothing to predict in it.
        """
        start = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        whole = [*start, *self.tokenizer.encode(text, add_special_tokens=False), int(self.tokenizer.eos_token_id)]
        windows = (whole[index : index + limit] for index in range(0, len(whole), limit))
        return [window for window in windows if len(window) > 1]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        # Its public name looks at the type of every token first, which takes twice as long as the rest.
        return str(self.tokenizer._decode(list(tokens), skip_special_tokens=True))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """End tokens: the tokenizer's, and those of generation_config.json where there is one."""
        ids = {int(self.tokenizer.eos_token_id)}
        if (file := self.checkpoint / "generation_config.json").is_file():
            configured = json_object(file).get("eos_token_id")
            ids |= set(configured if isinstance(configured, list) else [configured] if configured is not None else [])
        return tuple(sorted(ids))

    def metadata(self) -> dict[str, str]:
        """What a rollouts file says of its tokens: digests of tokenizer and chat template, end tokens."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str()
        return {
            "tokenizer_digest": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
            "chat_template_digest": hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16],
            "end_tokens": ",".join(map(str, self.stop_ids)),
        }

    def _apply(self, messages: Messages, **more: bool) -> Any:
        """What the template makes of messages; `more` is passed on."""
        from jinja2 import TemplateError

        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=True, **{"return_dict": False, **more})
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in plain) or "none"
            raise InputError(
                f"the chat template refuses the turns ({roles}): {error}",
                str(self.checkpoint),
                "leave such conversations out, or use another template",
            ) from error


_OF_TOKENIZERS = re.compile(
    r"config\.json|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template).*|.*\.model"
)
"""Names of the files that a tokenizer is made of."""
_KEPT = 4
"""Tokenizers of different files that a process keeps; a large one takes a second to read."""
_tokenizers: dict[str, Any] = {}


def _tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer; that of another checkpoint, if it was read from the same bytes."""
    from transformers import AutoTokenizer

    read = hashlib.sha256()
    for file in sorted(checkpoint.glob("*")):
        if _OF_TOKENIZERS.fullmatch(file.name) and file.is_file():
            read.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    about = read.hexdigest()
    if about not in _tokenizers:
        made = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        while len(_tokenizers) >= _KEPT:
            del _tokenizers[next(iter(_tokenizers))]
        _tokenizers[about] = made
    return _tokenizers[about]
