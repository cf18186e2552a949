"""The annotators' page: one HTML file that holds the questions, needs no network and saves what people rank.

The template `page.html` is the whole program. The questions stand in it as JSON, in a form that no text can break out
of. A policy in the page itself lets nothing run but its own script, and nothing go out.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pipeline.annotating.sheets import Question, people, responses

PAGE_FILE = "annotate.html"

_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_UNSAFE = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def write_page(path: Path, questions: Sequence[Question], overlap: int) -> None:
    """Write the page for these questions; `overlap` is how many people rank each."""
    path.write_text(page(questions, overlap), encoding="utf-8", newline="\n")


def page(questions: Sequence[Question], overlap: int) -> str:
    """The page as text. Its `digest` names the questions: what people rank is kept in their browser under it."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    about = {
        "overlap": overlap, "annotators": people(questions),
        "questions": [
            {
                "question_id": question["question_id"], "annotators": question["annotators"],
                "messages": [{"role": turn["role"], "content": turn["content"]} for turn in question["messages"]],
                "responses": responses(question),
            }
            for question in questions
        ],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    data = json.dumps({"digest": digest, **about}, ensure_ascii=False, separators=(",", ":")).translate(_UNSAFE)
    return template.replace("{{policy}}", _policy(template)).replace("{{data}}", data)


def _policy(template: str) -> str:
    """What the page may do: use this style and run this script, known by their hashes. Everything else is refused."""
    style, script = (_hash(part.findall(template)) for part in (_STYLE, _SCRIPT))
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(parts: list[str]) -> str:
    (text,) = parts
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
