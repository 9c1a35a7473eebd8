"""`train_distill.py` as a user runs it, and in this process."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models import modeling_utils
from safetensors.torch import load_file

from diffusers_safe.concepts import names_concept
from diffusers_safe.distillation import run as distillation
from diffusers_safe.distillation.data import make_latents, open_rows
from diffusers_safe.distillation.loop import DistillationLoop
from diffusers_safe.distillation.options import DistillationOptions
from diffusers_safe.distillation.run import student_pipeline
from diffusers_safe.emoji.dataset import emoji_dataset
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS
from diffusers_safe.families import load_pipeline, make_family
from diffusers_safe.provenance import Distillation, Provenance
from scripts import ROOT, in_two_processes, log_rows, run, succeed, words_of


SCRIPT = str(ROOT / "train_distill.py")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 captioned pictures, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, row in enumerate(emoji_dataset(24, cache_dir=str(tmp_path_factory.mktemp("cache")))):
        row["image"].save(folder / f"{number:02}.png")
        rows.append({"file_name": f"{number:02}.png", "text": row["caption"]})
    (folder / "broken.png").write_bytes(b"no picture")
    rows.append({"file_name": "broken.png", "text": "a broken picture"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(model, pictures, output_dir, **changes):
    return {
        "pretrained_model_name_or_path": str(model),
        "student": "bk-small",
        "train_data_dir": str(pictures),
        "output_dir": str(output_dir),
        "center_crop": True,
        "max_train_steps": 4,
        "train_batch_size": 4,
        "num_inference_steps": 3,
        "learning_rate": 1e-3,
        **changes,
    }


@pytest.fixture
def distil(on_cpu, tiny_model_folder, pictures, tmp_path):
    """The function `(folder, **changes)` that runs a distillation here and returns its student's weights."""

    def distil(folder, **changes):
        options = settings(tiny_model_folder, pictures, tmp_path / folder, **changes)
        distillation.main(words_of({name: value for name, value in options.items() if value is not None}))
        return load_file(tmp_path / folder / UNET)

    return distil


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_makes_a_stock_pipeline_of_fewer_blocks(tiny_model_folder, pictures, tmp_path):
    words = words_of(settings(tiny_model_folder, pictures, "out", cache_latents=True, random_flip=True))
    command = [sys.executable, SCRIPT, *words, "--validation_prompts", "a cat", "--use_ema"]
    told = succeed(command, tmp_path, ACCELERATE_USE_CPU="true")
    out = tmp_path / "out"
    student = StableDiffusionPipeline.from_pretrained(out)
    assert student.unet.config.mid_block_type is None and student.unet.config.layers_per_block == 1
    assert student("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    record = Distillation.load(out)
    assert record.student == "bk-small" and record.losses.keys() == {"task", "output", "feature"}
    assert record.parameters["student"] == sum(parameter.numel() for parameter in student.unet.parameters())
    assert (
        record.parameters["teacher"] > record.parameters["student"] and record.macs["teacher"] > record.macs["student"]
    )
    assert [name.endswith("broken.png") for name in record.data["unreadable"]] == [True]
    assert "1 image cannot be read" in told.stderr
    assert (out / "validation" / "step-4.png").is_file() and (out / "cache" / "cache.json").is_file()
    assert {"task", "output", "feature"} <= log_rows(out)[-1].keys()


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_bit_for_bit(distil, tmp_path, capsys, cached):
    changes = {"cache_latents": cached, "random_flip": True, "use_ema": True, "proportion_empty_prompts": 0.3}
    whole = distil("whole", checkpointing_steps=2, **changes)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert same(whole, distil("out", resume_from_checkpoint=checkpoint, **changes))
    with pytest.raises(SystemExit, match="2"):
        distil("other", resume_from_checkpoint=checkpoint, seed=1, **{**changes, "cache_latents": True})
    assert "of another run: seed 0 there, 1 here" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_accumulation_and_the_cache_change_nothing_but_rounding(distil, tiny_model_folder):
    whole = distil("whole")
    start = student_pipeline(load_pipeline(tiny_model_folder), DistillationOptions.of(
        **settings(tiny_model_folder, tiny_model_folder, "none"))).unet.state_dict()  # fmt: skip
    for other in (
        distil("accumulated", train_batch_size=2, gradient_accumulation_steps=2),
        distil("cached", cache_latents=True),
    ):
        moved, alike = (
            torch.cat([(weights[name] - start[name]).flatten() for name in sorted(start)])
            for weights in (whole, other)
        )
        assert moved.norm() > 0 and (moved - alike).norm() < 0.05 * moved.norm()


def test_the_student_keeps_the_settings_of_the_teachers_pipeline(make_tiny_xl_pipeline, tmp_path):
    teacher = make_tiny_xl_pipeline()
    teacher.register_to_config(force_zeros_for_empty_prompt=False)
    teacher.save_pretrained(tmp_path)
    args = DistillationOptions.of(**settings(tmp_path, tmp_path, "none", student="ssd_1b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers_safe.distillation.run.build_student", lambda unet, kind: unet)
        assert student_pipeline(teacher, args).config.force_zeros_for_empty_prompt is False


@pytest.mark.slow
@pytest.mark.parametrize("erasing", [{}, {"forbidden_concepts": ["knife"], "sdd_weight": 1.0}])
def test_two_processes_see_what_one_sees(tiny_model_folder, pictures, tmp_path, erasing):
    options = {
        **settings(tiny_model_folder, pictures, "one", cache_latents=True, cache_folder="cache", use_ema=True),
        **erasing,
    }
    succeed([sys.executable, SCRIPT, *words_of(options)], tmp_path, ACCELERATE_USE_CPU="true")
    in_two_processes(SCRIPT, words_of({**options, "output_dir": "two", "train_batch_size": 2}), tmp_path)
    one, two = (load_file(tmp_path / folder / UNET) for folder in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-2)


def make_loop(teacher_folder, pictures, tmp_path, **changes):
    args = DistillationOptions.of(**settings(teacher_folder, pictures, tmp_path / "out", **changes))
    accelerator = Accelerator(cpu=True)
    teacher = load_pipeline(teacher_folder)
    family, student = make_family(teacher), make_family(student_pipeline(teacher, args))
    data = make_latents(accelerator, family, open_rows(args.data, args.model.cache_dir, args.output.seed), args)
    return DistillationLoop(accelerator, family, student, data, args)


def test_the_teacher_is_frozen_and_every_part_of_the_student_moves(on_cpu, tiny_model_folder, pictures, tmp_path):
    loop = make_loop(tiny_model_folder, pictures, tmp_path, feature_map="segmind", student="bk-tiny")
    before = {name: value.clone() for name, value in loop.teacher_family.denoiser.state_dict().items()}
    start = {name: value.detach().clone() for name, value in loop.weights.student.items()}
    loop.run(progress_bar=False)
    assert same(before, loop.teacher_family.denoiser.state_dict())
    assert not any(torch.equal(start[name], value) for name, value in loop.weights.student.items())
    assert loop.forwards == 4 * 4 * 2  # steps, samples, student and teacher


def test_a_teacher_that_goes_on_from_itself_has_nothing_to_learn_from_its_teacher(
    on_cpu, tiny_model_folder, pictures, tmp_path
):
    changes = {"student": None, "from_student": tiny_model_folder, "feature_map": "bk+mid"}
    loop = make_loop(tiny_model_folder, pictures, tmp_path, **changes)
    loop.student.eval()
    terms = loop.batch_terms(0, range(4))
    assert max(terms["output"], terms["feature"]) < 1e-9 < terms["task"] / 100


def test_a_term_without_a_gradient_is_told(on_cpu, tiny_model_folder, pictures, tmp_path):
    loop = make_loop(tiny_model_folder, pictures, tmp_path)
    take = loop.student_tap.take
    loop.student_tap.take = lambda: [*take()[:-1], take_last().detach()]
    last = {}
    loop.student.up_blocks[3].register_forward_hook(lambda module, inputs, output: last.update(output=output))

    def take_last():
        return last["output"]

    with pytest.raises(ValueError, match="feature_map bk: up_blocks.3 of the student sends no gradient"):
        loop.batch_terms(0, range(4))


def test_forbidden_concepts_are_left_out_of_the_data_and_moved_to_nothing(
    on_cpu, tiny_model_folder, pictures, tmp_path
):
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    word = captions[0].split()[1]
    forbidden = sum(names_concept(caption, word) for caption in captions)
    loop = make_loop(
        tiny_model_folder,
        pictures,
        tmp_path,
        forbidden_concepts=[word],
        sdd_weight=1000.0,
        task_weight=0.0,
        learning_rate=1e-4,
    )
    assert sum(loop.data.skipped().dropped.values()) == forbidden
    terms = loop.batch_terms(0, range(4))
    assert terms.keys() == {"output", "feature", "sdd"} and terms["sdd"] > 0
    loop.run(progress_bar=False)
    assert loop.batch_terms(0, range(4))["sdd"] < terms["sdd"]


def test_the_record_tells_of_an_erased_teacher(distil, tiny_model_folder, tmp_path):
    erased = tmp_path / "erased"
    StableDiffusionPipeline.from_pretrained(tiny_model_folder).save_pretrained(erased)
    Provenance("base", None, ["knife"], "sdd", "xattn", {}).save(erased)
    distil("out", pretrained_model_name_or_path=erased)
    assert Distillation.load(tmp_path / "out").teacher_erasure["concepts"] == ["knife"]


def test_checkpoint_training_and_a_lora_go_on_from_a_student(distil, tmp_path):
    first = distil("first")
    second = distil("second", student=None, from_student=tmp_path / "first", rank=2, train_method="xattn")
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all("attn2" in name and name.endswith("weight") for name in changed)


def test_the_end_compares_student_and_teacher_and_what_the_teacher_was(distil, tiny_model_folder, tmp_path, capsys):
    erased = tmp_path / "erased"
    StableDiffusionPipeline.from_pretrained(tiny_model_folder).save_pretrained(erased)
    Provenance(str(tiny_model_folder), None, ["knife"], "sdd", "xattn", {}).save(erased)
    options = "{prompts: [a knife, a cat], metrics: [pixel_distance], num_inference_steps: 2}"
    (tmp_path / "evaluation.yaml").write_text(options)
    distil("out", pretrained_model_name_or_path=erased, evaluation=tmp_path / "evaluation.yaml")
    results = json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())
    assert list(results["models"]) == ["teacher before its erasure", "teacher", "student"]
    moved = results["metrics"]["pixel_distance"]["estimates"]
    teacher, student = (moved[name]["pixel_distance"]["value"] for name in ("teacher", "student"))
    assert teacher < 1e-4 < student / 10
    assert "| student |" in capsys.readouterr().out


def test_a_student_is_found_where_only_its_unet_was_saved(distil, tmp_path):
    first = distil("first", save="unet")
    assert not (tmp_path / "first" / "model_index.json").exists()
    second = distil("second", student=None, from_student=tmp_path / "first")
    assert first.keys() == second.keys() and not same(first, second)


@pytest.mark.slow
def test_sdxl_in_bfloat16(distil, make_tiny_xl_pipeline, tmp_path):
    teacher = make_tiny_xl_pipeline()
    config = {**teacher.unet.config, "transformer_layers_per_block": (1, 2, 10)}  # SDXL's own depths
    teacher.register_modules(unet=UNet2DConditionModel.from_config(config))
    teacher.save_pretrained(tmp_path / "teacher")
    options = {"pretrained_model_name_or_path": tmp_path / "teacher", "student": "koala-700m", "cache_latents": True}
    student = distil("out", **options, mixed_precision="bf16", forbidden_concepts=["knife"], sdd_weight=0.1)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in student.values())
    record = Distillation.load(tmp_path / "out")
    assert record.losses.keys() == {"task", "output", "feature", "sdd"}


