"""What the charts of the page show: for each curve the metrics that it is drawn from, and why it may not be there."""

from dataclasses import dataclass

Source = tuple[str, str, str]
"""Phase, kind, name of a metric."""


@dataclass(frozen=True)
class Curve:
    """What a chart shows."""

    name: str
    unit: str
    doc: str
    line: tuple[Source, ...]
    """The first of these that is there."""
    dotted: tuple[Source, ...] = ()
    """A second number, drawn thin and dotted; the first that is there."""
    held_out: Source | None = None
    """What evaluations measured."""
    from_zero: bool = False
    """Whether the axis begins at 0: of shares that should be small."""
    lack: str = ""
    """Why it may not be there; a curve without it is not missed."""


def _loop(*names: str) -> tuple[Source, ...]:
    """`kind:name` of the loop."""
    return tuple(("loop", *name.split(":")) for name in names)  # type: ignore[misc]


def _evaluated(name: str) -> Source:
    return ("evaluation", "labels", name)


_GRADED = "nothing says what is right and wrong"
_NO_EVALUATION = "no evaluation yet, or none planned (data.held_out)"
_NO_CRITIC = "the recipe has no critic"
_NO_RATIO = "the recipe's loss clips no ratio, or takes one step, whose ratio is 1"

CURVES = (
    Curve("reward", "reward", "Mean over all responses, before shaping; dotted: after shaping, of those that train.",
          _loop("labels:reward/mean"), _loop("advantages:reward/shaped_mean"), lack="no labels yet"),
    Curve("held-out accuracy", "share of responses",
          "Right by the reference, on prompts that nothing is trained on, with its 95 % interval over prompts; "
          "dotted: on the prompts of training.",
          (), _loop("labels:accuracy/mean"), _evaluated("accuracy/mean"), lack=_NO_EVALUATION),
    Curve("pass@k", "share of prompts", "Any response of the group is right; points: held-out prompts, "
          "dotted: prompts of training.", (), _loop("labels:accuracy/pass_at_k"),
          _evaluated("accuracy/pass_at_k"), lack=_GRADED),
    Curve("maj@k", "share of prompts", "The most frequent answer of the group is right; points: held-out prompts, "
          "dotted: prompts of training.", (), _loop("labels:accuracy/majority_at_k"),
          _evaluated("accuracy/majority_at_k"), lack=_GRADED),
    Curve("KL to reference", "nat per token", "How far the policy has gone from the frozen reference.",
          _loop("scores:kl/reference", "policy:kl/reference"), lack="the recipe reads no reference"),
    Curve("KL of the update", "nat per token", "How far an iteration moves the policy from the one that sampled.",
          _loop("policy:kl/old"), lack="one step an iteration, or nothing compares with the policy that sampled"),
    Curve("KL engine/trainer", "nat per token", "Sampler less trainer on the same tokens: 0 if they compute the same; "
          "dotted: mean of the absolute difference.",
          _loop("scores:kl/sampler", "policy:kl/sampler"), _loop("scores:kl/sampler_abs", "policy:kl/sampler_abs"),
          lack="the engine told no log-probabilities, or none were read again"),
    Curve("entropy", "nat per token", "Of the policy while it is trained.", _loop("policy:entropy/mean"),
          lack="no update yet"),
    Curve("length", "tokens", "Mean of the responses; dotted: the longest.", _loop("rollouts:length/mean"),
          _loop("rollouts:length/max"), lack="no rollouts yet"),
    Curve("truncation", "share of responses", "Cut at the length limit.", _loop("rollouts:length/cut"),
          from_zero=True, lack="no rollouts yet"),
    Curve("clip share, low", "share of tokens", "Ratio below 1 - clip_low where the advantage is negative.",
          _loop("policy:clip/low"), from_zero=True, lack=_NO_RATIO),
    Curve("clip share, high", "share of tokens", "Ratio above 1 + clip_high where the advantage is positive.",
          _loop("policy:clip/high"), from_zero=True, lack=_NO_RATIO),
    Curve("zero-signal share", "share of groups", "Groups whose rewards are all equal, of all that were sampled; "
          "dotted: groups without advantage, of those that train.",
          _loop("labels:reward/zero_spread_groups"), _loop("advantages:reward/zero_signal_groups"), from_zero=True,
          lack="no labels yet"),
    Curve("explained variance", "share of variance",
          "Of the returns by the critic, before it learns from them; dotted: after.",
          _loop("advantages:value/explained_variance"), _loop("critic:value/explained_variance"), lack=_NO_CRITIC),
    Curve("gradient norm, policy", "norm", "Before clipping, mean over the optimizer's steps.",
          _loop("policy:grad/norm"), lack="no update yet"),
    Curve("gradient norm, critic", "norm", "Before clipping, mean over the optimizer's steps.",
          _loop("critic:grad/norm"), lack=_NO_CRITIC),
    Curve("learning rate", "per step", "Of the policy; dotted: of the critic.", _loop("policy:learning_rate"),
          _loop("critic:learning_rate"), lack="no update yet"),
    Curve("speed of sampling", "tokens/s", "Response tokens over the seconds of the engine.",
          _loop("rollouts:speed/tokens_per_second"), lack="the engine measured none"),
    Curve("speed of training", "tokens/s", "Of the policy; dotted: of the critic.",
          _loop("policy:speed/tokens_per_second"), _loop("critic:speed/tokens_per_second"), lack="no update yet"),
    Curve("reward model's score", "reward", "Mean over the responses that were judged.",
          _loop("judgements:reward_scores/mean", "scores:reward_scores/mean")),
    Curve("vote entropy", "nat", "Of the answers of a group that vote.", _loop("labels:vote/entropy")),
    Curve("right majorities", "share of groups", "Groups whose majority answer is right by the reference.",
          _loop("labels:vote/label_accuracy")),
    Curve("duplicates", "share of responses", "Equal to another response of their group.",
          _loop("rollouts:duplicates/in_group")),
)  # fmt: skip
"""In the order of the page."""
