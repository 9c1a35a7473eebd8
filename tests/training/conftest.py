import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusers_safe.backbones import make_backbone
from diffusers_safe.training.erasure_arguments import SDDArguments
from diffusers_safe.training.erasure_loop import ErasureLoop


@pytest.fixture
def make_loop(make_tiny_pipeline, tmp_path):
    """The function that makes a loop of a few steps on a tiny model: `folder` in `tmp_path` for its output, the
    `kind` of its arguments, whose `changes` go over those below, and its `mixed_precision` and `pipeline`."""

    def make(folder="run", kind=SDDArguments, mixed_precision="no", pipeline=None, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = {
            "pretrained_model_name_or_path": "tiny",
            "concepts": ["knife", "gun"],
            "output_dir": str(tmp_path / folder),
            "num_inference_steps": 4,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            **({"ema_decay": 0.5} if kind is SDDArguments else {}),
            "watch_prompts": ["a cat"],
            "checkpointing_steps": 0,
        }
        args = kind(**{**settings, **changes})
        backbone = make_backbone(pipeline or make_tiny_pipeline())
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        return ErasureLoop(accelerator, backbone, args.make_objective(), args, args.ema_decay)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
