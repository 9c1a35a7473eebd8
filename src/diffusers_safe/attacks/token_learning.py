"""Learning of a word by textual inversion (Gal et al., arXiv 2208.01618), also with several text encoders."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ..arguments import typed
from ..diffusion.generators import sample_generator
from ..diffusion.loss_weighting import LOSS_WEIGHTINGS, LossWeighting
from ..diffusion.noise import NoiseSchedule
from ..diffusion.sample_order import EpochOrder
from ..families import ModelFamily, make_family
from ..files import save_tensors
from ..output_folders import OutputFolderError
from ..progress import ProgressBar, ProgressCallback
from ..provenance import fingerprint
from ..training.pictures.images import Preprocessing
from ..values import choose
from .token import TOKEN_NAME, added_token, read_token, save_token, text_parts


TOKEN = "<inverted>"
CHECKPOINT_NAME = "checkpoint.safetensors"


@typed
@dataclass(frozen=True)
class InversionSettings:
    """How a word is learned.

    Attributes:
        steps (`int`, defaults to 1000): Steps of the optimizer.
        batch_size (`int`, defaults to 4): Noisy images a step.
        learning_rate (`float`, defaults to 5e-3): Of AdamW, constant, without weight decay; at most 1.
        loss_space (`str`, defaults to `"prediction"`): As in the papers, or `"velocity"`, which counts high noise
            levels more; see [`LossWeighting`].
        initializer (`str`, *optional*): Words whose mean embedding is the start; default the concept's own, as the
            authors' scripts have it.
        num_pictures (`int`, defaults to 8): Images that the original model generates if none are given.
        seed (`int`, defaults to 0): Seed of all random numbers.
        checkpointing_steps (`int`, defaults to 100): Steps after which the state is saved; 0 for never.

    Raises:
        `ValueError`: If a value is out of its range.
    """

    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 5e-3
    loss_space: str = "prediction"
    initializer: str | None = None
    num_pictures: int = 8
    seed: int = 0
    checkpointing_steps: int = 100

    def __post_init__(self):
        for name in ("steps", "batch_size", "num_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"inversion_{name} {getattr(self, name)}: must be at least 1")
        for name in ("seed", "checkpointing_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"inversion_{name} {getattr(self, name)}: must be at least 0")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"inversion_learning_rate {self.learning_rate}: must be above 0 and at most 1")
        object.__setattr__(self, "loss_space", choose("inversion_loss_space", self.loss_space, LOSS_WEIGHTINGS))
        if self.initializer is not None and not self.initializer.strip():
            raise ValueError("inversion_initializer: must not be blank")


def check_learnable(scheduler: SchedulerMixin, loss_space: str) -> tuple[NoiseSchedule, LossWeighting]:
    """How noise is added and errors are weighed in a model with this scheduler.

    Raises:
        `ValueError`: If its predictions are of another kind, or cannot be converted.
    """
    noise = NoiseSchedule(scheduler)
    return noise, LossWeighting(loss_space, noise.scheduler)


def learn_token(
    pipeline: DiffusionPipeline,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    folder: str | Path,
    settings: InversionSettings,
    initializer: str,
    resolution: int | None = None,
    description: str = "inversion",
    overwrite: bool = False,
    callback: ProgressCallback | None = None,
) -> Path:
    """Learns the embedding of `TOKEN`, of each text encoder one, with everything else frozen.

    A sample is a function of (seed, step, place in its batch), so a run that was stopped continues from its last
    checkpoint to the same result; on a CPU bit for bit, on one machine with the same libraries and number of threads.
    A word that is there is not learned again.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Of a family of `families`; as before afterwards.
        pictures (`Sequence[PIL.Image.Image]`): At least one; the middle of each is used.
        captions (`Sequence[str]`): One of each image, with `TOKEN` in it.
        folder (`str` or `Path`): Where `learned_embeds.safetensors` goes, and until then the checkpoint.
        settings ([`InversionSettings`]): How.
        initializer (`str`): Words whose mean embedding is the start.
        resolution (`int`, *optional*): Height and width of the images, in pixels; the model's own if left out.
        description (`str`, defaults to `"inversion"`): Name of the progress bar.
        overwrite (`bool`, defaults to `False`): Replace a word that was learned from something else.
        callback (`Callable[[Progress], None]`, *optional*): Called with a [`Progress`] after each step. What it raises
            ends the learning; the last checkpoint stays.

    Returns:
        `Path`: Of the file, which `pipeline.load_textual_inversion` takes; of SDXL's two text encoders it has one
        vector each.

    Raises:
        `ValueError`: If the model's family or dtype is not supported, it cannot be trained so, or the folder holds a
            word that was learned from something else.
        `FloatingPointError`: If the loss or the embedding is not finite.
    """
    family = make_family(pipeline, resolution)
    if pipeline.dtype == torch.float16:
        raise ValueError("dtype float16: small gradients of inversion would be lost; use float32 or bfloat16")
    path, checkpoint = Path(folder) / TOKEN_NAME, Path(folder) / CHECKPOINT_NAME
    identity = _identity(family, pictures, captions, settings, initializer)
    if path.exists() and read_token(path)[2] != identity:
        if not overwrite:
            raise OutputFolderError(
                f"{path}: was learned on another model, from other images or with other settings; give another "
                "folder, or --overwrite to replace it"
            )
        path.unlink()
    if path.exists():
        checkpoint.unlink(missing_ok=True)  # left where a run was killed
        return path

    examples = Examples(family, pictures, captions, settings)
    vectors = [nn.Parameter(start.to(pipeline.device)) for start in _starts(pipeline, initializer)]
    optimizer = torch.optim.AdamW(vectors, lr=settings.learning_rate, weight_decay=0.0)
    first = _load_checkpoint(checkpoint, identity, vectors, optimizer, overwrite)
    bar = ProgressBar(description, settings.steps, first, "step", callback)
    with bar, torch.enable_grad(), _learnable(pipeline, vectors):
        for done in range(first + 1, settings.steps + 1):
            loss = examples.loss(done - 1)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{description}: the loss of step {done} is {loss.item()}; learn more slowly")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not all(torch.isfinite(vector).all() for vector in vectors):
                raise FloatingPointError(f"{description}: step {done} left no finite embedding; learn more slowly")
            if settings.checkpointing_steps and done % settings.checkpointing_steps == 0 and done < settings.steps:
                _save_checkpoint(checkpoint, identity, done, vectors, optimizer)
            bar.update()
    save_token(path, TOKEN, vectors, identity, family.token_names)
    checkpoint.unlink(missing_ok=True)
    return path


class Examples:
    """The images and captions that a word is learned from, and the loss of each step."""

    def __init__(
        self,
        family: ModelFamily,
        pictures: Sequence[Image.Image],
        captions: Sequence[str],
        settings: InversionSettings,
    ):
        self.family, self.captions, self.settings = family, captions, settings
        self.device = family.pipeline.device
        self.noise, self.space = check_learnable(family.pipeline.scheduler, settings.loss_space)
        preprocessing = Preprocessing(family.picture_size, center_crop=True)
        crops = [preprocessing.crop(picture, torch.Generator()).pixel_values[None] for picture in pictures]
        self.moments = torch.cat([family.encode_pictures(crop, self.device) for crop in crops])
        self.order = EpochOrder(len(pictures), settings.seed)

    def loss(self, step: int) -> torch.Tensor:
        """The mean over the samples of a step, counted from 0; its gradients go through the text encoders."""
        size, family = self.settings.batch_size, self.family
        numbers = range(step * size, (step + 1) * size)
        places = [next(self.order.candidates(number)) for number in numbers]
        latents = family.draw_latents(self.moments[places], self._generators("latents", numbers))
        noisy = self.noise.add(latents, self._generators("noise", numbers))
        conditioning = family.encode_with_gradients([self.captions[place] for place in places], self.device)
        model_input = noisy.model_input.to(family.denoiser.dtype)
        prediction = family.predict(family.denoiser, model_input, noisy.timesteps, conditioning)
        losses = (prediction.float() - noisy.target).square().mean(dim=(1, 2, 3))
        return self.space.weigh(losses, noisy.timesteps).mean()

    def _generators(self, purpose: str, numbers: range) -> list[torch.Generator]:
        return [sample_generator(self.settings.seed, purpose, number) for number in numbers]


def _identity(
    family: ModelFamily,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    settings: InversionSettings,
    initializer: str,
) -> dict:
    """What decides the word that is learned."""
    examples = hashlib.sha256()
    for picture, caption in zip(pictures, captions, strict=True):
        examples.update(f"{picture.size} {caption}".encode() + picture.tobytes())
    free = ("initializer", "num_pictures", "checkpointing_steps")
    return {
        "denoiser": fingerprint(family.denoiser),
        **family.encoding_identity,
        "pictures": examples.hexdigest()[:16],
        "resolution": family.picture_size,
        "initializer": initializer,
        **{name: value for name, value in asdict(settings).items() if name not in free},
    }


def _starts(pipeline: DiffusionPipeline, words: str) -> list[torch.Tensor]:
    """The mean embedding of some words in each text encoder, float32."""
    starts = []
    for tokenizer, encoder in text_parts(pipeline).values():
        numbers = tokenizer(words, add_special_tokens=False).input_ids
        starts.append(encoder.get_input_embeddings().weight.detach()[numbers].float().mean(dim=0))
    return starts


@contextmanager
def _learnable(pipeline: DiffusionPipeline, vectors: list[nn.Parameter]) -> Iterator[None]:
    """A pipeline that knows `TOKEN` by these vectors, which are all that takes gradients."""
    with ExitStack() as stack:
        stack.enter_context(added_token(pipeline, TOKEN, vectors))
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                stack.enter_context(_frozen(module))
        for (tokenizer, encoder), vector in zip(text_parts(pipeline).values(), vectors):
            stack.enter_context(_embedded(encoder, tokenizer.convert_tokens_to_ids(TOKEN), vector))
        yield


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of it takes gradients."""
    learns = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learns:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)


