"""The built-in world: chains of additions, each written out step by step, some of them wrongly.

    prompt      7+8+3=
    response    7+8=15,15+3=18;18
    document    7+8=3,3+5=8,8+9=5,5+2=7
    riddle      7+8+?=          answered 7+8=15,15+4=19;19
    idle        7+8+3=          answered 7+8=15,15+0=15,15+0=15,15+3=18;18

What follows the last ";" is the answer, so the grader `exact` can judge every response. A policy that imitates
demonstrations of which a share is wrong samples wrong sums about as often, although the right result of a step is
its most probable one: there is something for reinforcement to learn within minutes, on a processor.

A riddle hides a term whose value follows from nothing that is shown: it can be guessed, and learned by heart. An idle
step adds 0, which no prompt asks for: it is right, and makes a response longer and less probable for nothing.

Documents are the pretraining text: sums on the clock, where 12 is followed by 1. They are another ability in the same
characters, and near enough to be forgotten by a policy that is reinforced for ordinary sums and does not read on.

The splits are by a hash of the text: no held-out prompt is ever a training prompt or a demonstration, and no held-out
document a training document, whatever the seed. Demonstrations and training prompts are drawn independently of each
other from the training part, so a training prompt may have been demonstrated.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline.errors import ExperimentError
from pipeline.seeds import derive
from pipeline.settings import Settings

Split = Literal["train", "held_out"]

CLOCK_SUMS = 4
"""Of a document."""
TRIES = 100
"""Draws per document that is asked for, before the world is called too small."""
HIDDEN = "?"
"""Stands for the term of a riddle that is not told."""


def _is_range(terms: tuple[int, int]) -> tuple[int, int]:
    if not 2 <= terms[0] <= terms[1]:
        raise ValueError("write [fewest, most] with 2 <= fewest <= most")
    return terms


class World(Settings):
    """How hard the sums are, and how unreliable the demonstrations."""

    seed: int = 0
    """Of everything drawn; the split does not depend on it."""
    terms: Annotated[tuple[int, int], AfterValidator(_is_range)] = (3, 5)
    """Fewest and most terms of a sum; each number of terms is equally likely while any such sum is left."""
    largest: Annotated[int, Field(ge=1)] = 9
    """Terms are drawn uniformly from 1 to this."""
    wrong_share: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Share of the demonstrations with one wrong step, whose result is carried on to a wrong answer."""
    lost_carries: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability with which a step of the other demonstrations that carries loses its carry: an error that everybody
    makes alike, so that a majority makes it too where a sum has several carries."""
    verbose_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the demonstrations that write every step down `repeats` times: as right, and longer for nothing."""
    repeats: Annotated[int, Field(ge=2)] = 3
    """How often a verbose demonstration writes each step."""
    unknown_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the prompts, while any such are left, that write one term, not the first, as `?`: what it is depends on
    the prompt's text alone, the same for every seed. Demonstrations guess it."""
    idle: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which a demonstration adds 0 before a step, and again after each time that it did."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of all prompts that is kept for evaluation."""


def prompts(world: World, split: Split, count: int) -> list[dict[str, Any]]:
    """Return `count` different prompts of a split as rows: messages, answer, grader, source.

    A smaller count gives the beginning of the same list. Raises `ExperimentError` when the world has fewer prompts.
    """
    return [
        {
            "messages": [_turn("user", asked.prompt)],
            "answer": str(sum(asked.terms)),
            "grader": "exact",
            "source": f"arithmetic/{split}",
        }
        for asked in _sums(world, split, "prompts", count)
    ]


def demonstrations(world: World, count: int) -> list[dict[str, Any]]:
    """Return `count` answered training prompts, all different, as rows: messages, source.

    With probability `wrong_share` one step, any with equal probability, has a wrong result: uniformly one of the
    numbers from 1 to twice the right result that differ from it. The steps after it are right, given that result, so
    the answer is off by the same amount. In the others each step that carries is 10 too small with probability
    `lost_carries`, and goes on from there. With probability `verbose_share`, whatever is right, every step is repeated:
    `7+8=15,7+8=15,15+3=18,15+3=18;18`. A hidden term is guessed, uniformly, and the steps go on from the guess: what it
    is never shows. Before each step 0 is added as often as `idle` says, to whatever the result is so far. Raises
    `ExperimentError` like `prompts`.
    """
    rng, style, carries, guesses, idle = (
        _stream(world, purpose) for purpose in ("mistakes", "style", "carries", "guesses", "idle")
    )
    rows = []
    for asked in _sums(world, "train", "demonstrations", count):
        terms = _guessed(world, asked, guesses)
        mistaken = rng.random() < world.wrong_share
        results = _mistaken(terms, rng) if mistaken else _forgetful(terms, world.lost_carries, carries)
        times = world.repeats if style.random() < world.verbose_share else 1
        idled = [_in_a_row(world.idle, idle) for _ in results]
        turns = [_turn("user", asked.prompt), _turn("assistant", _written_out(terms, results, times, idled))]
        rows.append({"messages": turns, "source": "arithmetic/demonstrations"})
    return rows


def documents(world: World, split: Split, count: int) -> list[dict[str, Any]]:
    """Return `count` different documents of a split as rows: text, source.

    A document is a chain of `CLOCK_SUMS` sums on the clock, each going on from the result before; terms are drawn as
    those of the prompts, at most 9. Raises `ExperimentError` where the world has too few.
    """
    rng = _stream(world, split, "documents")
    texts: dict[str, None] = {}
    for _ in range(TRIES * count):
        text = _on_the_clock([rng.randint(1, min(world.largest, 9)) for _ in range(CLOCK_SUMS + 1)])
        if _is_held_out(world, text) == (split == "held_out"):
            texts[text] = None
        if len(texts) == count:
            return [{"text": text, "source": f"arithmetic/documents/{split}"} for text in texts]
    raise _too_small(world, f"{split} documents", found=len(texts), count=count)


