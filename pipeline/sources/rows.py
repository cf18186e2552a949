"""A row as it is in the wild to a row of a contract, or the reason why it cannot be one."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

Row = dict[str, Any]


class UnfitRowError(Exception):
    """A row that cannot be what is asked for: `why`, the same words for every such row, and what was `found` in it."""

    def __init__(self, why: str, found: str = "") -> None:
        super().__init__(why, found)
        self.why, self.found = why, found

    def __str__(self) -> str:
        return f"{self.why}: {self.found}" if self.found else self.why


class Noted(Mapping[str, Any]):
    """A row that remembers which of its columns were read and held something."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.used: list[str] = []

    def __getitem__(self, name: str) -> Any:
        if (value := self._values[name]) is not None and name not in self.used:
            self.used.append(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class Origin:
    """What the rows with one mapping of names were made of. The dictionaries are sets that keep their order."""

    made: dict[str, dict[str, None]] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, columns: Iterable[str], names: Mapping[str, str], origin: Mapping[str, str]) -> None:
        """Count one row in: its columns, our name of each -> theirs, what was made -> text with `{our name}`."""
        self.columns.update(dict.fromkeys(columns))
        for ours, text in origin.items():
            self.made.setdefault(ours, {})[text.format_map(names)] = None
            used = (names[name] for _, name, _, _ in Formatter().parse(text) if name is not None)
            self.used.update(part for theirs in used for part in (theirs, theirs.partition(".")[0]))

    def __str__(self) -> str:
        """`columns: messages <- prompt; responses <- chosen, rejected; not used: id`."""
        told = [f"{ours} <- {' or '.join(texts)}" for ours, texts in self.made.items()]
        unused = [name for name in self.columns if name not in self.used]
        return f"columns: {'; '.join([*told, *([f'not used: {few(unused)}'] if unused else [])])}"


def few(words: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The words, or the first of them and how many more there are."""
    return between.join(words[:most]) + (f"{between}and {len(words) - most} more" if len(words) > most else "")


def refuse_broken_text(value: Any) -> None:
    """Raise `UnfitRowError` for text that is not Unicode, however deep inside."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnfitRowError("text with half a surrogate pair, which is not Unicode") from error


def messages_of(row: Mapping[str, Any]) -> list[Row]:
    """The conversation of a row: `messages`, or a `prompt` that is a list of turns or one user turn."""
    turns = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        raise UnfitRowError("no messages and no prompt")
    return [turn(part) for part in turns]


def question_of(row: Mapping[str, Any]) -> list[Row]:
    """The conversation of a row that the assistant is to answer."""
    messages = messages_of(row)
    if messages[-1]["role"] != "user":
        raise UnfitRowError("the conversation does not end with a turn of the user")
    return messages


def turn(part: Any) -> Row:
    """One turn, nothing but role and content. Raises `UnfitRowError`."""
    role, content = (part.get("role"), part.get("content")) if isinstance(part, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UnfitRowError("a turn without role and content", str(part)[:60])
    if not content.strip():
        raise UnfitRowError(f"an empty turn of the {role}")
    return {"role": role, "content": content}


def is_turns(value: Any) -> bool:
    """Whether it is a list of turns, as conversational data have them, and not of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "role" in part for part in value)


def spoken(value: Any) -> Any:
    """What the assistant said, where it is given as its one turn: `[{"role": "assistant", "content": "Hi."}]`."""
    if is_turns(value) and len(value) == 1 and value[0]["role"] == "assistant":
        return value[0].get("content")
    return value


def identity(messages: Sequence[Mapping[str, str]]) -> str:
    """prompt_id: first 16 hex digits of sha256 over the canonical JSON of the messages."""
    canonical = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return short_hash(canonical)


def short_hash(text: str) -> str:
    """First 16 hex digits of sha256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def reference(answer: Any) -> str | None:
    """The reference answer; of a worked solution with a final `#### 42` or `A: 42` line, what follows the mark."""
    if answer is None or not str(answer).strip():
        return None
    text = str(answer)
    for mark in ("####", "\nA:"):
        if mark in text:
            return text.rpartition(mark)[2].strip() or None
    return text.removeprefix("A:").strip() or None


def as_prompt(row: Mapping[str, Any], grader: str) -> Row:
    """A row of the prompts contract. Raises `UnfitRowError`."""
    messages = question_of(row)
    return {
        "prompt_id": identity(messages), "messages": messages, "answer": reference(row.get("answer")),
        "grader": grader, "source": row["source"],
    }  # fmt: skip


def as_demonstration(row: Mapping[str, Any]) -> Row:
    """A row of the demonstrations contract: messages, or a prompt with a response (or a worked answer).

    The response is a text, or turns that end with the assistant's.
    """
    messages = messages_of(row)
    if messages[-1]["role"] != "assistant":
        reply = row.get("response") if row.get("response") is not None else row.get("answer")
        said = [{"role": "assistant", "content": reply}] if isinstance(reply, str) and reply.strip() else reply
        if not isinstance(said, list) or not is_turns(said) or said[-1]["role"] != "assistant":
            raise UnfitRowError("no turn of the assistant to imitate")
        messages = [*messages, *map(turn, said)]
    return {"prompt_id": identity(messages[:-1]), "messages": messages, "source": row["source"]}


def as_document(row: Mapping[str, Any]) -> Row:
    """A row of the documents contract."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UnfitRowError("no text")
    return {"document_id": short_hash(text), "text": text, "source": row["source"]}
