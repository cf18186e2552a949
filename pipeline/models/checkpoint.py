"""Models on disk: ordinary Hugging Face directories, looked at before they are believed.

    policy         a causal language model
    reward model   AutoModelForSequenceClassification, one label; `reward_bias` of config.json is added to its output
    critic         AutoModelForTokenClassification, one label

Neither transformers nor vLLM minds a NaN, and vLLM does not mind a tensor that is not there; `inspect` does. It reads
the files and builds no model.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging

from pipeline.building import built, no_progress_bar
from pipeline.disk import FileIdentity, identity, json_object
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.finite import all_finite
from pipeline.models import adapters
from pipeline.models.distributed import gathered, released
from pipeline.ranks import count, rank

Dtype = Literal["float32", "bfloat16", "auto"]
Kind = Literal["policy", "reward_model", "critic"]

HEAD_STD = 0.02
"""Standard deviation of a new head's weights; its bias is 0. Ours: the papers do not say how theirs began."""

INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# transformers writes these beside the tokenizer's settings; with them a tokenizer would change by being read.
HOW_IT_WAS_LOADED = ("is_local", "local_files_only", "name_or_path")
# Layers of such models differ among themselves by design.
MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class _Sort:
    """What transformers calls the models of one kind."""

    name: str
    is_a: str
    loader: Any
    families: Mapping[str, Any]
    """Model type -> architecture."""