def _on_the_clock(terms: list[int]) -> str:
    """`7+8=3,3+5=8` of 7, 8, 5."""
    hours = list(accumulate(terms, lambda hour, term: (hour + term - 1) % 12 + 1))
    return ",".join(f"{hour}+{term}={now}" for hour, term, now in zip(hours, terms[1:], hours[1:], strict=False))


@dataclass(frozen=True)
class _Sum:
    """What a prompt asks for."""

    prompt: str
    terms: tuple[int, ...]
    hidden: int | None = None
    """Place of the term that the prompt does not tell."""


def _sums(world: World, split: Split, purpose: str, count: int) -> list[_Sum]:
    """The first `count` sums of a split in the order of a random stream, no prompt twice."""
    fewest, most = world.terms
    unseen = {terms: _possible(world, terms) for terms in range(fewest, most + 1)}
    if sum(unseen.values()) < count:
        raise _too_small(world, f"{split} prompts", found=sum(unseen.values()), count=count)
    rng, riddles = _stream(world, split, purpose), _stream(world, split, purpose, "riddles")
    seen: set[str] = set()
    sums: list[_Sum] = []
    while len(sums) < count:
        possible = [terms for terms, left in unseen.items() if left > 0]
        if not possible:
            raise _too_small(world, f"{split} prompts", found=len(sums), count=count)
        terms = tuple(rng.randint(1, world.largest) for _ in range(rng.choice(possible)))
        asked = _riddle(world, terms, riddles) if riddles.random() < world.unknown_share else _Sum(_text(terms), terms)
        if asked.prompt not in seen:
            seen.add(asked.prompt)
            unseen[len(terms)] -= 1
            if _is_held_out(world, asked.prompt) == (split == "held_out"):
                sums.append(asked)
    return sums


def _possible(world: World, terms: int) -> int:
    """How many prompts have so many terms."""
    plain = world.largest**terms if world.unknown_share < 1 else 0
    riddles = (terms - 1) * world.largest ** (terms - 1) if world.unknown_share > 0 else 0
    return plain + riddles


def _riddle(world: World, terms: tuple[int, ...], rng: Random) -> _Sum:
    """The sum with one of its terms hidden, in whose place is what the prompt's text stands for."""
    hidden = rng.randrange(1, len(terms))
    prompt = _text([*terms[:hidden], HIDDEN, *terms[hidden + 1 :]])
    digest = hashlib.sha256(f"unknown:{prompt}".encode()).hexdigest()
    return _Sum(prompt, _put(terms, hidden, 1 + int(digest[:8], 16) % world.largest), hidden)


def _guessed(world: World, asked: _Sum, rng: Random) -> tuple[int, ...]:
    """The terms as one knows them who was not told the hidden one."""
    return asked.terms if asked.hidden is None else _put(asked.terms, asked.hidden, rng.randint(1, world.largest))


def _put(terms: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    """The terms with another value at a place."""
    return (*terms[:place], value, *terms[place + 1 :])


def _stream(world: World, *purpose: str) -> Random:
    return Random(derive(world.seed, "arithmetic", *purpose))  # noqa: S311  it has to repeat; nothing is secret


def _too_small(world: World, what: str, *, found: int, count: int) -> ExperimentError:
    return ExperimentError(
        f"asked for {count} different {what} of a world that has at most {found}",
        where=f"terms = {list(world.terms)}, largest = {world.largest}",
        do="ask for fewer, or raise `largest` or `terms`",
    )


def _is_held_out(world: World, text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < world.held_out_share * 2**64


def _written_out(chain: tuple[int, ...], results: Iterable[int], times: int, idled: Iterable[int]) -> str:
    """The steps with the given results, each so many times and after so many idle ones, then the answer."""
    steps, total = [], chain[0]
    for term, result, idle in zip(chain[1:], results, idled, strict=True):
        steps += [f"{total}+0={total}"] * idle + [f"{total}+{term}={result}"] * times
        total = result
    return f"{','.join(steps)};{total}"


def _in_a_row(probability: float, rng: Random) -> int:
    """How often something of this probability happens until it does not."""
    times = 0
    while rng.random() < probability:
        times += 1
    return times


def _running_sums(chain: tuple[int, ...]) -> list[int]:
    return list(accumulate(chain))[1:]


def _mistaken(chain: tuple[int, ...], rng: Random) -> list[int]:
    """The running sums with a wrong one among them, from which the later ones go on."""
    right = _running_sums(chain)
    place = rng.randrange(len(right))
    wrong = rng.choice([number for number in range(1, 2 * right[place] + 1) if number != right[place]])
    return right[:place] + [result + wrong - right[place] for result in right[place:]]


def _forgetful(chain: tuple[int, ...], lost: float, rng: Random) -> list[int]:
    """The running sums, each step that carries a ten 10 too small with probability `lost`."""
    results, total = [], chain[0]
    for term in chain[1:]:
        carried = total % 10 + term % 10 >= 10
        total += term - (10 if carried and rng.random() < lost else 0)
        results.append(total)
    return results


def _text(terms: Iterable[int | str]) -> str:
    return "+".join(map(str, terms)) + "="


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
