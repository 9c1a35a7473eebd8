"""Law 3: options are values. Parsing opens no file, no model and no connection."""

import sys
from contextlib import contextmanager

import pytest

from diffusers_safe.arguments import OptionGroups, declared_options
from diffusers_safe.distillation.options import DistillationOptions
from diffusers_safe.erasure.job import erasure_options
from diffusers_safe.methods import METHODS


ACCESS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "socket.connect",
          "socket.getaddrinfo", "subprocess.Popen", "tempfile.mkdtemp")  # fmt: skip
KINDS = {**{name: erasure_options(method) for name, method in METHODS.items()}, "distillation": DistillationOptions}
VALUES = {
    "pretrained_model_name_or_path": "no/such-model",
    "output_dir": "no/such/folder",
    "concepts": ["artists.txt"],
    "retain_prompts": ["others.txt"],
    "validation_prompts": ["prompts.txt"],
    "resume_from_checkpoint": "latest",
    "push_to_hub": True,
    "report_to": "wandb",
    "use_8bit_adam": True,
    "train_data_dir": "no/such/data",
    "student": "bk-small",
    "evaluation": "no-such.yaml",
    "anchor_prompt": "a painting",
}
seen: list | None = None


@contextmanager
def accesses():
    """The names of what is opened inside the block."""
    global seen
    seen = []
    try:
        yield seen
    finally:
        seen = None


def listen(event, arguments):
    if seen is not None and event in ACCESS:
        seen.append(f"{event} {arguments[:1]}")


sys.addaudithook(listen)


@pytest.mark.parametrize("name", KINDS)
def test_parsing_opens_nothing(name):
    kind = KINDS[name]
    values = {option: value for option, value in VALUES.items() if option in declared_options(kind)}
    kind.of(**values)  # imports of the first time
    with accesses() as opened:
        options = kind.of(**values)
        assert options.flat["output_dir"] == "no/such/folder" and options.recorded and options.identity
    assert not opened


def test_what_is_opened_is_seen(tmp_path):
    with accesses() as opened:
        (tmp_path / "a.txt").write_text("")
    assert opened and opened[0].startswith("open")


@pytest.mark.parametrize("name", KINDS)
def test_the_values_of_all_options_make_the_same_options_again(name):
    kind = KINDS[name]
    options = kind.of(**{option: value for option, value in VALUES.items() if option in declared_options(kind)})
    again = kind.of(**options.flat)
    assert isinstance(options, OptionGroups) and again == options
    assert kind.of(**{**options.flat, "seed": 7}) == options.with_values(seed=7) != options
