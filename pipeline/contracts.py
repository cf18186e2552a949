"""The schema of every dataset that passes between stages, and what must hold in it beyond types.

A contract is a list of fields with a doc and a unit each, a key, and invariants. `schema` carries all of it as
Arrow metadata, so a Parquet file explains itself; `check` refuses a table that breaks it, naming column and keys.

Common rules: the key after sampling is (prompt_id, sample); token-aligned columns have one element per response
token; log-probabilities are natural logarithms (nat), finite and <= 0; the rows of a group stand together.
A contract's version rises when the meaning of a column changes; a reader refuses a version it does not know.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import ragged
from pipeline.errors import ContractError

STRING, INT32, INT64, FLOAT32, FLOAT64, BOOL = (
    pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()
)  # fmt: skip
MESSAGES = pa.list_(pa.struct([pa.field("role", STRING), pa.field("content", STRING)]))
TOKENS, FLOATS = pa.list_(INT32), pa.list_(FLOAT32)


@dataclass(frozen=True)
class Field:
    """A column: its Arrow type, what it means, in which unit, and whether it may hold nulls or be absent."""

    name: str
    type: pa.DataType
    doc: str
    unit: str = ""
    null: bool = False
    optional: bool = False
    """An optional column may be missing from a dataset as a whole."""

    def arrow(self) -> pa.Field:
        """The Arrow field, with doc and unit as metadata."""
        return pa.field(self.name, self.type, self.null or self.optional, {"doc": self.doc, "unit": self.unit})


@dataclass(frozen=True)
class Fault:
    """Rows that break an invariant: which column, what is wrong, where (True marks a bad row)."""

    column: str
    what: str
    rows: np.ndarray


Invariant = Callable[[pa.Table], Iterable[Fault]]


@dataclass(frozen=True)
class Contract:
    """What a dataset called `name` holds. A contract without fields is a directory, not a table (a checkpoint)."""

    name: str
    version: int
    doc: str
    fields: tuple[Field, ...] = ()
    key: tuple[str, ...] = ()
    group: str | None = None
    """Rows with the same value here stand together and never straddle two files."""
    invariants: tuple[Invariant, ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether artifacts of this kind are Parquet files."""
        return bool(self.fields)

    def schema(self, columns: Iterable[str] | None = None) -> pa.Schema:
        """The Arrow schema with its documentation; `columns` leaves out the optional ones that are not named."""
        present = None if columns is None else set(columns)
        fields = [f.arrow() for f in self.fields if present is None or not f.optional or f.name in present]
        return pa.schema(fields, {"contract": self.name, "contract_version": str(self.version)})

    def conform(self, table: pa.Table, where: str = "") -> pa.Table:
        """Return `table` with this contract's column order, types and metadata. Raises `ContractError`.

        Nulls pass: `check` names the rows that have them.
        """
        self._check_columns(table, where)
        schema = self.schema(table.column_names)
        try:
            cast = table.select(schema.names).cast(pa.schema([field.with_nullable(True) for field in schema]))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise ContractError(f"{self.name}: {error}", where) from error
        metadata = {**(table.schema.metadata or {}), **(schema.metadata or {})}
        return pa.Table.from_arrays(cast.columns, schema=schema.with_metadata(metadata))

    def check(self, table: pa.Table, where: str = "") -> None:
        """Raise `ContractError` unless columns, types, version, nulls, key, grouping and invariants hold."""
        self._check_version(table.schema, where)
        self._check_columns(table, where)
        self._check_types(table.schema, where)
        for fault in self._faults(table):
            self._refuse(fault, table, where)

    def _refuse(self, fault: Fault, table: pa.Table, where: str) -> None:
        if not fault.rows.any():
            return
        keys = self._keys(table, fault.rows)
        raise ContractError(
            f"{self.name}.{fault.column}: {fault.what} in {int(fault.rows.sum())} of {table.num_rows} rows"
            + (f"; first keys: {keys}" if keys else ""),
            where,
            "re-run the stage that wrote it, or correct the file and ingest it again",
        )

    def check_keys(self, table: pa.Table, where: str = "") -> None:
        """Raise `ContractError` unless keys are unique and groups whole over all parts; reads the key columns only."""
        for fault in _key_faults(table, self):
            self._refuse(fault, table, where)

    def _check_version(self, schema: pa.Schema, where: str) -> None:
        metadata = schema.metadata or {}
        name, version = metadata.get(b"contract"), metadata.get(b"contract_version")
        if name is None and version is None:
            return
        if name != self.name.encode() or version != str(self.version).encode():
            found = f"{(name or b'?').decode()} version {(version or b'?').decode()}"
            raise ContractError(f"expected {self.name} version {self.version}, found {found}", where)

    def _check_columns(self, table: pa.Table, where: str) -> None:
        known = {f.name: f for f in self.fields}
        missing = [f.name for f in self.fields if not f.optional and f.name not in table.column_names]
        if missing:
            raise ContractError(
                f"{self.name}: missing column {', '.join(missing)}; found {', '.join(table.column_names) or 'none'}",
                where,
                f"`rlhf contracts {self.name}` lists what is expected",
            )
        unknown = [name for name in table.column_names if name not in known]
        if unknown:
            raise ContractError(f"{self.name}: unknown column {', '.join(unknown)}", where)

    def _check_types(self, schema: pa.Schema, where: str) -> None:
        wrong = [
            f"{self.name}.{f.name}: type is {schema.field(f.name).type}, not {f.type}"
            for f in self.fields
            if f.name in schema.names and schema.field(f.name).type != f.type
        ]
        if wrong:
            raise ContractError("\n".join(wrong), where, f"`rlhf contracts {self.name}` lists what is expected")

    def _faults(self, table: pa.Table) -> Iterator[Fault]:
        yield from self._null_faults(table)
        yield from _key_faults(table, self)
        for invariant in self.invariants:
            yield from invariant(table)

    def _null_faults(self, table: pa.Table) -> Iterator[Fault]:
        for field in (f for f in self.fields if f.name in table.column_names):
            column = table[field.name]
            if not field.null and column.null_count:
                yield Fault(field.name, "null", _where(pc.is_null(column)))
            if pa.types.is_list(field.type) and (elements := pc.list_flatten(column)).null_count:
                yield Fault(field.name, "null element", _rows_with(column, _where(pc.is_null(elements))))

    def _keys(self, table: pa.Table, rows: np.ndarray) -> list[tuple[object, ...]]:
        if not self.key or not rows.any():
            return []
        first = table.select(self.key).take(np.flatnonzero(rows)[:5]).to_pylist()
        return [tuple(row.values()) for row in first]


