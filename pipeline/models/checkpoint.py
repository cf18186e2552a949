"""A policy on disk: an ordinary Hugging Face directory, looked at before it is believed.

Neither transformers nor vLLM minds a NaN, and vLLM does not mind a tensor that is not there; `inspect` does. It reads
the files and builds no model.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pipeline.errors import ArtifactError

Dtype = Literal["float32", "bfloat16", "auto"]

INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# transformers writes these beside the tokenizer's settings; with them a tokenizer would change by being read.
HOW_IT_WAS_LOADED = ("is_local", "local_files_only", "name_or_path")
# Layers of such models differ among themselves by design.
MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts")


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


def inspect(path: Path) -> CheckpointFacts:
    """Return what the checkpoint at `path` is, after reading every tensor once.

    Raises `ArtifactError`, naming file and tensor, unless: `config.json` names a causal language model; a tokenizer is
    there; each `*.safetensors` is whole; every tensor is finite; the embedding, the head (where it is not tied) and the
    same tensors in every layer are there. At most one tensor is in memory at a time.
    """
    if not path.is_dir():
        raise ArtifactError("no such checkpoint directory", where=str(path))
    config = _json(path / "config.json")
    architecture = _architecture(config, path)
    _check_tokenizer(path)
    tensors = _read_tensors(path)
    tied = bool(config.get("tie_word_embeddings", False))
    _check_names({name: tensor.shape for name, tensor in tensors.items()}, config, path, tied=tied)
    generation = path / "generation_config.json"
    ends = (_json(generation) if generation.exists() else config).get("eos_token_id")
    return CheckpointFacts(
        architecture=architecture,
        model_type=config["model_type"],
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        tied=tied,
        end_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
    )


def load_policy(path: Path, dtype: Dtype) -> PreTrainedModel:
    """Load a causal language model in evaluation mode on the CPU; `auto` keeps the dtype that the config names.

    Raises `ArtifactError` when the directory cannot be loaded or leaves a tensor of the model unset.
    """
    try:
        with _no_progress_bar():
            model, loading = AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"cannot load the policy: {error}", where=str(path)) from error
    if loading["missing_keys"]:
        raise ArtifactError(f"the policy has no tensor for {sorted(loading['missing_keys'])}", where=str(path))
    policy: PreTrainedModel = model
    return policy


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """Write weights, `config.json`, `generation_config.json` and the tokenizer's files into `path`.

    `generation_config.json` names all tokens that end a response: the model's own and the tokenizer's, and nothing
    about sampling. Makes the directory; files of the same names are written over.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    path.mkdir(parents=True, exist_ok=True)
    kept = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)
    try:
        with _no_progress_bar():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
    finally:
        model.generation_config = kept
    written = path / "tokenizer_config.json"
    settings = {name: value for name, value in _json(written).items() if name not in HOW_IT_WAS_LOADED}
    written.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    elements: int
    dtype: str


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"a checkpoint has a {path.name}, this one has none", where=str(path.parent)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"not a JSON object but a {type(content).__name__}", where=str(path))
    return content


def _architecture(config: dict[str, Any], path: Path) -> str:
    where = str(path / "config.json")
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    if missing := [name for name in needed if name not in config]:
        raise ArtifactError(f"the config does not say {', '.join(missing)}", where=where)
    found = config.get("architectures") or []
    if len(found) != 1 or found[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ArtifactError(f"not a causal language model: architectures = {found}", where=where)
    return str(found[0])


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).exists() for name in VOCABULARIES):
        raise ArtifactError(f"no tokenizer: none of {', '.join(VOCABULARIES)}", where=str(path))
    _json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").exists():
        _json(path / "tokenizer.json")


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
        for name, promised in _json(path / INDEX).get("weight_map", {}).items():
            if home.get(name) != promised:
                raise ArtifactError(f"the index promises {name} in {promised}", where=str(path / INDEX))
    return tensors


def _read_file(file: Path) -> Iterator[tuple[str, _Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, a safetensors file is not a mapping
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    count = int((~torch.isfinite(tensor)).sum())
                    raise ArtifactError(f"{name} has {count} of {tensor.numel()} numbers not finite", where=str(file))
                yield (
                    name,
                    _Tensor(tuple(tensor.shape), tensor.numel(), str(tensor.dtype).removeprefix("torch.")),
                )
    except SafetensorError as error:
        raise ArtifactError(f"not a whole safetensors file: {error}", where=str(file)) from error


def _check_names(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], path: Path, *, tied: bool) -> None:
    vocabulary = (config["vocab_size"], config["hidden_size"])
    if vocabulary not in shapes.values():
        raise ArtifactError(f"no tensor has the shape of the embedding, {list(vocabulary)}", where=str(path))
    heads = [name for name in shapes if name.endswith(("lm_head.weight", "embed_out.weight", "output.weight"))]
    if not tied and not heads:
        raise ArtifactError("the config says the head is not tied, and there is no lm_head.weight", where=str(path))
    if not any(name in config for name in MIXTURES):
        _check_layers(shapes, config, path)


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
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