def test_validation_images_of_the_teacher_warn_of_nothing(distil, monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *message: warned.append(message))
    distil("out", max_train_steps=1, validation_prompts="a cat", validation_steps=1)
    assert not warned


def test_a_dry_run_tells_the_plan_and_writes_nothing(tiny_model_folder, pictures, tmp_path, capsys):
    distillation.main([*words_of(settings(tiny_model_folder, pictures, tmp_path / "out")), "--dry_run"])
    told = capsys.readouterr().out
    for word in ("distil         bk-small", "the student 1.0, the teacher 1.0", "nothing was trained or written"):
        assert word in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "bk-huge"}, "student 'bk-huge': unknown; allowed are bk-base"),
        ({"student": "ssd-1b"}, "student 'ssd-1b': this UNet has"),
        ({"student": None}, "give either --student"),
        ({"student": None, "from_student": "nowhere"}, "from_student 'nowhere': no folder or Hub repository"),
        ({"student_variant": "fp16"}, "student_variant fp16: needs --from_student"),
        ({"feature_map": "bk+mid"}, "must both have a mid block"),
        ({"evaluation": "nowhere.yaml"}, "config nowhere.yaml: cannot be read as YAML"),
        ({"feature_map": "nota"}, "feature_map 'nota': unknown; allowed are bk"),
        ({"task_weight": 0, "output_weight": 0, "feature_weight": 0}, "all are 0"),
        ({"sdd_weight": 1}, "sdd_weight 1.0: needs --forbidden_concepts"),
        ({"train_data_dir": "nowhere"}, "train_data_dir nowhere: no such folder"),
        ({"dataset_name": "user/pictures"}, "give either --dataset_name or --train_data_dir"),
        ({"cache_latents": True, "streaming": True}, "cache_latents: stores all samples"),
        ({"snr_gamma": 0}, "snr_gamma 0.0: must be greater than 0"),
        ({"snr_gamma": 5, "loss_space": "velocity"}, "snr_gamma 5.0: weighs errors of predictions"),
        ({"timestep_bias_portion": 0.5}, "timestep_bias_portion 0.5: needs --timestep_bias_strategy earlier or later"),
        ({"timestep_bias_strategy": "later"}, "needs a --timestep_bias_multiplier other than 1"),
        ({"ema_decay": 0.5}, "ema_decay 0.5: needs --use_ema"),
        ({"latents_per_trajectory": 2}, "latents_per_trajectory 2: needs --sdd_weight"),
        ({"prediction_type": "v_prediction"}, "the teacher predicts epsilon, and the student cannot learn both"),
        ({"task_weight": 0, "output_weight": 0}, "feature_weight 1.0: alone it does not train the last layers"),
        ({"proportion_empty_prompts": 2}, "proportion_empty_prompts 2.0: must be at least 0 and at most 1"),
        ({"timestep_bias_portion": 1}, "timestep_bias_portion 1.0: must be greater than 0 and less than 1"),
        ({"image_interpolation_mode": "magic"}, "image_interpolation_mode 'magic': unknown"),
    ],
)
def test_bad_input_is_exit_with_error_before_anything_is_written(
    tiny_model_folder, pictures, tmp_path, capsys, changes, message
):
    options = settings(tiny_model_folder, pictures, tmp_path / "out", **changes)
    with pytest.raises(SystemExit) as error:
        distillation.main(words_of({name: value for name, value in options.items() if value is not None}))
    told = capsys.readouterr().err
    assert error.value.code == 2 and message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "title"}, "caption_column 'title': no such column; there are"),
        ({"forbidden_concepts": [*OBJECTS, *GROUPS, "a broken picture"]}, "no row of the dataset is left"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(distil, changes, message, capsys):
    with pytest.raises(SystemExit) as error:
        distil("out", **changes)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_cache_of_something_else_is_not_used(distil, tmp_path):
    distil("first", cache_latents=True, cache_folder=tmp_path / "cache")
    with pytest.raises(SystemExit, match="belongs to other settings"):
        distil("second", cache_latents=True, cache_folder=tmp_path / "cache", max_train_samples=5)


@pytest.mark.slow
def test_a_script_tells_bad_input_with_code_2(tiny_model_folder, pictures, tmp_path):
    done = run(
        [sys.executable, SCRIPT, *words_of(settings(tiny_model_folder, pictures, "out", student="x"))], tmp_path
    )
    assert done.returncode == 2 and "student 'x': unknown" in done.stderr and not (tmp_path / "out").exists()
