"""A row as it is in the wild to a row of a contract, or the reason why it cannot be one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


class UnfitRowError(Exception):
    """A row that cannot be what is asked for; the text says why."""


def messages_of(row: Mapping[str, Any]) -> list[Row]:
    """The conversation of a row: `messages`, or a `prompt` that is a list of turns or one user turn."""
    turns = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        raise UnfitRowError("no messages and no prompt")
    return [_turn(turn) for turn in turns]


def question_of(row: Mapping[str, Any]) -> list[Row]:
    """The conversation of a row that the assistant is to answer."""
    messages = messages_of(row)
    if messages[-1]["role"] != "user":
        raise UnfitRowError("the conversation does not end with a turn of the user")
    return messages


def _turn(turn: Any) -> Row:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UnfitRowError(f"a turn without role and content: {str(turn)[:60]}")
    if not content.strip():
        raise UnfitRowError(f"an empty turn of the {role}")
    return {"role": role, "content": content}


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
    """A row of the demonstrations contract: messages, or a prompt with a response (or a worked answer)."""
    messages = messages_of(row)
    if messages[-1]["role"] != "assistant":
        reply = row.get("response") if row.get("response") is not None else row.get("answer")
        if not isinstance(reply, str) or not reply.strip():
            raise UnfitRowError("no turn of the assistant to imitate")
        messages = [*messages, {"role": "assistant", "content": reply}]
    return {"prompt_id": identity(messages[:-1]), "messages": messages, "source": row["source"]}


def as_document(row: Mapping[str, Any]) -> Row:
    """A row of the documents contract."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UnfitRowError("no text")
    return {"document_id": short_hash(text), "text": text, "source": row["source"]}


def as_ranking(row: Mapping[str, Any]) -> Row:
    """A row of the rankings contract: chosen and rejected, or responses with ranks."""
    messages = question_of(row)
    responses, ranks = row.get("response"), row.get("ranks")
    if row.get("chosen") is not None:
        responses, ranks = [row["chosen"], row.get("rejected")], [0, 1]
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(responses) != len(ranks):
        raise UnfitRowError("neither chosen and rejected, nor as many ranks as responses")
    if len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        raise UnfitRowError("fewer than two responses of text")
    if not all(isinstance(rank, int) and abs(rank) < 128 for rank in ranks):
        raise UnfitRowError(f"ranks that are not small whole numbers: {str(ranks)[:60]}")
    annotator = None if row.get("annotator") is None else str(row["annotator"])
    prompt_id = identity(messages)
    return {
        "ranking_id": short_hash(f"{prompt_id}{annotator}{responses}"), "prompt_id": prompt_id, "messages": messages,
        "responses": responses, "ranks": ranks, "annotator": annotator, "source": row["source"],
    }  # fmt: skip
