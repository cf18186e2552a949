"""An experiment: one run's file. A recipe by name, visible changes to it, models, data, scale, resources.

What a recipe leaves out stands here: it changes with scale, the algorithm does not. The resolved copy that a run
keeps (`experiment.toml`) holds the recipe in full, so that nothing is read from anywhere else afterwards.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.algorithms.recipe import Recipe
from pipeline.errors import ExperimentError
from pipeline.inspecting.names import Names
from pipeline.models.lora import Lora
from pipeline.settings import Settings, explain, override, plain_name, read_toml, without_none

PlainName = Annotated[str, AfterValidator(plain_name)]
"""A name that cannot leave its directory."""


class Models(Settings):
    """Where the models come from."""

    policy: str | None = None
    """A Hugging Face checkpoint or a `policy` artifact to start from. Absent: `sft` makes one from `new`."""
    new: dict[str, Any] = Field(default_factory=dict)
    """Shape and tokenizer of the small model that `sft` creates when no policy is named."""
    reward_model: str | None = None
    """A `reward_model` artifact or checkpoint. Absent: `reward` makes one, for recipes that need it."""
    critic: str | None = None
    """A `critic` artifact or checkpoint. Absent: made as the recipe's `critic.start` says."""


class DataSlice(Settings):
    """One dataset that `ingest` makes for the run."""

    source: str = "files"
    """`files`, or a built-in world: `arithmetic`."""
    artifact: str | None = None
    """An ingested artifact to use as it is; nothing else is read then."""
    files: tuple[str, ...] = ()
    """Paths, relative to `data.folder`."""
    split: str = "train"
    """Which side of a built-in world: `train` or `held_out`."""
    count: int | None = None
    """Rows wanted; all of them when absent."""
    grader: str = "exact"
    """Who compares a response with the answer."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name -> the name in the file, where the usual aliases do not fit."""


class Data(Settings):
    """What the run reads."""

    folder: str = "."
    """Where relative `files` start."""
    world: dict[str, Any] = Field(default_factory=dict)
    """Settings of the built-in world."""
    demonstrations: DataSlice | None = None
    """What `sft` imitates."""
    prompts: DataSlice
    """What the loop asks."""
    held_out: DataSlice | None = None
    """What evaluation asks; no evaluation when absent."""
    test_time: bool = False
    """The prompts may be those held out: training on the test's questions, never on its answers (arXiv:2504.16084)."""
    documents: DataSlice | None = None
    """Plain text, for recipes that mix it in."""
    held_out_documents: DataSlice | None = None
    """Plain text that nothing is trained on: how well the policy still predicts it is measured."""
    rankings: DataSlice | None = None
    """What the reward model learns from; candidates are sampled and ranked when absent."""
    held_out_rankings: DataSlice | None = None
    """Rankings that only measure the reward model: nothing is trained or chosen by them."""


