"""Per-timestep loss weights: how much the errors of predictions count at each noise level."""

import torch
from diffusers import SchedulerMixin

from ..values import choose
from .noise import FLOW, prediction_type


LOSS_WEIGHTINGS = ("prediction", "velocity")
LOSS_SPACE_HELP = (
    "Per-timestep loss weights: prediction (no weights: squared errors of the model's own output, as in the papers) "
    "or velocity (squared errors of the velocity, which gives high noise levels more weight)."
)


class LossWeighting:
    """Weights under which a squared error of the model's predictions is one of something else.

    At a given latent, velocity (Salimans and Ho, arXiv 2202.00512) is epsilon / sqrt(alphas_cumprod) plus what does
    not depend on the model. A small error of epsilon is therefore a large one of velocity at high noise levels, where
    it is decided what an image shows. The velocity of flow matching is a velocity already.

    Args:
        name (`str`): One of `LOSS_WEIGHTINGS`: `"prediction"`, what the model predicts, as in the papers, or
            `"velocity"`.
        scheduler (`SchedulerMixin`): Of the model: its noise levels, and what is predicted.

    Raises:
        `ValueError`: If the name is unknown, or predictions of this kind cannot be converted.
    """

    def __init__(self, name: str, scheduler: SchedulerMixin):
        name = choose("loss_space", name, LOSS_WEIGHTINGS)
        kind = prediction_type(scheduler)
        if name == "velocity" and kind not in ("epsilon", "v_prediction", FLOW):
            raise ValueError(f"loss_space velocity: the model predicts '{kind}'; it must be epsilon or v_prediction")
        self._weights = None
        if name == "velocity" and kind == "epsilon":
            alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
            if alphas_cumprod is None or not alphas_cumprod.min() > 0:
                raise ValueError(
                    f"loss_space velocity: {type(scheduler).__name__} has no noise levels above 0; use prediction"
                )
            self._weights = 1 / alphas_cumprod

    def weigh(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Losses of samples at timesteps, all `(B,)`, weighted."""
        if self._weights is None:
            return losses
        return losses * self._weights.to(losses)[timesteps.round().long()]
