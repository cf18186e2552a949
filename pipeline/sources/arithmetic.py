"""The built-in world: chains of additions, each written out step by step, some of them wrongly.

    prompt      7+8+3=
    response    7+8=15,15+3=18;18

What follows the last ";" is the answer, so the grader `exact` can judge every response. A policy that imitates
demonstrations of which a share is wrong samples wrong sums about as often, although the right result of a step is
its most probable one: there is something for reinforcement to learn within minutes, on a processor.

The split is by a hash of the prompt's text: no held-out prompt is ever a training prompt, a demonstration or a
document, whatever the seed. Demonstrations, documents and training prompts are drawn independently of each other
from the training part, so a training prompt may have been demonstrated.
"""

import hashlib
from collections.abc import Iterable
from itertools import accumulate
from random import Random
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline.errors import ExperimentError
from pipeline.seeds import derive
from pipeline.settings import Settings

Split = Literal["train", "held_out"]


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
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of all prompts that is kept for evaluation."""


def prompts(world: World, split: Split, count: int) -> list[dict[str, Any]]:
    """Return `count` different prompts of a split as rows: messages, answer, grader, source.

    A smaller count gives the beginning of the same list. Raises `ExperimentError` when the world has fewer prompts.
    """
    return [
        {
            "messages": [_turn("user", _prompt(chain))],
            "answer": str(sum(chain)),
            "grader": "exact",
            "source": f"arithmetic/{split}",
        }
        for chain in _chains(world, split, "prompts", count)
    ]


def demonstrations(world: World, count: int) -> list[dict[str, Any]]:
    """Return `count` answered training prompts, all different, as rows: messages, source.

    With probability `wrong_share` one step, any with equal probability, has a wrong result: uniformly one of the
    numbers from 1 to twice the right result that differ from it. The steps after it are right, given that result, so
    the answer is off by the same amount. Raises `ExperimentError` like `prompts`.
    """
    rng = _stream(world, "mistakes")
    rows = []
    for chain in _chains(world, "train", "demonstrations", count):
        results = _mistaken(chain, rng) if rng.random() < world.wrong_share else _running_sums(chain)
        turns = [_turn("user", _prompt(chain)), _turn("assistant", _written_out(chain, results))]
        rows.append({"messages": turns, "source": "arithmetic/demonstrations"})
    return rows


def documents(world: World, count: int) -> list[dict[str, Any]]:
    """Return `count` different sums, all written out correctly, as rows: text, source.

    They are training prompts with their response. Raises `ExperimentError` like `prompts`.
    """
    return [
        {"text": _prompt(chain) + _written_out(chain, _running_sums(chain)), "source": "arithmetic/documents"}
        for chain in _chains(world, "train", "documents", count)
    ]


def _chains(world: World, split: Split, purpose: str, count: int) -> list[tuple[int, ...]]:
    """The first `count` chains of a split in the order of a random stream, none twice."""
    fewest, most = world.terms
    unseen = {terms: world.largest**terms for terms in range(fewest, most + 1)}
    if sum(unseen.values()) < count:
        raise _too_small(world, split, found=sum(unseen.values()), count=count)
    rng = _stream(world, split, purpose)
    seen: set[tuple[int, ...]] = set()
    chains: list[tuple[int, ...]] = []
    while len(chains) < count:
        possible = [terms for terms, left in unseen.items() if left > 0]
        if not possible:
            raise _too_small(world, split, found=len(chains), count=count)
        chain = tuple(rng.randint(1, world.largest) for _ in range(rng.choice(possible)))
        if chain not in seen:
            seen.add(chain)
            unseen[len(chain)] -= 1
            if _is_held_out(world, chain) == (split == "held_out"):
                chains.append(chain)
    return chains


def _stream(world: World, *purpose: str) -> Random:
    return Random(derive(world.seed, "arithmetic", *purpose))  # noqa: S311  it has to repeat; nothing is secret


def _too_small(world: World, split: Split, *, found: int, count: int) -> ExperimentError:
    return ExperimentError(
        f"asked for {count} different {split} prompts of a world that has at most {found}",
        where=f"terms = {list(world.terms)}, largest = {world.largest}",
        do="ask for fewer, or raise `largest` or `terms`",
    )


def _is_held_out(world: World, chain: tuple[int, ...]) -> bool:
    digest = hashlib.sha256(_prompt(chain).encode()).digest()
    return int.from_bytes(digest[:8], "big") < world.held_out_share * 2**64


def _written_out(chain: tuple[int, ...], results: Iterable[int]) -> str:
    """The steps with the given results, then the last result as the answer."""
    steps, total = [], chain[0]
    for term, result in zip(chain[1:], results, strict=True):
        steps.append(f"{total}+{term}={result}")
        total = result
    return f"{','.join(steps)};{total}"


def _running_sums(chain: tuple[int, ...]) -> list[int]:
    return list(accumulate(chain))[1:]


def _mistaken(chain: tuple[int, ...], rng: Random) -> list[int]:
    """The running sums with a wrong one among them, from which the later ones go on."""
    right = _running_sums(chain)
    place = rng.randrange(len(right))
    wrong = rng.choice([number for number in range(1, 2 * right[place] + 1) if number != right[place]])
    return right[:place] + [result + wrong - right[place] for result in right[place:]]


def _prompt(chain: tuple[int, ...]) -> str:
    return "+".join(map(str, chain)) + "="


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