class Sft(Settings):
    """Supervised fine-tuning before the loop."""

    enabled: bool = True
    """Off: the loop starts from `models.policy` as it is."""
    epochs: int = Field(1, ge=1)
    """Passes over the demonstrations."""
    batch: int = Field(64, ge=1)
    """Demonstrations per optimizer step."""
    learning_rate: float = Field(1e-5, gt=0)
    """At the peak of the schedule."""
    warmup_share: float = Field(0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Cosine decay ends at this share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, on matrices."""
    documents_share: float = Field(0.0, ge=0, lt=1)
    """Share of the examples that are documents rather than demonstrations."""
    tokens: int | None = Field(None, ge=1)
    """Longest demonstration, prompt included; what the loop's prompts and responses may have together when absent."""
    lora: Lora | None = None
    """Train low-rank adapters of the layers in place of their weights; what is written are whole weights."""


class Feedback(Settings):
    """Candidates and their ranking, for the reward model."""

    by: Literal["grader", "people"] = "grader"
    """Who ranks: simulated annotators that know the answers, or people, for whom the run waits."""
    annotators: tuple[str, ...] = ()
    """Names of those who rank; one without a name when absent."""
    overlap: int = Field(1, ge=1)
    """Annotators per question: with two and more, their agreement is measured."""
    prompts: int = Field(256, ge=1)
    """Prompts whose responses are ranked."""
    responses: int = Field(4, ge=2)
    """Candidates per prompt; InstructGPT has 4 to 9 (arXiv:2203.02155, section 3.5)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits when sampling candidates."""
    beams: int | None = Field(None, ge=2)
    """Search with so many beams and take the best as candidates, instead of sampling."""
    error_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the simulated annotators' verdicts that are turned round."""
    answered_share: float = Field(1.0, gt=0, le=1)
    """Least share of the rankings asked of people that must be there before the run goes on."""
    every: int = Field(0, ge=0)
    """Iterations after which candidates of the present policy are ranked as well and the reward model is made again
    from all rankings; 0: never (arXiv:2203.02155, section 3.1)."""


class Reward(Settings):
    """Training of the reward model."""

    epochs: int = Field(1, ge=1)
    """Passes over the rankings; more than one overfits (arXiv:2203.02155, section 3.5)."""
    batch: int = Field(64, ge=1)
    """Prompts per optimizer step, with all their rankings."""
    learning_rate: float = Field(9e-6, gt=0)
    """At the peak of the schedule."""
    warmup_share: float = Field(0.0, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Cosine decay ends at this share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, on matrices."""
    margin: float = Field(0.0, ge=0)
    """The better response must lead by this times the difference of the ratings, where annotators gave ratings."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that are not trained on: they measure accuracy, and end the training early."""
    check_every: int = Field(0, ge=0)
    """Optimizer steps between two looks at the held-out prompts; the best weights seen are kept. 0: one look, at the
    end, and the last weights are kept."""
    patience: int = Field(3, ge=1)
    """Looks in a row without a better accuracy after which the training ends."""
    lora: Lora | None = None
    """Train low-rank adapters of the layers in place of their weights; what is written are whole weights."""


class Critic(Settings):
    """Training of the critic, for recipes that have one."""

    learning_rate: float | None = Field(None, gt=0)
    """After the warm-up; that of the policy when absent."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up over the whole run."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, on matrices."""
    pretrain_responses: int = Field(512, ge=1)
    """Responses of the first policy that the pretraining learns from, one per prompt where rewards allow it."""
    pretrain_batch: int = Field(64, ge=1)
    """Responses per optimizer step of the pretraining."""
    pretrain_check_every: int = Field(5, ge=1)
    """Optimizer steps between two looks at held-out prompts, which end the pretraining when nothing is gained."""
    pretrain_patience: int = Field(3, ge=1)
    """Looks in a row without a gain after which the pretraining ends."""
    lora: Lora | None = None
    """Train low-rank adapters of the layers in place of their weights; what is written are whole weights."""


class Scale(Settings):
    """Sizes of the loop."""

    iterations: int = Field(ge=1)
    """Walks of the loop."""
    groups: int = Field(ge=1)
    """Prompts per iteration, after filtering. A file may give `responses` instead: group size times groups."""
    prompt_tokens: int = Field(ge=1)
    """Longer prompts are rejected and counted, never cut."""
    response_tokens: int = Field(ge=1)
    """Longest response; what is longer is cut there and finishes as `length`."""
    learning_rate: float = Field(gt=0)
    """After the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up; constant after that."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, on matrices."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient."""
    overlap: bool = False
    """Sample an iteration's first round from the policy before the last update, while that is made where stages have
    processes of their own (launchers `process`, `torchrun`, `ray`). Needs the recipe's `importance`, which corrects."""
    lora: Lora | None = None
    """Train low-rank adapters of the layers in place of their weights; what is written are whole weights."""


class Evaluation(Settings):
    """Sampling on held-out prompts."""

    samples: int = Field(8, ge=1)
    """Responses per held-out prompt: pass@k and maj@k up to this k."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits when sampling."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability."""
    every: int = Field(0, ge=0)
    """Evaluate after every so many iterations as well; the first and the last policy always are."""


Action = Literal["stop", "warn", "off"]
"""What a gate does that fails: stop the run, say so and go on, or not look."""


class Gates(Settings):
    """What a run has to measure up to in order to go on."""

    malformed: Action = "stop"
    """Where any response has no tokens, an end token that is not its last, or `stop` without one."""
    truncation: Action = "warn"
    """Where too many responses are cut at the length limit."""
    truncation_most: float = Field(0.5, ge=0, le=1)
    """Share of an iteration's responses."""
    duplicates: Action = "warn"
    """Where the responses to a prompt are nearly all the same: nothing is explored any more."""
    duplicates_most: float = Field(0.99, ge=0, le=1)
    """Mean over groups of (G - different) / (G - 1); 1 where every group has one response only."""
    grader_failures: Action = "stop"
    """Where the grader did not get through too many responses (timeouts, errors)."""
    grader_failures_most: float = Field(0.05, ge=0, le=1)
    """Share of an iteration's responses."""
    zero_spread: Action = "warn"
    """Where too many groups have one reward for all responses, and so give no signal against each other."""
    zero_spread_most: float = Field(0.95, ge=0, le=1)
    """Share of an iteration's groups."""
    mismatch: Action = "stop"
    """Where engine and trainer see different policies: stale weights, another dtype, a wrong tokenizer. Not looked at
    where the sampler is an update behind (`scale.overlap`)."""
    mismatch_most: float = Field(0.05, gt=0)
    """Mean over tokens of |sampler - trainer| log-probability, in nat: float32 is at 1e-6, bfloat16 at 0.01."""
    divergence: Action = "warn"
    """Where the policy has gone too far from the reference."""
    divergence_most: float = Field(50.0, gt=0)
    """Mean over responses of the sum of log-probability differences, in nat. Looked at where a reference is read."""
    entropy: Action = "warn"
    """Where the policy has become too sure of every token."""
    entropy_least: float = Field(0.005, ge=0)
    """Mean over tokens of the update's entropy, in nat."""
    reward_hacking: Action = "stop"
    """When the reward model's score rises while accuracy by the reference answers falls: stop, say so, or do not look.
    Looked at where a reward model judges prompts that have answers."""
    reward_hacking_drop: float = Field(0.05, gt=0, lt=1)
    """Fall of the accuracy from its best that counts, both averaged over `reward_hacking_window` iterations."""
    reward_hacking_window: int = Field(3, ge=1)
    """Iterations whose mean is compared."""


class Promotion(Settings):
    """When a policy becomes the one that `RUN/promoted` points to. Asked after every evaluation."""

    enabled: bool = True
    """Off: nothing is promoted."""
    metric: Literal["accuracy", "reward"] = "accuracy"
    """What held-out labels are compared by: `correct` (where there are answers) or `reward`."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the interval, over prompts, of the mean difference from the present one; its lower end must not be below 0."""
    approval: bool = False
    """Wait for a person's word before a policy is promoted: `rlhf promote RUN`, or in Prefect a run that pauses."""
    approval_seconds: float = Field(86400.0, gt=0)
    """How long a run in Prefect pauses for that word; afterwards it goes on, and the policy is not promoted yet."""


class Tracking(Settings):
    """Where numbers go besides the run's own files."""

    tensorboard: bool = False
    """Write event files into `RUN/tensorboard` after every iteration."""
    names: Names = "house"
    """What metrics are called there: as here, or as TRL or verl call them where they have the same (`rlhf metrics`)."""


class Fork(Settings):
    """Where a run branches off another."""

    run: PlainName
    """Name of the run, in the same root, that is gone on from."""
    at: int = Field(ge=0)
    """First iteration of its own: what lies before is the other run's."""


class Demand(Settings):
    """What a worker of a Ray cluster holds while there is one for a stage."""

    cpus: float = Field(1.0, gt=0)
    """Processors."""
    gpus: float | None = Field(None, ge=0)
    """GPUs; absent: an engine's devices, one elsewhere, where the stage can use any and the cluster has any."""
    workers: int | None = Field(None, ge=1)
    """How many at most; as many as fit when absent."""


class Ray(Settings):
    """Where shards of `rollout`, `label` and `score` are done under the launcher `ray`."""

    address: str | None = None
    """A cluster that is there: `auto`, `HOST:6379`. One on this machine, that ends with the run, when absent."""
    demands: dict[str, Demand] = Field(default_factory=dict)
    """Stage -> what a worker of it holds."""


Launcher = Literal["inline", "process", "torchrun", "ray"]


class Resources(Settings):
    """How stages run; no result depends on it beyond rounding."""

    engine: str = "vllm"
    """Who samples: `vllm`, `transformers`, `scripted`."""
    launcher: Launcher = "inline"
    """Where stages run: in this process, each in its own, those that train and read with a model in several, or
    shards of those that sample, label and read on a Ray cluster."""
    launchers: dict[str, Launcher] = Field(default_factory=dict)
    """Stage name -> its launcher, where that is another one."""
    torchrun: tuple[str, ...] = ("--standalone", "--nproc-per-node=auto")
    """What torchrun is told (launcher `torchrun`): how many processes, and where other nodes meet."""
    ray: Ray = Ray()
    """The cluster (launcher `ray`)."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the sampler."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices that share the weights of one vLLM; several such engines are workers of a cluster (launcher `ray`)."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes, weights included; what it has beyond them it fills with its cache."""
    max_num_seqs: int = Field(512, ge=1)
    """Responses that an engine has in flight at once."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the layers in training and scoring; weights, gradients and moments stay float32."""
    recompute: bool = False
    """Train with the layers' inputs alone kept for the backward pass: less memory, a third more work."""
    offload: bool = False
    """Keep the optimizer's moments in the host's memory and step there: half of what an update holds on one GPU."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Tokens that fit into memory at once in training and scoring, prompts counted with each of their responses.
    Without a GPU at most 4,096 are taken, which is faster than more."""
    grader_seconds: float = Field(5.0, gt=0)
    """One answer's grading is killed after this time."""
    python: dict[str, str] = Field(default_factory=dict)
    """Stage name -> interpreter of its own environment (launcher `process`)."""
    save_every: int = Field(100, ge=0)
    """Optimizer steps between two savings of a training in progress, from which it goes on after a crash; 0: none."""
    retries: int = Field(2, ge=0)
    """Further tries of a stage after a fault of its engine or graders; what is asked wrongly is never tried again."""
    retry_seconds: float = Field(5.0, ge=0)
    """Wait before the first further try; twice as long before each next."""
    timeouts: dict[str, float] = Field(default_factory=dict)
    """Stage name -> seconds after which it is ended as failed; none when absent."""
    limits: dict[str, str] = Field(default_factory=dict)
    """Hardware of a stage (`gpu`, `cpu`) -> name of the Prefect concurrency limit that it holds while it works."""

    def launcher_of(self, stage: str) -> Launcher:
        """Where a stage runs."""
        return self.launchers.get(stage, self.launcher)


class Experiment(Settings):
    """A run, resolved: everything that its stages read."""

    name: PlainName
    """Of the run's directory."""
    base: PlainName
    """The run that holds what all recipes on this data share: ingested data and the SFT policy."""
    seed: int = 0
    """Of everything random."""
    recipe: Recipe
    """The algorithm, with its changes applied."""
    recipe_changes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Recipe name -> deviations from the published recipe; those of the chosen recipe are applied and recorded."""
    models: Models = Models()
    """Where the models come from."""
    data: Data
    """What is read."""
    sft: Sft = Sft()
    """Fine-tuning before the loop."""
    feedback: Feedback = Feedback()
    """Candidates and their ranking, for recipes with a reward model."""
    reward: Reward = Reward()
    """Training of the reward model, for recipes with one."""
    critic: Critic = Critic()
    """Training of the critic, for recipes with one."""
    scale: Scale
    """Sizes of the loop."""
    evaluation: Evaluation = Evaluation()
    """Sampling on held-out prompts."""
    gates: Gates = Gates()
    """What a run has to measure up to in order to go on."""
    promotion: Promotion = Promotion()
    """Which policy `RUN/promoted` points to."""
    tracking: Tracking = Tracking()
    """Where numbers go besides the run's own files."""
    fork: Fork | None = None
    """Where this run branches off another; it starts from scratch when absent."""
    resources: Resources = Resources()
    """How stages run."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.models.policy is None and not self.models.new:
            raise ValueError("models: name a `policy`, or describe a `new` one")
        if self.models.policy is None and not self.sft.enabled:
            raise ValueError("sft.enabled = false needs models.policy: there is nothing to start from")
        if self.sft.enabled and self.data.demonstrations is None:
            raise ValueError("sft needs data.demonstrations; or set sft.enabled = false")
        if self.sft.lora is not None and self.models.policy is None:
            raise ValueError("sft.lora: a new model has no weights to adapt; name a models.policy")
        responses, steps = self.scale.groups * self.recipe.rollout.group_size, self.recipe.update.minibatches
        if responses < steps:
            raise ValueError(f"{responses} responses per iteration cannot be dealt to {steps} minibatches")
        return self

    @model_validator(mode="after")
    def _can_be_done_so(self) -> Self:
        if self.resources.tensor_parallel > 1 and self.resources.engine != "vllm":
            raise ValueError(f"resources.tensor_parallel: {self.resources.engine} samples on one device; take vllm")
        if self.scale.overlap and self.recipe.importance is None:
            raise ValueError(
                "scale.overlap: responses would be an update old, and the recipe does not correct for it; --set "
                f"'recipe_changes.{self.recipe.name}.importance={{kind=\"token_truncated\"}}'"
            )
        if self.scale.lora is not None and self.recipe.update.ema is not None:
            raise ValueError("scale.lora: update.ema averages whole weights; take one of the two out")
        return self

    @classmethod
    def load(
        cls, path: Path, assignments: Iterable[str] = (), recipe: str | None = None, name: str | None = None
    ) -> Self:
        """Read an experiment file, apply `a.b=c` assignments, resolve the recipe, check that it fits together.

        Raises `ExperimentError` (or `RecipeError`) with file, place and value.
        """
        tables = override(read_toml(path), assignments)
        wanted = recipe if recipe is not None else tables.get("recipe")
        if wanted is None:
            raise ExperimentError("the experiment names no recipe", str(path), 'write: recipe = "grpo"')
        if not isinstance(wanted, str | dict):
            raise ExperimentError(f"recipe: expected a name or a table, found {wanted!r}", str(path), 'recipe = "grpo"')
        chosen = Recipe.load(wanted) if isinstance(wanted, str) else Recipe.read(wanted, str(path))
        changes = tables.get("recipe_changes", {})
        _check_changes(changes, path)
        tables["recipe"] = chosen.changed(changes.get(chosen.name, {}))
        _resolve_groups(tables, path)
        tables["name"] = name or tables.get("name") or path.stem
        tables.setdefault("base", f"{path.stem}-base")
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise ExperimentError(
                explain(error), str(path), "correct the file, or the --set; `rlhf run --dry-run` shows the result"
            ) from error

    def dump(self) -> str:
        """The resolved experiment as TOML; `load` of it gives an equal experiment."""
        return tomli_w.dumps(without_none(self.model_dump(mode="json")))


def _resolve_groups(tables: dict[str, Any], path: Path) -> None:
    """Turn `scale.responses`, the same for recipes of any group size, into `scale.groups`."""
    scale, size = tables.get("scale"), tables["recipe"].rollout.group_size
    if not isinstance(scale, dict) or "responses" not in scale:
        return
    responses = scale["responses"]
    rest = {key: value for key, value in scale.items() if key != "responses"}
    if responses is None:
        tables["scale"] = rest
        return
    if scale.get("groups") is not None:
        raise ExperimentError(
            "scale: both groups and responses are given", str(path), "give one; `--set scale.responses=` takes it out"
        )
    if type(responses) is not int or responses < size:
        raise ExperimentError(
            f"scale.responses: expected a number of at least rollout.group_size = {size}, found {responses!r}",
            str(path), "responses of one iteration, all groups together",
        )  # fmt: skip
    tables["scale"] = rest | {"groups": responses // size}


def _check_changes(changes: Any, path: Path) -> None:
    do = f"write [recipe_changes.NAME] with NAME one of {', '.join(Recipe.names())}"
    if not isinstance(changes, dict):
        raise ExperimentError(f"recipe_changes: expected tables, found {changes!r}", str(path), do)
    for name, change in changes.items():
        if name not in Recipe.names():
            raise ExperimentError(f"recipe_changes.{name}: no such recipe", str(path), do)
        if not isinstance(change, dict):
            raise ExperimentError(f"recipe_changes.{name}: expected a table, found {change!r}", str(path), do)