@contextmanager
def _embedded(encoder: PreTrainedModel, number: int, vector: torch.Tensor) -> Iterator[None]:
    """A text encoder that takes this vector for the embedding of a token, whatever its table says: gradients reach
    the vector, and no table."""

    def put_in(module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == number).unsqueeze(-1), vector.to(embeddings.dtype), embeddings)

    handle = encoder.get_input_embeddings().register_forward_hook(put_in)
    try:
        yield
    finally:
        handle.remove()


def _save_checkpoint(
    path: Path, identity: dict, step: int, vectors: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Writes the vectors and the optimizer's moments of each, whole or not at all."""
    tensors = {
        f"{number} {name}": value.detach().cpu().contiguous()
        for number, vector in enumerate(vectors)
        for name, value in {"vector": vector, **optimizer.state[vector]}.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {"state": json.dumps({"identity": identity, "step": step}, sort_keys=True)})


def _load_checkpoint(
    path: Path, identity: dict, vectors: list[nn.Parameter], optimizer: torch.optim.Optimizer, overwrite: bool
) -> int:
    """The step to go on from, with vectors and optimizer as they were then; 0 where there is no checkpoint, or one of
    another run that may be replaced."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        same, step = state["identity"] == identity, state["step"]
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: broken checkpoint ({error}); delete it to learn anew") from None
    if not same and overwrite:
        return 0
    if not same:
        raise OutputFolderError(
            f"{path}: is of another model, other images or other settings; give another folder, or --overwrite to "
            "replace it"
        )
    for number, vector in enumerate(vectors):
        own = {name.split()[1]: value for name, value in tensors.items() if name.split()[0] == str(number)}
        vector.data.copy_(own.pop("vector"))
        optimizer.state[vector] = {name: value if name == "step" else value.to(vector) for name, value in own.items()}
    return step