_SORTS: Mapping[Kind, _Sort] = {
    "policy": _Sort("policy", "a causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "reward_model": _Sort(
        "reward model", "a sequence classification model", AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "critic": _Sort(
        "critic", "a token classification model", AutoModelForTokenClassification,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What `inspect` found in a checkpoint."""

    architecture: str
    model_type: str
    layers: int
    width: int
    vocab_size: int
    max_position: int
    tied: bool
    """The output head is the transposed embedding."""
    end_ids: tuple[int, ...]
    """Tokens that end a response, from `generation_config.json`, else from `config.json`."""
    parameters: int
    dtypes: tuple[str, ...]
    """Of the tensors in the files, each once, sorted."""
    bytes: int
    """Of the tensor files."""


def inspect(path: Path, kind: Kind = "policy") -> CheckpointFacts:
    """Return what the checkpoint at `path` is, after reading every tensor once.

    Raises `ArtifactError`, naming file and tensor, unless: `config.json` names a model of this kind; a tokenizer is
    there; each `*.safetensors` is whole; every tensor is finite; the embedding, the head (where it is not tied) and the
    same tensors in every layer are there. The head of a reward model or critic is `score.weight` [1, width], and
    `score.bias` [1] where there is one. At most one tensor is in memory at a time. Files that are what they were when
    they were read in this process, and were well, are not read again.
    """
    if not path.is_dir():
        raise ArtifactError("no such checkpoint directory", where=str(path))
    which = (kind, identities(path))
    if which not in _inspected:
        _inspected[which] = _inspect(path, kind)
    return _inspected[which]


def identities(path: Path) -> tuple[FileIdentity, ...]:
    """Those of a checkpoint's files: the same while the model is."""
    return tuple(sorted(identity(file) for file in path.iterdir() if file.is_file()))


_inspected: dict[tuple[Kind, tuple[FileIdentity, ...]], CheckpointFacts] = {}


def _inspect(path: Path, kind: Kind) -> CheckpointFacts:
    config = json_object(path / "config.json")
    architecture = _architecture(config, path, kind)
    _check_tokenizer(path)
    tensors = _read_tensors(path)
    tied = bool(config.get("tie_word_embeddings", False))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _check_names(shapes, config, path)
    if kind == "policy":
        _check_output(shapes, path, tied=tied)
    else:
        _check_score(shapes, config, path)
    generation = path / "generation_config.json"
    ends = (json_object(generation) if generation.exists() else config).get("eos_token_id")
    return CheckpointFacts(
        architecture=architecture,
        model_type=config["model_type"],
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        tied=tied,
        end_ids=tuple(_ends(ends)),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
    )


def load_policy(path: Path, dtype: Dtype) -> PreTrainedModel:
    """Load a causal language model in evaluation mode on the CPU; `auto` keeps the dtype that the config names.

    Raises `ArtifactError` when the directory cannot be loaded, is of another kind or leaves a tensor unset.
    """
    return _load(path, "policy", dtype)


def load_reward_model(path: Path, dtype: Dtype) -> PreTrainedModel:
    """Load a reward model in evaluation mode on the CPU. Its head is `score`, its bias `config.reward_bias` or 0.

    Raises `ArtifactError` as `load_policy` does.
    """
    return _load(path, "reward_model", dtype)


def load_critic(path: Path, dtype: Dtype) -> PreTrainedModel:
    """Load a critic in evaluation mode on the CPU. Its head is `score`.

    Raises `ArtifactError` as `load_policy` does.
    """
    return _load(path, "critic", dtype)


def fresh_reward_model(policy: Path, seed: int) -> PreTrainedModel:
    """Return the policy as a reward model: float32, its output head replaced by one number, `reward_bias` 0.

    The head is drawn from N(0, `HEAD_STD`^2), a function of `seed` alone; the global random numbers stay as they are.
    Raises `ArtifactError` as `load_policy` does, `ExperimentError` for a family without such a head in transformers.
    """
    _architecture(json_object(policy / "config.json"), policy, "policy")
    model = _headed(policy, "reward_model", seed)
    model.config.reward_bias = 0.0
    return model


def fresh_critic(start: Path, seed: int) -> PreTrainedModel:
    """Return a float32 critic with the weights of a policy, a reward model or a critic; its config says which.

    Of a policy: the head is new, as in `fresh_reward_model`. Of a reward model (arXiv:2203.02155, appendix C.4): the
    head is the reward model's and its bias `reward_bias`, so that it says the same. Of a critic: as it is.
    Raises `ArtifactError` as `load_policy` does, `ExperimentError` for a family without such a head in transformers.
    """
    kind = _kind(start)
    if kind == "critic":
        return load_critic(start, "float32")
    model = _headed(start, "critic", seed)
    if kind == "reward_model":
        nn.init.constant_(model.score.bias, reward_bias(model))
        if hasattr(model.config, "reward_bias"):
            del model.config.reward_bias
    return model


def reward_bias(model: Any) -> float:
    """What is added to the output of a reward model's head: `reward_bias` of its config, 0 where that has none."""
    return float(getattr(model.config, "reward_bias", 0.0))


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """Write weights, `config.json`, the tokenizer's files and, of a policy, `generation_config.json` into `path`.

    `generation_config.json` names all tokens that end a response: the model's own and the tokenizer's, and nothing
    about sampling.

    transformers reads a score at the last token that is not `pad_token_id`, one token too early where a text ends with
    that. So what pads a reward model or critic, in `config.json` and in its tokenizer's files, ends no text: it is the
    tokenizer's or the model's padding if it is no end token, else a special token whose name says padding. Where there
    is none, both have no padding: transformers then scores one text at a time, and refuses more.
    Makes the directory; files of the same names are written over.
    """
    generates, kept_pad, kept_token = model.can_generate(), model.config.pad_token_id, tokenizer.pad_token
    kept_generation = getattr(model, "generation_config", None)
    ends = _ends((kept_generation or model.config).eos_token_id, tokenizer.eos_token_id)
    path.mkdir(parents=True, exist_ok=True)
    try:
        if generates:
            model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)
        else:
            pad = _padding(model.config, tokenizer, ends)
            model.config.pad_token_id = pad
            tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
        weights = gathered(_own_tensors(model)) if count() > 1 or adapters.adapts(model) else None
        if rank():
            return
        if weights is not None:
            weights = adapters.merged(model, weights)
        with no_progress_bar():
            model.save_pretrained(path, state_dict=weights)
            tokenizer.save_pretrained(path)
    finally:
        if generates:
            model.generation_config = kept_generation
        else:
            model.config.pad_token_id, tokenizer.pad_token = kept_pad, kept_token
    written = path / "tokenizer_config.json"
    settings = {name: value for name, value in json_object(written).items() if name not in HOW_IT_WAS_LOADED}
    written.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _own_tensors(model: Any) -> dict[str, Any]:
    """What a checkpoint holds; what is tied, once."""
    kept = released(model).state_dict()
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in kept.items() if name in once}


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    elements: int
    dtype: str


def _ends(*given: int | list[int] | None) -> list[int]:
    """The tokens that are given, each once, in this order."""
    tokens: list[int] = []
    for some in given:
        tokens += [] if some is None else [some] if isinstance(some, int) else some
    return list(dict.fromkeys(tokens))


def _padding(config: Any, tokenizer: Any, ends: Sequence[int]) -> int | None:
    """A special token that is never the last of a text."""
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    named = [token for token, content in special.items() if "pad" in content.lower()]
    # A response that was cut off may end with an unknown character.
    last = (*ends, tokenizer.unk_token_id)
    for token in (tokenizer.pad_token_id, config.pad_token_id, *named):
        if token in special and token not in last and token < config.vocab_size:
            return int(token)
    return None


def _architecture(config: dict[str, Any], path: Path, kind: Kind) -> str:
    where = str(path / "config.json")
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    if missing := [name for name in needed if name not in config]:
        raise ArtifactError(f"the config does not say {', '.join(missing)}", where=where)
    found, sort = config.get("architectures") or [], _SORTS[kind]
    if len(found) != 1 or found[0] not in sort.families.values():
        what = f"not {sort.is_a}: architectures = {found}"
        raise ArtifactError(what, where=where, do=f"name the directory of a {sort.name}")
    return str(found[0])


def _kind(path: Path) -> Kind:
    """What the checkpoint says it is."""
    config = json_object(path / "config.json")
    found = (config.get("architectures") or ["nothing"])[0]
    for kind, sort in _SORTS.items():
        if found in sort.families.values():
            return kind
    raise ArtifactError(
        f"neither policy nor reward model nor critic: architectures = {config.get('architectures')}",
        where=str(path / "config.json"),
    )


def _load(path: Path, kind: Kind, dtype: Dtype) -> PreTrainedModel:
    sort = _SORTS[kind]
    model, missing = _open(path, sort, "auto" if dtype == "auto" else getattr(torch, dtype))
    if missing:
        raise ArtifactError(f"the {sort.name} has no tensor for {sorted(missing)}", where=str(path))
    if (found := model.config.architectures) != [type(model).__name__]:
        raise ArtifactError(f"not {sort.is_a}: architectures = {found}", where=str(path))
    return model


def _headed(path: Path, kind: Kind, seed: int) -> PreTrainedModel:
    """Load what is there in float32 and draw what is missing of a head with one output."""
    sort, do = _SORTS[kind], "take a policy of another family, such as qwen3 or llama"
    family = json_object(path / "config.json").get("model_type")
    if family not in sort.families:
        what = f"no {sort.name} can be made of a {family}: transformers has no {sort.is_a[2:]} of that family"
        raise ExperimentError(what, where=str(path), do=do)
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config.num_labels = 1
    if (path / "generation_config.json").exists():
        # A model with a head has no such file, and none of these may pad it.
        ends = _ends(config.eos_token_id, json_object(path / "generation_config.json").get("eos_token_id"))
        config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    with torch.random.fork_rng(devices=[]), _no_load_report():
        model, missing = _open(path, sort, torch.float32, config=config)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ExperimentError(f"{type(model).__name__} has no head named score", where=str(path), do=do)
    if missing - {"score.weight", "score.bias"}:
        raise ArtifactError(f"no tensor for {sorted(missing)}", where=str(path))
    if "score.weight" in missing:
        nn.init.normal_(head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return model


def _open(path: Path, sort: _Sort, dtype: Any, config: Any = None) -> tuple[Any, set[str]]:
    """The model, and the names of its tensors that the files do not have."""
    try:
        return built(sort.loader, path, dtype, config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"cannot load the {sort.name}: {error}", where=str(path)) from error


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).exists() for name in VOCABULARIES):
        raise ArtifactError(f"no tokenizer: none of {', '.join(VOCABULARIES)}", where=str(path))
    json_object(path / "tokenizer_config.json")
    if (path / "tokenizer.json").exists():
        json_object(path / "tokenizer.json")


