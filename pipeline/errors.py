"""What can go wrong, as a tree.

    PipelineError                 exit code 1: a run or a check failed
    ├── ExperimentError           exit code 2: the request is wrong; found before any model is loaded
    │   ├── RecipeError           no such piece, a bad setting, an unmet need
    │   └── InputError            a file from outside cannot be used as asked (names file and line)
    ├── ContractError             a dataset breaks its schema or its invariants (names file, column, keys)
    ├── ArtifactError             an artifact is missing, of the wrong kind, in conflict, or pruned
    ├── StorageError              the disk is full, read-only or failing; nothing committed is harmed
    ├── BusyError                 another process is at it (names which)
    ├── EngineError               the sampler failed; finished responses are kept; worth another try
    ├── GraderError               the graders failed as a whole; finished judgements are kept; worth another try
    ├── NumericsError             a loss is not finite, a log-probability is impossible (names the rows)
    ├── GateError                 what a run measured says that it should not go on; all of it stays readable
    └── WaitingError              people have to do something before the run can go on (names what and where)

Every message has up to three parts: what is wrong (with the value found), where, and what to do next.
A new error goes under the branch whose exit code is right for it and stays picklable: keep `__init__` as it is.
"""

from typing import Self


class PipelineError(Exception):
    """Anything this project raises on purpose.

    `what` states the fault with the value found, `where` the path, column or rows, `do` the next thing to type.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", do: str = "") -> None:
        super().__init__(what, where, do)
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  next:  {self.do}")
        return "\n".join(lines)


class ExperimentError(PipelineError):
    """The experiment or the command line asks for something that cannot be."""

    exit_code = 2


class RecipeError(ExperimentError):
    """A recipe names no piece, sets what cannot be set, or needs what is not there."""


class InputError(ExperimentError):
    """A file from outside cannot be read as asked."""


class ContractError(PipelineError):
    """A dataset breaks its contract."""

    exit_code = 2


class ArtifactError(PipelineError):
    """An artifact is missing, incomplete, of another kind, in conflict, or pruned."""

    exit_code = 2


class StorageError(PipelineError):
    """A file cannot be written or read: the disk is full, read-only or failing."""


class BusyError(PipelineError):
    """Another process holds what is asked for."""

    @classmethod
    def second(cls, where: object, why: str = "") -> Self:
        """For what another process has finished meanwhile."""
        return cls(
            "another process committed first" + (f" ({why})" if why else ""), str(where), "run again: it will be reused"
        )


class EngineError(PipelineError):
    """The sampler failed. What it had finished is kept, and another try may go well."""


class GraderError(PipelineError):
    """The graders failed as a whole. What they had judged is kept, and another try may go well."""


class NumericsError(PipelineError):
    """A number that cannot be: a loss that is not finite, a log-probability above zero."""


class GateError(PipelineError):
    """A gate between stages says that the run should not go on. Everything made so far stays."""


class WaitingError(PipelineError):
    """The run goes on when people have done their part; then run it again."""
