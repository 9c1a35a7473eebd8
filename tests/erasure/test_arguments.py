from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusers_safe.erasure.job import make_options, parse_options
from diffusers_safe.methods.esd import ESD_PRESETS, presets_table


@pytest.fixture
def arguments(tiny_model_folder, tmp_path):
    """Good arguments as a function of what to change."""

    def make(**changes):
        good = {
            "pretrained_model_name_or_path": tiny_model_folder,
            "concepts": ["knife"],
            "output_dir": str(tmp_path / "out"),
        }
        return {**good, **changes}

    return make


BAD_VALUES = {
    "train_method": ("everything", "xattn, xattn-strict"),
    "concepts": ([], "at least one concept"),
    "concept_schedule": ("turns", "iterative, random"),
    "prompt_order": ("none", "paper, repository, matched"),
    "max_train_steps": (-1, "at least 1"),
    "train_batch_size": (0, "at least 1"),
    "gradient_accumulation_steps": (0, "at least 1"),
    "num_inference_steps": (0, "at least 1"),
    "checkpointing_steps": (-5, "at least 0"),
    "checkpoints_total_limit": (0, "at least 1"),
    "learning_rate": (0.0, "greater than 0"),
    "max_grad_norm": (-1.0, "at least 0"),
    "mixed_precision": ("fp8", "no, fp16, bf16"),
    "report_to": ("paper", "tensorboard, wandb, none"),
    "adam_beta1": (1.0, "less than 1"),
    "ema_decay": (1.0, "less than 1"),
    "retain_weight": (-1.0, "at least 0"),
    "sdd_target": ("ema", "student, frozen"),
    "lr_scheduler": ("steep", "constant"),
    "loss_space": ("image", "prediction, velocity"),
    "negative_guidance_scale": (-0.5, "at least 0"),
    "target_prompt": ("a big Knife", "names knife"),
    "save": ("all", "full, partial, both, unet, transformer"),
    "rank": (0, "at least 1"),
    "lora_alpha": (4.0, "needs --rank"),
    "seed": (-1, "at least 0"),
    "sampling_guidance_scale": (float("inf"), "finite"),
    "sampling_fraction": (0.0, "greater than 0 and at most 1"),
    "latents_per_trajectory": (51, "at most 50"),
    "trajectory_pool": (-1, "at least 0"),
    "lr_warmup_steps": (5, "constant_with_warmup"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_name_argument_value_and_what_is_allowed(arguments, name):
    value, allowed = BAD_VALUES[name]
    with pytest.raises(ValueError) as error:
        make_options("sdd", **arguments(**{name: value}))
    message = str(error.value)
    assert name in message and str(value) in message and allowed in message and "\n" not in message


@pytest.mark.parametrize("changes, message", [
    ({"rank": -4}, "rank -4: must be at least 1"),
    ({"rank": 4, "lora_alpha": 0.0}, "lora_alpha 0.0: must be greater than 0"),
    ({"rank": 4, "save": "partial"}, "save 'partial': allowed with --rank are lora, full, both, unet, transformer"),
    ({"save": "lora"}, "save 'lora': allowed without --rank are full, partial, both, unet, transformer"),
])  # fmt: skip
def test_bad_values_around_rank(arguments, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_options("sdd", **arguments(**changes))


def test_what_rank_decides_where_nothing_else_is_said(arguments):
    plain, lora = make_options("sdd", **arguments()).flat, make_options("sdd", **arguments(rank=4)).flat
    assert (plain["rank"], plain["lora_alpha"], plain["save"]) == (None, None, "full")
    assert (lora["rank"], lora["lora_alpha"], lora["save"]) == (4, 4.0, "lora")
    assert make_options("sdd", **arguments(rank=4, lora_alpha=2.0, save="full")).output.save == "full"


def test_nan_is_no_learning_rate(arguments):
    with pytest.raises(ValueError, match="learning_rate nan: must be a finite number"):
        make_options("sdd", **arguments(learning_rate=float("nan")))


def test_a_concept_cannot_be_erased_and_retained(arguments):
    with pytest.raises(ValueError, match="cannot be erased and retained"):
        make_options("sdd", **arguments(retain_prompts=["cat", "knife"]))


@pytest.mark.parametrize("concept, prompt", [("banana", "a Banana"), ("bananas", "a banana"), ("knife", "two knives")])
def test_a_retained_prompt_that_names_a_concept_is_an_error_that_names_both(arguments, concept, prompt):
    with pytest.raises(ValueError, match=f"^retain_prompts '{prompt}': names the concept '{concept}'; "):
        make_options("sdd", **arguments(concepts=["gun", concept], retain_prompts=["cat", prompt]))


@pytest.mark.parametrize("name", ["concepts", "retain_prompts", "watch_prompts", "validation_prompts"])
def test_a_text_where_a_list_belongs_is_one_entry(arguments, name):
    assert make_options("sdd", **arguments(**{name: "dog"})).flat[name] == ["dog"]


def test_a_watched_prompt_that_names_a_concept_is_left_out_and_reported(arguments, caplog):
    assert make_options("sdd", **arguments(watch_prompts=["knives", "a cat"])).retention.watch_prompts == ["a cat"]
    assert caplog.messages == ["watch_prompts 'knives': left out, it names the concept 'knife'"]
    caplog.clear()
    make_options("sdd", **arguments(concepts=["cat"]))
    assert not caplog.messages  # the default prompts


def test_a_run_of_too_many_samples(arguments):
    with pytest.raises(ValueError, match="max_train_steps 100000000: with train_batch_size 65536 .* at most"):
        make_options("sdd", **arguments(max_train_steps=10**8, train_batch_size=2**16))


def test_aliases_become_the_method_they_mean(arguments):
    assert make_options("sdd", **arguments(train_method="esd-x")).weights.train_method == "xattn"


def run(capsys, **options):
    argv = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    with pytest.raises(SystemExit) as stop:
        parse_options("sdd", argv)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pretrained_model_name_or_path": "no/such/model/here"}, "no/such/model/here"),
        ({"concepts": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"train_method": "half"}, "train_method 'half': unknown"),
        ({"max_train_steps": -3}, "max_train_steps -3"),
        ({"rank": 0}, "rank 0: must be at least 1"),
        ({"output_dir": "/proc/nowhere/out"}, "output_dir /proc/nowhere/out: cannot be written"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint in"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7: no such folder"),
        ({"resume_from_checkpoint": "somewhere"}, "not a folder named checkpoint-"),
    ],
)
def test_command_line_errors_are_one_line_and_write_nothing(capsys, tmp_path, arguments, changes, message):
    options = {name: " ".join(value) if isinstance(value, list) else value for name, value in arguments().items()}
    code, lines = run(capsys, **{**options, **changes})
    assert code == 2
    assert len(lines) == 1 and message in lines[0] and "error:" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_pipeline(capsys, tmp_path, arguments):
    options = {name: " ".join(value) if isinstance(value, list) else value for name, value in arguments().items()}
    (tmp_path / "empty").mkdir()
    code, lines = run(capsys, **{**options, "pretrained_model_name_or_path": tmp_path / "empty"})
    assert code == 2 and len(lines) == 1 and "model_index.json" in lines[0]


def test_a_family_that_is_not_supported(capsys, tmp_path, arguments):
    options = {name: " ".join(value) if isinstance(value, list) else value for name, value in arguments().items()}
    (tmp_path / "sana").mkdir()
    (tmp_path / "sana" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    code, lines = run(capsys, **{**options, "pretrained_model_name_or_path": tmp_path / "sana"})
    assert code == 2 and "SanaPipeline" in lines[0] and "StableDiffusionPipeline" in lines[0]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--seed", "3"], "the following arguments are required: --pretrained_model_name_or_path, --output_dir"),
        (["--concept", "knife"], "unrecognized arguments: --concept (did you mean --concepts?)"),
        (["--concepts"], "expected at least one argument"),
        (["--max_train_steps", "1.5"], "max_train_steps '1.5': must be a whole number"),
    ],
)
def test_what_argparse_refuses_is_one_line_too(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parse_options("sdd", argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0] and "SECRET" not in lines[0]


def test_an_earlier_run_is_not_mixed_with_a_new_one(capsys, tmp_path, arguments):
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-500" / "random_states_0.pkl").touch()
    options = {name: " ".join(value) if isinstance(value, list) else value for name, value in arguments().items()}
    code, lines = run(capsys, **options)
    assert code == 2 and "holds checkpoints of an earlier run" in lines[0]
    code, lines = run(capsys, **options, resume_from_checkpoint="latest", max_train_steps=100)
    assert code == 2 and "checkpoint-500 is already at step 500" in lines[0]


def test_the_base_model_is_not_overwritten(capsys, tiny_model_folder, arguments):
    code, lines = run(
        capsys, pretrained_model_name_or_path=tiny_model_folder, concepts="knife", output_dir=tiny_model_folder
    )
    assert code == 2 and "is the base model's own folder" in lines[0]


def test_prompts_that_name_a_concept_are_not_watched_as_unrelated(arguments):
    assert make_options("sdd", **arguments(concepts=["cat"])).retention.watch_prompts == [
        "a tree",
        "a car",
        "an apple",
    ]


def test_what_is_said_about_the_hub_is_checked(arguments):
    with pytest.raises(ValueError, match="hub_model_id, hub_private: without --push_to_hub nothing is published"):
        make_options("sdd", **arguments(hub_model_id="user/name", hub_private=True))
    with pytest.raises(ValueError, match="hub_model_id 'a/b/c': not a name of a repository; give user/name"):
        make_options("sdd", **arguments(push_to_hub=True, hub_model_id="a/b/c"))
    with pytest.raises(ValueError, match="hub_model_id 'my model': not a name of a repository"):
        make_options("sdd", **arguments(push_to_hub=True, output_dir="runs/my model"))
    assert make_options("sdd", **arguments(push_to_hub=True)).hub.hub_model_id == "out"


def test_the_token_is_shown_and_recorded_nowhere(arguments):
    args = make_options("sdd", **arguments(push_to_hub=True, hub_token="hf_secret"))
    assert "hf_secret" not in repr(args) + str(args.recorded)
    assert args.recorded.keys() >= {"concepts", "seed", "ema_decay"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "esd-2026"}, "preset 'esd-2026': unknown; allowed are paper, esd-2025"),
        ({"sampling_model": "ema"}, "sampling_model 'ema': unknown; allowed are student, frozen"),
        ({"erase_from": " "}, "erase_from ' ': is empty"),
        ({"erase_from": "a cat", "retain_prompts": ["a cat"]}, "retain_prompts 'a cat': is what the concepts"),
        (
            {"preset": "esd-2025-xl", "learning_rate": 2e-4, "train_method": "esd-u"},
            "preset esd-2025-xl has it for esd-x only; with train_method esd-u the code of 2025 takes 1e-5",
        ),
        ({"negative_guidance_scale": -1.0}, "negative_guidance_scale -1.0: must be at least 0"),
    ],
)
def test_bad_values_of_esd(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        make_options("esd", **arguments(**changes))


def parse(kind, *words):
    known = ["--pretrained_model_name_or_path", "MODEL", "--output_dir", "OUT"]
    return SimpleNamespace(**parse_options(kind, [*known, *words]).flat)


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr("diffusers_safe.training.job.JobOptions.check_surroundings", lambda self: None)


def test_a_preset_is_the_default_of_what_is_not_given(unchecked):
    args = parse("esd", "--concepts", "knife", "--preset", "esd-2025", "--learning_rate", "3e-5")
    assert (args.max_train_steps, args.sampling_model, args.negative_guidance_scale) == (200, "frozen", 1.0)
    assert args.learning_rate == 3e-5
    args = parse("esd", "--concepts", "knife", "--preset", "esd-2025", "--erase_from", "a tool")
    assert args.negative_guidance_scale == 2.0
    args = parse("esd", "--concepts", "knife")
    assert (args.max_train_steps, args.sampling_model, args.adam_weight_decay) == (1000, "student", 0.0)


def test_every_option_of_a_preset_is_one(arguments):
    for preset in ESD_PRESETS.values():
        args = make_options("esd", **arguments(**preset.options))
        assert {name: args.flat[name] for name in preset.options} == preset.options


def test_the_presets_are_documented():
    docs = Path(__file__).parents[2] / "docs" / "methods.md"
    assert presets_table() in docs.read_text(encoding="utf-8")


def test_a_config_file_gives_options_and_the_command_line_wins(unchecked, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("concepts: [knife, a gun]\npreset: esd-2025\nlearning_rate: 1e-3\nscale_lr: true\nrevision:\n")
    args = parse("esd", "--config", str(config))
    assert args.concepts == ["knife", "a gun"] and args.scale_lr and args.revision is None
    assert (args.learning_rate, args.sampling_model) == (1e-3, "frozen")
    config.write_text("concepts: [no]\nwatch_prompts: []\nmixed_precision: no\nseed:\n")
    args = parse("sdd", "--config", str(config))
    assert (args.concepts, args.watch_prompts, args.mixed_precision, args.seed) == (["no"], [], "no", 0)
    config.write_text("concepts: [knife, a gun]\npreset: esd-2025\nlearning_rate: 1e-3\n")
    args = parse("esd", "--config", str(config), "--learning_rate", "0.5", "--preset", "paper")
    assert (args.learning_rate, args.sampling_model) == (0.5, "student")


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rates: 1", "unrecognized arguments: --learning_rates"),
        ("learning_rate: high", "learning_rate 'high': must be a number"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("hub_token: hf_SECRET: x", "cannot be read as YAML (mapping values are not allowed here in line 1)"),
        ("hub_tokn: hf_SECRET", "unrecognized arguments: --hub_tokn"),
        (None, "cannot be read as YAML (No such file or directory)"),
    ],
)
def test_a_bad_config_file_is_exit_with_error(capsys, unchecked, tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("sdd", "--concepts", "knife", "--config", str(tmp_path / "run.yaml"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0] and "SECRET" not in lines[0]


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("sdd", {}, "the ema weights sample them, and there are no retain_prompts"),
        ("sdd", {"retain_prompts": ["a"], "retain_weight": 0.0}, "there are no retain_prompts"),
        ("sdd", {"retain_prompts": ["a", "b", "c"]}, "must be at least 3, the number of prompts to retain"),
        ("esd", {}, "here the student weights sample them"),
        (
            "esd",
            {"sampling_model": "frozen", "concepts": ["a", "b", "c"]},
            "must be at least 3, the number of prompts to",
        ),
        ("esd", {"sampling_model": "frozen", "concept_schedule": "sequential"}, "concept_schedule sequential"),
    ],
)
def test_a_pool_that_cannot_be(arguments, kind, changes, message):
    with pytest.raises(ValueError, match=f"trajectory_pool 2: .*{message}") as error:
        make_options(kind, **arguments(trajectory_pool=2, **changes))
    assert "\n" not in str(error.value)


def test_what_the_frozen_model_draws_is_pooled(arguments):
    assert make_options("sdd", **arguments(retain_prompts=["cat"])).pooled_terms() == set()
    assert make_options("sdd", **arguments(retain_prompts=["cat"], trajectory_pool=2)).pooled_terms() == {"retain"}
    both = make_options("esd", **arguments(retain_prompts=["cat"], trajectory_pool=2, sampling_model="frozen"))
    assert both.pooled_terms() == {"erase", "retain"}