def _where(mask: pa.ChunkedArray) -> np.ndarray:
    return np.asarray((pc.fill_null(mask, False) if mask.null_count else mask).to_numpy(), dtype=bool)


def _rows_with(column: pa.ChunkedArray, bad_elements: np.ndarray) -> np.ndarray:
    """Rows of a list column in which an element is bad; `bad_elements` is as long as the flattened column."""
    counts = ragged.lengths(column)
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(owner[bad_elements], minlength=len(counts)) > 0


def _key_faults(table: pa.Table, contract: Contract) -> Iterator[Fault]:
    if contract.key:
        yield from _repeated_keys(table, contract.key)
    if contract.group:
        yield from _scattered_groups(table, contract.group)


def _repeated_keys(table: pa.Table, key: tuple[str, ...]) -> Iterator[Fault]:
    whole = np.zeros(table.num_rows, dtype=np.int64)
    for name in key:  # numbered anew after each column: no product can overflow
        codes = _codes(table[name])
        whole = np.unique(whole * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    counts = np.bincount(whole, minlength=1)
    yield Fault(key[0], f"key ({', '.join(key)}) is not unique", counts[whole] > 1)


def _scattered_groups(table: pa.Table, column: str) -> Iterator[Fault]:
    values = _codes(table[column])
    starts = np.ones(len(values), dtype=bool)
    starts[1:] = values[1:] != values[:-1]
    first_of_run = np.flatnonzero(starts)
    _, first, counts = np.unique(values[first_of_run], return_index=True, return_counts=True)
    scattered = np.zeros(len(values), dtype=bool)
    scattered[first_of_run[first[counts > 1]]] = True
    yield Fault(column, "the rows of a group do not stand together", scattered)


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """A number >= 0 for each value, the same for equal values; nulls are equal to each other."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return np.asarray(encoded.indices.to_numpy(), dtype=np.int64)


def _plain(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy())


def _same_length_as(reference: str, *columns: str) -> Invariant:
    def invariant(table: pa.Table) -> Iterator[Fault]:
        expected = ragged.lengths(table[reference])
        for name in columns:
            if name in table.column_names:
                present = _where(pc.is_valid(table[name]))
                wrong = present & (ragged.lengths(table[name]) != expected)
                yield Fault(name, f"length differs from {reference}", wrong)

    return invariant


def _elements(column: str, what: str, bad: Callable[[np.ndarray], np.ndarray]) -> Invariant:
    """Fault on the rows of a list or scalar column whose elements satisfy `bad`."""

    def invariant(table: pa.Table) -> Iterator[Fault]:
        if column not in table.column_names:
            return
        data = table[column]
        of_list = pa.types.is_list(data.type)
        found = bad(_plain(pc.list_flatten(data) if of_list else data))
        if found.any():
            yield Fault(column, what, _rows_with(data, found) if of_list else found)

    return invariant


def _logprobs(column: str) -> Invariant:
    return _elements(column, "not a log-probability (must be finite and <= 0)", lambda x: ~np.isfinite(x) | (x > 0))


def _finite(column: str) -> Invariant:
    return _elements(column, "not finite", lambda x: ~np.isfinite(x.astype(np.float64)))


def _not_empty(column: str) -> Invariant:
    def invariant(table: pa.Table) -> Iterator[Fault]:
        yield Fault(column, "empty", ragged.lengths(table[column]) == 0)

    return invariant


def _one_of(column: str, *allowed: str) -> Invariant:
    def invariant(table: pa.Table) -> Iterator[Fault]:
        known = pc.is_in(table[column], value_set=pa.array(allowed))
        yield Fault(column, f"not one of {', '.join(allowed)}", ~_where(known))

    return invariant


def _last_turn(role: str) -> Invariant:
    def invariant(table: pa.Table) -> Iterator[Fault]:
        messages = table["messages"].to_pylist()
        yield Fault("messages", f"does not end with a turn of the {role}", np.array(
            [not turns or turns[-1]["role"] != role or turns[-1]["content"] is None for turns in messages], dtype=bool
        ))  # fmt: skip

    return invariant


def _dropped_with_reason(table: pa.Table) -> Iterator[Fault]:
    keep, reason = table["keep"], pc.is_valid(table["dropped"])
    yield Fault("dropped", "a reason on a kept row, or none on a dropped one", _where(pc.equal(keep, reason)))


def _at_least_two(column: str) -> Invariant:
    def invariant(table: pa.Table) -> Iterator[Fault]:
        yield Fault(column, "fewer than two", ragged.lengths(table[column]) < 2)

    return invariant


_KEY = ("prompt_id", "sample")
_PROMPT_ID = Field(
    "prompt_id", STRING, "first 16 hex digits of sha256 of the canonical messages; `#1` marks a second draw"
)
_SAMPLE = Field("sample", INT32, "index inside the group; -1 is the greedy response")
_MESSAGES = Field("messages", MESSAGES, "the conversation; ends with a turn of the user")
_SOURCE = Field("source", STRING, "where the row came from, e.g. `gsm8k/train`")
_PROMPT_TOKENS = Field("prompt_tokens", TOKENS, "exactly what the engine saw", "token id")
_RESPONSE_TOKENS = Field(
    "response_tokens", TOKENS, "what it wrote; includes the end token when finish is `stop`", "token id"
)
_OLD = Field(
    "old_logprobs",
    FLOATS,
    "the training stack's view of the policy that sampled, before the update",
    "nat",
    optional=True,
)
_REF = Field("ref_logprobs", FLOATS, "under the frozen reference", "nat", optional=True)
_VALUES = Field("values", FLOATS, "critic's estimate before token t is chosen", "reward", optional=True)

PROMPTS = Contract(
    "prompts", 1, "What the model is asked, and how its answers are graded.",
    (
        _PROMPT_ID,
        _MESSAGES,
        Field("answer", STRING, "reference answer; null where there is none (TTRL, RLSC, reward models)", null=True),
        Field("grader", STRING, "who compares a response with the answer: `math`, `exact`, `none`"),
        _SOURCE,
    ),
    key=("prompt_id",),
    invariants=(_last_turn("user"),),
)  # fmt: skip

DEMONSTRATIONS = Contract(
    "demonstrations", 1, "Conversations to imitate.",
    (
        _PROMPT_ID,
        Field("messages", MESSAGES, "the conversation; ends with a turn of the assistant"),
        _SOURCE,
    ),
    invariants=(_last_turn("assistant"),),
)  # fmt: skip

DOCUMENTS = Contract(
    "documents", 1, "Plain text for the pretraining mix (PPO-ptx).",
    (
        Field("document_id", STRING, "first 16 hex digits of sha256 of the text"),
        Field("text", STRING, "raw text, no chat template"),
        _SOURCE,
    ),
    key=("document_id",),
)  # fmt: skip

QUESTIONS = Contract(
    "questions", 1, "What annotators are asked to put in order: K different responses to one prompt.",
    (
        Field("question_id", STRING, "`q` and 16 hex digits of sha256 of the prompt and the response texts"),
        _PROMPT_ID,
        _MESSAGES,
        Field("responses", pa.list_(STRING), "the K >= 2 responses, all different, in an order that tells nothing"),
        Field("response_ids", pa.list_(STRING), "who each is: `prompt_id/sample` of the rollouts; same length"),
        Field("annotators", pa.list_(STRING), "who is asked; empty: anybody"),
        _SOURCE,
    ),
    key=("question_id",),
    invariants=(_last_turn("user"), _at_least_two("responses"), _same_length_as("responses", "response_ids")),
)  # fmt: skip

RANKINGS = Contract(
    "rankings", 1, "K responses to one prompt in order of preference; a preference pair is a ranking of two.",
    (
        Field("ranking_id", STRING, "one annotator's ranking of one set of responses"),
        _PROMPT_ID,
        _MESSAGES,
        Field("responses", pa.list_(STRING), "the K >= 2 responses"),
        Field("ranks", pa.list_(pa.int8()), "0 is best; equal numbers are ties and form no pair"),
        Field(
            "ratings", FLOATS, "how good each is to the annotator; differences are margins", "the annotator's points",
            null=True, optional=True,
        ),
        Field("annotator", STRING, "who ranked", null=True),
        Field("source", STRING, "where the row came from", null=True),
    ),
    key=("ranking_id",),
    invariants=(
        _last_turn("user"), _at_least_two("responses"), _same_length_as("responses", "ranks", "ratings"),
        _finite("ratings"),
    ),
)  # fmt: skip

ROLLOUTS = Contract(
    "rollouts", 1, "Sampled responses. The file metadata says under which distribution.",
    (
        _PROMPT_ID,
        _SAMPLE,
        _PROMPT_TOKENS,
        _RESPONSE_TOKENS,
        Field("response", STRING, "decoded, special tokens dropped; for graders and people"),
        Field(
            "sampler_logprobs", FLOATS,
            "under the sampling distribution of the file metadata; null when adopted without them", "nat", null=True,
        ),
        Field("finish", STRING, "`stop` or `length`"),
        Field("seed", INT64, "of this request"),
        Field(
            "staleness", INT32, "updates between the policy that sampled and the one that learns; absent: none",
            "updates", optional=True,
        ),
    ),
    key=_KEY,
    group="prompt_id",
    invariants=(
        _not_empty("prompt_tokens"),
        _not_empty("response_tokens"),
        _same_length_as("response_tokens", "sampler_logprobs"),
        _logprobs("sampler_logprobs"),
        _one_of("finish", "stop", "length"),
    ),
)  # fmt: skip

LABELS = Contract(
    "labels", 2, "The reward of every response; which rows train, and why the others do not.",
    (
        _PROMPT_ID,
        _SAMPLE,
        Field("reward", FLOAT32, "what the labeler said, before any shaping", "reward"),
        Field("correct", BOOL, "what the labeler takes for right; null where it does not say", null=True),
        Field(
            "gold", BOOL, "right by the reference answer; for people and metrics, no piece may read it", null=True
        ),
        Field("extracted", STRING, "answer found in the response", null=True),
        Field("target", STRING, "what the labeler compared it with: the reference or the majority's answer", null=True),
        Field("verdict", STRING, "correct, wrong, no answer, bad reference, timeout, error", null=True),
        Field("vote_share", FLOAT32, "share of the group whose extracted answer is this one", "fraction", null=True),
        Field("keep", BOOL, "does training use this row"),
        Field("dropped", STRING, "why not: `constant outcomes`, `surplus group`, `no verdict`, ...", null=True),
    ),
    key=_KEY,
    group="prompt_id",
    invariants=(_finite("reward"), _dropped_with_reason),
)  # fmt: skip

SCORES = Contract(
    "scores", 1, "What models say of finished text. A column is absent when the recipe does not need it.",
    (
        _PROMPT_ID,
        _SAMPLE,
        _OLD,
        _REF,
        _VALUES,
        Field("reward_scores", FLOAT32, "the reward model's score of the whole response", "reward", optional=True),
    ),
    key=_KEY,
    group="prompt_id",
    invariants=(_logprobs("old_logprobs"), _logprobs("ref_logprobs"), _finite("values"), _finite("reward_scores")),
)  # fmt: skip

PERPLEXITIES = Contract(
    "perplexities", 1, "How well a policy predicts plain text; what a policy has lost of it is the alignment tax.",
    (
        Field("document_id", STRING, "of the documents"),
        Field("tokens", INT32, "predicted tokens: all but the first of each window", "token"),
        Field("nll", FLOAT64, "sum over them of -log p; perplexity is exp(nll / tokens)", "nat"),
    ),
    key=("document_id",),
    invariants=(
        _elements("tokens", "no token", lambda x: x < 1),
        _elements("nll", "not finite and >= 0", lambda x: ~np.isfinite(x) | (x < 0)),
    ),
)  # fmt: skip

ADVANTAGES = Contract(
    "advantages", 2, "The training table: all that `value` and `update` read.",
    (
        _PROMPT_ID,
        _SAMPLE,
        _PROMPT_TOKENS,
        _RESPONSE_TOKENS,
        Field("advantages", FLOATS, "credit of each token", "reward, or 1 if normalized"),
        Field("returns", FLOATS, "the critic's regression target", "reward", null=True),
        _OLD,
        _REF,
        _VALUES,
        Field(
            "sampler_logprobs", FLOATS, "the engine's, where no model has read them again (no old_logprobs)", "nat",
            null=True, optional=True,
        ),
        Field("reward", FLOAT32, "before shaping", "reward"),
        Field("shaped_reward", FLOAT32, "sum over tokens after shaping", "reward"),
        Field("correct", BOOL, "for losses that imitate correct responses", null=True),
        Field("finished", BOOL, "False: the response was cut at the length limit"),
    ),
    key=_KEY,
    group="prompt_id",
    invariants=(
        _not_empty("response_tokens"),
        _same_length_as(
            "response_tokens", "advantages", "returns", "old_logprobs", "ref_logprobs", "values", "sampler_logprobs"
        ),
        _finite("advantages"),
        _finite("returns"),
        _logprobs("old_logprobs"),
        _logprobs("sampler_logprobs"),
        _logprobs("ref_logprobs"),
        _finite("values"),
    ),
)  # fmt: skip

METRICS = Contract(
    "metrics", 1, "What a stage measured, in long form; one small file inside each artifact.",
    (
        Field("run", STRING, "name of the run's directory"),
        Field("iteration", INT32, "walk of the loop; null outside it", null=True),
        Field("stage", STRING, "directory of the artifact, e.g. `labels-0`"),
        Field("step", INT64, "optimizer step inside the stage; 0 for a number about the whole"),
        Field("name", STRING, "`area/what`, e.g. `reward/mean`"),
        Field("value", FLOAT64, "the number"),
        Field("unit", STRING, "its unit"),
    ),
)  # fmt: skip

POLICY = Contract(
    "policy",
    1,
    "A language model as an ordinary Hugging Face directory; optimizer state in `trainer/` beside it.",
)

REWARD_MODEL = Contract(
    "reward_model",
    1,
    "`AutoModelForSequenceClassification`, one label: a whole response in, its score out. The score that stages use is "
    "the head's plus `reward_bias` of config.json.",
)

CRITIC = Contract(
    "critic",
    1,
    "`AutoModelForTokenClassification`, one label: the value before each token; optimizer state in `trainer/`.",
)

CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        PROMPTS, DEMONSTRATIONS, DOCUMENTS, QUESTIONS, RANKINGS, ROLLOUTS, LABELS, SCORES, PERPLEXITIES, ADVANTAGES,
        METRICS, POLICY, REWARD_MODEL, CRITIC,
    )
}  # fmt: skip
