"""`diffusers-safe students`: the table, the student's folder, and what is refused before anything is written."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_safe import cli
from diffusers_safe.families.students import build_student
from diffusers_safe.output_folders import RECORD


def students(*words):
    cli.main(["students", *map(str, words)])


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_the_table_of_a_model_of_ones_own(tiny_model_folder, capsys):
    students("--pretrained_model_name_or_path", tiny_model_folder)
    text = capsys.readouterr().out
    assert text.startswith(f"{tiny_model_folder}: latents of 4 x 8 x 8, 32 tokens\n")
    table = rows(text)
    assert list(table) == ["denoiser", "teacher", "bk-base", "bk-small", "bk-tiny"]
    teacher = UNet2DConditionModel.from_pretrained(tiny_model_folder, subfolder="unet")
    whole = sum(parameter.numel() for parameter in teacher.parameters())
    for name, cells in list(table.items())[1:]:
        unet = teacher if name == "teacher" else build_student(teacher, name)
        count = sum(parameter.numel() for parameter in unet.parameters())
        assert cells[0] == f"{count:,}" and cells[1] == f"{count / whole:.1%}"
        assert cells[4] == f"{2 * count / 2**20:.1f} MiB"
    macs = [float(cells[2]) for cells in list(table.values())[1:]]
    assert macs == sorted(macs, reverse=True) and table["teacher"][1] == table["teacher"][3] == "100.0%"


def test_a_teacher_by_name(capsys):
    students("--teacher", "sd-1.5")
    table = rows(capsys.readouterr().out)
    assert table["bk-tiny"][:5] == ["323,384,964", "37.6%", "242.8", "60.4%", "616.8 MiB"]


@pytest.mark.parametrize("student, parameters", [("sd_tiny", "4,478,312"), ("bk-base", "7,099,752")])
def test_a_student_of_the_embedded_model_is_a_stock_pipeline(tmp_path, capsys, student, parameters):
    students("--teacher", "emoji", "--student", student, "--output_dir", tmp_path / "out")
    told = capsys.readouterr().out
    assert f"{parameters} parameters, in {tmp_path / 'out'}; not trained yet" in told
    assert ("ControlNetModel.from_unet does not take it" in told) == (student == "sd_tiny")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline) is StableDiffusionPipeline and pipeline.unet.config.layers_per_block == 1
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a cat", num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 64, 64) and torch.isfinite(images).all()
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [RECORD]


def test_a_student_of_ones_own_sdxl(make_tiny_xl_pipeline, tmp_path, capsys):
    pipeline = make_tiny_xl_pipeline()
    config = {**pipeline.unet.config, "transformer_layers_per_block": (1, 2, 10)}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    pipeline.save_pretrained(tmp_path / "teacher")
    students("--pretrained_model_name_or_path", tmp_path / "teacher", "--student", "segmind-vega", "--output_dir",
             tmp_path / "vega")  # fmt: skip
    student = DiffusionPipeline.from_pretrained(tmp_path / "vega").unet
    expected = build_student(pipeline.unet, "segmind-vega").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--teacher", "sd-3"], "teacher 'sd-3': unknown; allowed are sd-1.5, sd-2, sdxl, emoji"),
        (["--teacher", "sdxl", "--pretrained_model_name_or_path", "x"], "teacher sdxl: give it or pretrained_model_n"),
        (["--student", "bk-tiny"], "student bk-tiny, output_dir None: give both or neither"),
        (["--output_dir", "OUT"], "student None, output_dir OUT: give both or neither"),
        (["--student", "bk-huge", "--output_dir", "OUT"], "student 'bk-huge': unknown; allowed are bk-base, "),
        (["--student", "bk-tiny", "--output_dir", "OUT"], "student bk-tiny: a teacher with weights is needed"),
        (["--teacher", "sd-2", "--student", "bk-tiny", "--output_dir", "OUT"], "a teacher with weights is needed"),
        (["--teacher", "emoji", "--student", "ssd-1b", "--output_dir", "OUT"], "fit it: bk-base, bk-small, bk-tiny"),
        (["--pretrained_model_name_or_path", "/nowhere"], "'/nowhere': no folder or Hub repository of a diffusers"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        students(*words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_unet_that_no_student_fits(make_tiny_xl_pipeline, tmp_path, capsys):
    make_tiny_xl_pipeline().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        students("--pretrained_model_name_or_path", tmp_path)
    assert f"{tmp_path}: none of the students (bk-base, " in capsys.readouterr().err


def test_a_folder_with_a_model_is_left_alone(tiny_model_folder, tmp_path, capsys):
    (tmp_path / "erasure.json").write_text("{}")
    for folder, message in (
        (tmp_path, "holds results of another run (erasure.json); give another folder, or --overwrite"),
        (tiny_model_folder, "is the teacher's own folder; give another"),
    ):
        with pytest.raises(SystemExit):
            students(
                "--pretrained_model_name_or_path", tiny_model_folder, "--student", "bk-base", "--output_dir", folder
            )
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["erasure.json"]
    students("--pretrained_model_name_or_path", tiny_model_folder, "--student", "bk-base", "--output_dir", tmp_path,
             "--overwrite")  # fmt: skip
    assert (tmp_path / ".replaced-1" / "erasure.json").is_file() and not (tmp_path / "erasure.json").exists()
