"""How far annotators agree who put the same responses in order.

Of two responses i and j, annotator a says s_a(i, j) = sign(rank_a(j) - rank_a(i)): 1 where i is better, -1 where j is,
0 for a tie. Over all questions, pairs of annotators a, b who ranked the question, and pairs of responses i < j:

    pairwise = share with s_a = s_b                                both tie: agreed; one ties: not agreed
    untied   = share with s_a = s_b of those with s_a s_b != 0     nobody ties

Every comparison weighs the same, so a question with more responses weighs more. Two annotators who throw dice and
never tie agree on half of the pairs. InstructGPT reports 72.6 +- 1.5 % between its annotators (arXiv:2203.02155,
section 3.4). Kendall's tau-b is averaged over (question, pair of annotators); it is undefined where one of the two
ties everything.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Ranks = Sequence[int]
"""Of the responses to one question, the smallest for the best."""
Rankings = Mapping[str, Mapping[str, Ranks]]
"""Question -> annotator -> ranks; those of one question are equally long."""


@dataclass(frozen=True)
class Agreement:
    """What two or more annotators say of the same responses."""

    questions: int
    """Ranked by two annotators or more."""
    comparisons: int
    """Pairs of responses, for each pair of annotators."""
    agreed: int
    untied_comparisons: int
    """Those in which nobody ties."""
    untied_agreed: int
    taus: tuple[float, ...]
    """Kendall's tau-b of each question and pair of annotators for which it is defined."""

    @property
    def pairwise(self) -> float | None:
        """Share of the comparisons in which both say the same; None where nothing was compared."""
        return self.agreed / self.comparisons if self.comparisons else None

    @property
    def untied(self) -> float | None:
        """The same share of the comparisons in which nobody ties; None where there are none."""
        return self.untied_agreed / self.untied_comparisons if self.untied_comparisons else None

    @property
    def kendall_tau(self) -> float | None:
        """Mean of tau-b; None where it is defined nowhere."""
        return float(np.mean(self.taus)) if self.taus else None


def measure(rankings: Rankings) -> tuple[Agreement, dict[tuple[str, str], Agreement]]:
    """Over all pairs of annotators; and of each two who share a question, names and pairs in alphabetical order."""
    found: defaultdict[tuple[str, str], list[tuple[Ranks, Ranks]]] = defaultdict(list)
    for by in rankings.values():
        for one, other in combinations(sorted(by), 2):
            found[one, other].append((by[one], by[other]))
    by_pair = {names: _agreement(found[names]) for names in sorted(found)}
    return _together(list(by_pair.values()), sum(len(by) > 1 for by in rankings.values())), by_pair


def _together(parts: Sequence[Agreement], questions: int) -> Agreement:
    return Agreement(
        questions, sum(one.comparisons for one in parts), sum(one.agreed for one in parts),
        sum(one.untied_comparisons for one in parts), sum(one.untied_agreed for one in parts),
        tuple(tau for one in parts for tau in one.taus),
    )  # fmt: skip


def _agreement(pairs: Sequence[tuple[Ranks, Ranks]]) -> Agreement:
    one = np.concatenate([_signs(ranks) for ranks, _ in pairs])
    other = np.concatenate([_signs(ranks) for _, ranks in pairs])
    untied = (one != 0) & (other != 0)
    taus = (_tau(*pair) for pair in pairs)
    return Agreement(
        len(pairs), len(one), int(np.sum(one == other)), int(untied.sum()), int(np.sum(one[untied] == other[untied])),
        tuple(tau for tau in taus if tau is not None),
    )  # fmt: skip


def _signs(ranks: Ranks) -> np.ndarray:
    """s(i, j) of all i < j."""
    values = np.asarray(ranks)
    first, second = np.triu_indices(len(values), 1)
    return np.asarray(np.sign(values[second] - values[first]))


def _tau(one: Ranks, other: Ranks) -> float | None:
    from scipy.stats import kendalltau

    if len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(kendalltau(one, other).statistic)
