"""Equality of numbers and LaTeX expressions, on the math-verify library.

A response is searched at its end only (`REACH` characters). The answer is, in this order, what stands
in the last complete \\boxed{...}; after the last `####`; after the last `answer is`, `Answer:` or `A:`; the whole
response where it is a bare answer; or the last number or formula. A mark with nothing behind it is passed over. Where a
response thinks first, what follows the last `</think>` is searched.

Equality follows the library: 6 decimals for floats; symbolic otherwise; `x=5` is `5`; `50%` is `50` and `0.5`;
`(1,2)` is a pair and an open interval at once; units are dropped. Answers that are words are compared as words,
without regard to case. Nothing here limits time or memory: that is for the process around it (`pool.py`).
"""

import logging
import re
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no alarm of its own

REACH = 8000
"""Characters at the end of a response in which the answer is looked for."""

LONGEST = 500
"""Longest answer in characters; anything longer is not an answer, and a reference that long cannot be read."""

PLAIN_REACH = 1000
"""Characters at the end of a response in which an answer that nothing announces is looked for."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_HASHES = re.compile(r"####")
_ANSWER_WORD = re.compile(r"(?i:\banswer\b[^.:\n]{0,80}?(?:\bis\b|:)(?:\s*:)?)|(?:^|(?<=\s))A:", re.MULTILINE)
_MATHS = r"(?:\$\$((?:\\.|[^$\\])+)\$\$|(?<!\\)\$((?:\\.|[^$\\\n])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])"
_FORMULA = re.compile(_MATHS, re.DOTALL)
_NEXT_FORMULA = re.compile(r"\s*(?:,\s*and\b|,\s*or\b|,|and\b|or\b)\s*" + _MATHS, re.DOTALL)

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?"
_PLAIN_NUMBER = re.compile(rf"(?<![\w.])[-+]?[$€£]?(?=[-+.]?\d){_NUMBER}(?!\d|st\b|nd\b|rd\b|th\b)\s*%?")
_FRACTION = re.compile(r"-?\\[dt]?frac\{[^{}]*\}\{[^{}]*\}")
_PRICE = re.compile(r"\$\d")
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)")
_COMMAND_OR_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{3,}(?![A-Za-z])")
_FUNCTIONS = re.compile(
    r"sin|cos|tan|cot|sec|csc|log|exp|sqrt|min|max|gcd|lcm|mod|arcsin|arccos|arctan|infinity", re.IGNORECASE
)

_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "≤": r"\le ",
        "≥": r"\ge ",
        "\N{UNION}": r"\cup ",
        "€": "",
        "£": "",
        "\u00a0": " ",
        "\u202f": " ",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
    }
)
_REWRITES = [
    (re.compile(r"\\\$|\$"), ""),
    (re.compile(r"(?:\{,\}|,\\!)\s*(?=\d{3})"), ","),
    (re.compile(r"\\[!,;:]"), ""),
    (re.compile(r"_\{(\d+)\}"), r"_\1"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"√\s*(\([^()]*\)|\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"(?<=[\d}\)])\s*,?\s+(?:and|or)\s+(?=[-\d\\(])"), ", "),
]
_WHOLE = [
    (re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf)\s*\{\s*(?:\\(?:text|textbf|mathbf)\{)?([^{}]*?)\s*\}+"), r"\1"),
    (re.compile(r"\(([A-Za-z])\)"), r"\1"),
    (
        re.compile(r"([-+]?[\d.,/ ]*\d)\s*%?\s+(?!pi\b|and\b|or\b|mod\b)[A-Za-z]{2}[A-Za-z .^²³0-9/]*"),
        r"\1",
    ),
    (re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]\+?(-?\d+)"), r"\1\\times 10^{\2}"),
    (re.compile(r"([-+]?\d+) (\d+)/(\d+)"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\{([^{}]*,[^{}]*)\}"), r"\\{\1\\}"),
]
"""What a whole answer may be, and as what it is read: words, (C), 5 cups, 1.5e3, 2 1/2, {1,2}."""
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?")
_SAYS_SOMETHING = re.compile(r"[\w∞∅]")
_BEGINS_WITH_WORD = re.compile(r"[A-Za-z]{2,}\s")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*|[A-Za-z]+(?:[ '-][A-Za-z]+)*[ '-][A-Za-z]{3,}")
_SEVERAL_NUMBERS = re.compile(r"[-+\d., ]*\d [-+]?\d[-+\d., ]*")
_NAMED = re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf)\s*\{([^{}]*)\}")
_BASE = re.compile(r"\w+_\d+")

_AS_LATEX = [LatexExtractionConfig(boxed_match_priority=-1)]


class Reading(NamedTuple):
    """An answer made comparable: its normalized text, and what the library makes of it (None for words)."""

    text: str
    value: Any


class MathGrader:
    """The grader for GSM8K, MATH and the like."""

    risky: ClassVar[bool] = True
    literal: ClassVar[bool] = False

    def extract(self, text: str) -> str | None:
        """Return the answer in a response, as it is written there."""
        tail = text[-REACH:]
        final = tail.rpartition("</think>")[2]
        tail = final if final.strip() else tail
        return _announced(tail) or _bare(tail) or _last_expression(tail)

    def readable(self, reference: str) -> bool:
        """Return whether the reference, a bare answer or a full solution with a marked answer, can be compared with."""
        return _gold(reference) is not None

    def same(self, answer: str, reference: str) -> bool:
        """Return whether the two are equal as mathematics."""
        gold, found = _gold(reference), _read(answer)
        if gold is None or found is None:
            return False
        if gold.text == found.text:
            return True
        if gold.value is None or found.value is None or _bases_differ(gold.text, found.text):
            return False
        try:
            return bool(verify(gold.value, found.value, timeout_seconds=None, raise_on_error=True))
        except MemoryError:
            raise
        except Exception:  # the library's way to say that the two cannot be compared, 1/0 among them
            return False


def _announced(text: str) -> str | None:
    return _boxed(text) or _after(_HASHES, text) or _after(_ANSWER_WORD, text)


def _boxed(text: str) -> str | None:
    for box in reversed(list(_BOX.finditer(text))):
        inside = _braced(text, box.end()) if text[box.end() : box.end() + 1] == "{" else _token(text, box.end())
        if inside and (answer := _short(inside)):
            return answer
    return None


def _braced(text: str, start: int) -> str | None:
    """Return what stands between the brace at `start` and its partner; None when the partner is missing."""
    depth = 0
    position = start
    end = min(len(text), start + LONGEST + 2)
    while position < end:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return None


def _token(text: str, start: int) -> str | None:
    word = re.compile(r"[^\s${}\\,;]+").match(text, start)
    return word[0].rstrip(".") if word else None


def _after(mark: re.Pattern[str], text: str) -> str | None:
    for found in reversed(list(mark.finditer(text))):
        if answer := _short(_stated(text[found.end() :])):
            return answer
    return None


def _stated(rest: str) -> str:
    """Return the answer at the beginning of what follows a mark: its formula, its number, or its first sentence."""
    rest = rest[: 2 * LONGEST].lstrip(" \t\n\r*:_")
    sentence = _SENTENCE_END.split(rest.split("\n")[0], maxsplit=1)[0]
    formula = _FORMULA.search(rest)
    if formula and formula.start() <= len(sentence) and not _is_prose(_inside(formula)):
        return _with_next(formula, rest)
    sentence = sentence.strip(" \t*_\"'`")
    if _is_prose(sentence):
        numbers = list(_PLAIN_NUMBER.finditer(sentence))
        if numbers:
            return numbers[0][0] if numbers[0].start() == 0 else numbers[-1][0]
    return sentence


def _with_next(formula: re.Match[str], text: str) -> str:
    """Join formulas that are listed: `$1$, $2$ and $3$`."""
    parts = [_inside(formula)]
    end = formula.end()
    while following := _NEXT_FORMULA.match(text, end):
        parts.append(_inside(following))
        end = following.end()
    return ", ".join(parts)


def _inside(formula: re.Match[str]) -> str:
    return next(part for part in formula.groups() if part is not None).strip()


def _bare(text: str) -> str | None:
    """Return a response that is nothing but an answer; None for sentences and for chains of equations."""
    text = text.strip()
    marked = _BOX.search(text) or _HASHES.search(text) or _ANSWER_WORD.search(text)
    spoken = "\n" in text or text.count("=") > 1 or _BEGINS_WITH_WORD.match(text) or _is_prose(text)
    if marked or spoken or _read(text) is None:
        return None
    return _short(text)


def _is_prose(text: str) -> bool:
    """Whether a text is more than a formula or a name: a word of a language beside anything else."""
    bare = _COMMAND_OR_TEXT.sub(" ", text)
    words = [word for word in _WORD.findall(bare) if not _FUNCTIONS.fullmatch(word)]
    return bool(words) and words[0] != text.strip()


def _last_expression(text: str) -> str | None:
    """Return the last formula, fraction or number.

    The library's own search took 38 ms on 1000 characters of LaTeX prose, seventy times as long.
    """
    boxes = list(_BOX.finditer(text))
    if boxes and text.startswith("{", boxes[-1].end()) and _braced(text, boxes[-1].end()) is None:
        text = text[: boxes[-1].start()]  # what was cut off inside its box may be half a number
    window = text[-PLAIN_REACH:]
    if len(text) > PLAIN_REACH:
        window = window.partition("\n")[2] or window  # it may begin inside a formula
    if window.count("$") == len(_PRICE.findall(window)):
        window = window.replace("$", "")  # every one is a currency, none a delimiter
    ends = {number.end(): number[0] for number in _PLAIN_NUMBER.finditer(window)}
    ends |= {fraction.end(): fraction[0] for fraction in _FRACTION.finditer(window)}
    formulas = ((found.end(), _inside(found)) for found in _FORMULA.finditer(window))
    ends |= {end: formula for end, formula in formulas if not _is_prose(formula)}
    return _short(ends[max(ends)]) if ends else None


def _short(answer: str) -> str | None:
    answer = answer.strip()
    return answer if _SAYS_SOMETHING.search(answer) and len(answer) <= LONGEST else None


@lru_cache(maxsize=4096)
def _gold(reference: str) -> Reading | None:
    return _read(_announced(reference[-REACH:]) or reference)


@lru_cache(maxsize=4096)
def _read(answer: str) -> Reading | None:
    """Return an answer made comparable; None when it is neither mathematics nor words."""
    if len(answer) > LONGEST:
        return None
    text = _normalize(answer)
    if not text:
        return None
    if _WORDS.fullmatch(text) or _SEVERAL_NUMBERS.fullmatch(text):
        return Reading(text.casefold(), None)
    values = parse(
        f"${text}$", _AS_LATEX, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    return Reading(_NAMED.sub(r"\1", text).replace(" ", ""), values[0]) if values else None


def _normalize(answer: str) -> str:
    """Return the answer as LaTeX without delimiters, currency, spelled units, and spellings of one number."""
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", answer.strip()).translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;").strip()
    for pattern, template in _WHOLE:
        if whole := pattern.fullmatch(text):
            text = whole.expand(template)
    return re.sub("[ ,]", "", text) if _THOUSANDS.fullmatch(text) else text


def _bases_differ(one: str, other: str) -> bool:
    """Whether both are numerals with a base written below, and not the same: the library ignores the base."""
    return bool(_BASE.fullmatch(one) and _BASE.fullmatch(other)) and one != other
