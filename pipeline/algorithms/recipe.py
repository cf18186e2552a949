"""A recipe: an algorithm as plain data. It names pieces and imports none, so that any stage may read one.

What changes with scale (models, data, batch sizes, learning rates, lengths) is not in a recipe but in the experiment.
"""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.algorithms.shelf import Line
from pipeline.errors import RecipeError
from pipeline.settings import Settings, explain, read_toml

DIVERGENCES = ("kl_penalty", "kl")
"""Pieces whose `coef` weighs the divergence from the reference."""


class Rollout(Settings):
    """How responses are sampled."""

    group_size: int = Field(ge=1)
    """Responses per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits when sampling, and in every log-probability computed later."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability; 1 is all."""
    top_k: int | None = Field(None, ge=1)
    """Sample from so many of the likeliest tokens; absent is all."""
    greedy: bool = False
    """Add the greedy response to every group, as sample -1."""
    rounds: int = Field(1, ge=1)
    """Sampling attempts per iteration while filters keep fewer groups than wanted."""


class LossLine(Line):
    """A line of the loss: a piece, its weight in the sum, and the rows it applies to."""

    coef: float = 1.0
    """The term is multiplied by it."""
    on: Literal["all", "correct", "finished"] = "all"
    """Rows whose tokens count, in the loss and in the denominator of its mean; `finished` masks cut responses."""


class Update(Settings):
    """How the losses of tokens become optimizer steps."""

    weights: Literal["token_mean", "group_token_mean", "sequence_mean", "sequence_sum"]
    """What a token counts in the loss of an optimizer step."""
    epochs: int = Field(1, ge=1)
    """Passes over the iteration's rows."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    temperature: float | None = Field(None, gt=0)
    """Divides the logits of every log-probability that is computed; that of the sampling when absent."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a running average of the weights, kept beside them; none when absent."""

    @property
    def steps(self) -> int:
        """Optimizer steps per iteration. With one, the policy is the one that sampled whenever it reads a response."""
        return self.epochs * self.minibatches


class Sft(Settings):
    """How the policy that the loop starts from differs from the experiment's ordinary SFT."""

    epochs: int | None = Field(None, ge=1)
    """Passes over the demonstrations; the experiment's when absent."""
    documents_share: float = Field(0.0, ge=0, lt=1)
    """Share of the examples that are documents rather than demonstrations."""


class Mix(Settings):
    """Documents in every optimizer step, against forgetting."""

    coef: float = Field(gt=0)
    """Their mean negative log-likelihood is multiplied by it."""
    per_response: float = Field(gt=0)
    """Documents per response of the step."""


class Critic(Settings):
    """The model that predicts returns."""

    start: Literal["policy", "reward_model"]
    """Whose weights it starts from, with a new head on those of a policy."""
    loss: Line
    """A line of the loss shelf that reads `returns`."""
    pretrain_steps: int = Field(0, ge=0)
    """Most optimizer steps on Monte-Carlo returns of the first policy before the loop; 0: none."""


class KlController(Settings):
    """Adapts the coefficient of every divergence in reward and loss after each iteration.

        coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)

    KL is the mean over responses of the summed log(pi_old / pi_ref): lm-human-preferences cbfd210b (Ziegler et al.,
    arXiv:1909.08593, section 2.2).
    """

    target: float = Field(gt=0)
    """Wanted divergence per response, in nat."""
    horizon: float = Field(10_000, gt=0)
    """Responses after which an error of 20 % has moved the coefficient by 20 %."""

    def next(self, scale: float, divergence: float, responses: int) -> float:
        """What to multiply coefficients with after an iteration with `scale` that measured `divergence` nat."""
        error = min(max(divergence / self.target - 1, -0.2), 0.2)
        return scale * (1 + error * responses / self.horizon)


class Recipe(Settings):
    """An algorithm."""

    name: str
    """What experiments call it."""
    paper: str
    """Where it comes from."""
    idea: str
    """What it is, in about six words."""
    reference: str = ""
    """The implementation that is followed where the paper leaves something open."""
    differs: dict[str, str] = Field(default_factory=dict)
    """System -> in which way it computes something else."""
    sft: Sft | None = None
    """A fine-tuning of its own for the policy that the loop starts from."""
    rollout: Rollout
    """How responses are sampled."""
    label: Line
    """How a response gets its reward."""
    filter: tuple[Line, ...] = ()
    """Which rows train; a row must pass all."""
    shape: tuple[Line, ...] = ()
    """What is added to the reward of each token, in this order."""
    advantage: Line
    """How rewards become credit per token."""
    normalize: Line | None = None
    """How credit is scaled."""
    importance: Line | None = None
    """Weights against the mismatch between the engine that sampled and the stack that trains."""
    kl_controller: KlController | None = None
    """Adapts the coefficients of the divergence; they are fixed when absent."""
    loss: tuple[LossLine, ...] = Field(min_length=1)
    """The terms of the loss, summed."""
    mix: Mix | None = None
    """Documents in every optimizer step."""
    critic: Critic | None = None
    """The model that predicts returns; none when absent."""
    update: Update
    """How the losses become optimizer steps."""

    @property
    def temperature(self) -> float:
        """Divides the logits of every log-probability that is computed."""
        return self.update.temperature or self.rollout.temperature

    def with_divergence_scaled(self, scale: float) -> "Recipe":
        """Return the recipe with `coef` of every divergence, in reward and in loss, multiplied by `scale`."""

        def scaled(line: Any) -> Any:
            return line.model_copy(update={"coef": line.coef * scale}) if line.kind in DIVERGENCES else line

        return self.model_copy(update={"shape": tuple(map(scaled, self.shape)), "loss": tuple(map(scaled, self.loss))})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The recipes that come with the project, in alphabetical order."""
        files = resources.files(__package__).joinpath("recipes").iterdir()
        return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Recipe":
        """Read a recipe by its name, or from a TOML file: a path has a separator or ends in `.toml`.

        Raises `RecipeError` for an unknown name (lists the known ones) or a recipe that does not fit the form, and
        `ExperimentError` for a file that is missing or not TOML.
        """
        path = Path(name_or_path)
        if len(path.parts) > 1 or path.suffix == ".toml":
            return cls.read(read_toml(path), where=str(path))
        name = str(name_or_path)
        if name not in cls.names():
            close = get_close_matches(name, cls.names(), n=1)
            raise RecipeError(
                f"no recipe is called {name!r}; there are: {', '.join(cls.names())}",
                do=f"did you mean {close[0]!r}?" if close else "name one of them, or the path of a TOML file",
            )
        text = resources.files(__package__).joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
        return cls.read(tomllib.loads(text), where=f"recipe {name}")

    @classmethod
    def read(cls, tables: Mapping[str, Any], where: str = "") -> "Recipe":
        """Make a recipe from tables. Raises `RecipeError` naming each field that does not fit."""
        try:
            return cls.model_validate(dict(tables))
        except ValidationError as error:
            raise RecipeError(explain(error), where, "compare with one of `rlhf recipes`") from error

    def changed(self, tables: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with deviations applied.

        A table without `kind` changes the named fields and keeps the others; a line with a `kind` stands as written;
        a list replaces the list; `false` takes an optional line out. Applying the same changes again changes nothing.
        Raises `RecipeError` as `read` does.
        """
        return self.read(_merged(self.model_dump(mode="json"), tables), where=f"changes to recipe {self.name}")


def _merged(old: Any, new: Any) -> Any:
    if new is False and (old is None or isinstance(old, dict)):
        return None
    if not isinstance(old, dict) or not isinstance(new, Mapping) or "kind" in new:
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