def _read_tensors(path: Path) -> dict[str, _Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ArtifactError("no *.safetensors file", where=str(path))
    home: dict[str, str] = {}
    tensors: dict[str, _Tensor] = {}
    for file in files:
        for name, tensor in _read_file(file):
            if name in home:
                raise ArtifactError(f"{name} is also in {home[name]}", where=str(file))
            home[name], tensors[name] = file.name, tensor
    if (path / INDEX).exists():
        for name, promised in json_object(path / INDEX).get("weight_map", {}).items():
            if home.get(name) != promised:
                raise ArtifactError(f"the index promises {name} in {promised}", where=str(path / INDEX))
    return tensors


def _read_file(file: Path) -> Iterator[tuple[str, _Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, a safetensors file is not a mapping
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not all_finite(tensor):
                    count = int((~torch.isfinite(tensor)).sum())
                    raise ArtifactError(f"{name} has {count} of {tensor.numel()} numbers not finite", where=str(file))
                yield (
                    name,
                    _Tensor(tuple(tensor.shape), tensor.numel(), str(tensor.dtype).removeprefix("torch.")),
                )
    except SafetensorError as error:
        raise ArtifactError(f"not a whole safetensors file: {error}", where=str(file)) from error


def _check_names(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], path: Path) -> None:
    vocabulary = (config["vocab_size"], config["hidden_size"])
    if vocabulary not in shapes.values():
        raise ArtifactError(f"no tensor has the shape of the embedding, {list(vocabulary)}", where=str(path))
    if not any(name in config for name in MIXTURES):
        _check_layers(shapes, config, path)


def _check_output(shapes: dict[str, tuple[int, ...]], path: Path, *, tied: bool) -> None:
    heads = [name for name in shapes if name.endswith(("lm_head.weight", "embed_out.weight", "output.weight"))]
    if not tied and not heads:
        raise ArtifactError("the config says the head is not tied, and there is no lm_head.weight", where=str(path))


def _check_score(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], path: Path) -> None:
    # transformers writes the names of the labels, and neither them nor their number where they are two.
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise ArtifactError(
            f"the config has {labels} labels, and the head must have 1", where=str(path / "config.json")
        )
    weight, bias = (1, config["hidden_size"]), (1,)
    if (found := shapes.get("score.weight")) != weight:
        raise ArtifactError(f"score.weight: {_shape(found)}, expected {list(weight)}", where=str(path))
    if (found := shapes.get("score.bias", bias)) != bias:
        raise ArtifactError(f"score.bias: {_shape(found)}, expected {list(bias)}", where=str(path))
    added = config.get("reward_bias", 0.0)
    if not isinstance(added, int | float) or not math.isfinite(added):
        raise ArtifactError(f"reward_bias: {added!r} is no finite number", where=str(path / "config.json"))


def _check_layers(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], path: Path) -> None:
    layers: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        if found := re.fullmatch(r".*?\.(\d+)\.(.+)", name):
            layers[int(found[1])][found[2]] = shape
    count = config["num_hidden_layers"]
    if sorted(layers) != list(range(count)):
        raise ArtifactError(f"the config says {count} layers, the files have {sorted(layers)}", where=str(path))
    kinds = config.get("layer_types") or ["the one"] * count
    pattern: dict[str, int] = {}
    for layer in range(count):
        first = pattern.setdefault(kinds[layer], layer)
        for suffix in sorted(set(layers[first]) | set(layers[layer])):
            here, there = layers[layer].get(suffix), layers[first].get(suffix)
            if here != there:
                raise ArtifactError(
                    f"{suffix}: {_shape(here)} in layer {layer}, {_shape(there)} in layer {first}", where=str(path)
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Be silent about a head that comes and a head that goes."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
