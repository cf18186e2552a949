"""A running average of a policy's weights, kept beside them as a checkpoint of its own."""

from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ArtifactError
from pipeline.models import checkpoint
from pipeline.models.distributed import like, own
from pipeline.training.progress import State, Weights

FOLDER = "ema"
"""Where the average lies in a policy: an ordinary Hugging Face directory."""


class Average:
    """Exponential moving average of all weights, in float32.

        e <- decay * e + (1 - decay) * w          after every optimizer step

    InstructGPT has 0.992 (arXiv:2203.02155, appendix C.4) and does not say after what; per optimizer step is ours.
    """

    def __init__(self, model: Any, decay: float, policy: Path) -> None:
        """Go on from the average in `policy`, or start from the weights of `model` where there is none.

        Raises `ArtifactError` for an average that cannot be loaded or is of another shape.
        """
        self.model, self.decay = model, decay
        place = policy / FOLDER
        weights = Weights(model).state().tensors
        self.tensors = {name: own(value).detach().float().clone() for name, value in weights.items()}
        if not place.is_dir():
            return
        checkpoint.inspect(place)
        try:
            self.resume(Weights(checkpoint.load_policy(place, "float32")).state())
        except (ValueError, LookupError) as error:
            raise ArtifactError(
                f"the average is not one of this policy's weights: {error}", str(place), "delete it to start anew"
            ) from error

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Take the weights after optimizer step number `step` into the average; False: there is no reason to stop."""
        for name, weight in self.model.named_parameters():
            self.tensors[name].lerp_(own(weight).float(), 1 - self.decay)
        return False

    def state(self) -> State:
        """The average so far."""
        return State(self.tensors, {})

    def resume(self, state: State) -> None:
        """Go on from that average."""
        for name, value in Weights(self.model).state().tensors.items():
            self.tensors[name].copy_(own(like(state.tensors[name], value)))

    def save(self, tokenizer: Any, policy: Path) -> None:
        """Write the average into the directory of the policy; the model has its weights afterwards."""
        Weights(self.model.float()).resume(self.state())
        checkpoint.save(self.model, tokenizer, policy / FOLDER)
