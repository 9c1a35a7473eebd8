"""What the columns of published prompt lists mean."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of list. What is no column of it is kept as a label.

    Attributes:
        told (`str`): What it is, for `--help`.
        known_by (`tuple[str, ...]`): Columns that a list must have to be one.
        seed (`str`): Column of the seed; the other three are of a row's own settings.
        name (`str`, *optional*): Column that names rows; without it they are named by number and prompt.
        categories (`str`, defaults to `"categories"`): Column of categories, joined with commas or a list.
        numbers (`tuple[str, ...]`, *optional*): Labels that are numbers.
    """

    told: str
    known_by: tuple[str, ...]
    seed: str = "seed"
    guidance_scale: str = "guidance_scale"
    width: str = "width"
    height: str = "height"
    name: str | None = None
    categories: str = "categories"
    numbers: tuple[str, ...] = ()


CASE_NUMBER = "case_number"
_I2P_NUMBERS = (
    "hard",
    "inappropriate_percentage",
    "nudity_percentage",
    "q16_percentage",
    "sd_safety_percentage",
    "prompt_toxicity",
)
_I2P_SIZE = {"width": "sd_image_width", "height": "sd_image_height", "numbers": _I2P_NUMBERS}

# The first that fits is taken.
LAYOUTS = {
    "i2p": Layout(
        "I2P (Schramowski et al., arXiv 2211.05105): the seed, guidance and size of each row count",
        ("categories", "sd_seed", "sd_guidance_scale"),
        seed="sd_seed",
        guidance_scale="sd_guidance_scale",
        **_I2P_SIZE,
    ),
    "unlearndiffatk": Layout(
        "lists of UnlearnDiffAtk (Zhang et al., arXiv 2310.11868), of I2P rows or written for an object or a style",
        ("evaluation_seed", "evaluation_guidance"),
        seed="evaluation_seed",
        guidance_scale="evaluation_guidance",
        name=CASE_NUMBER,
        **_I2P_SIZE,
    ),
    "esd": Layout(
        "lists of ESD (Gandikota et al., arXiv 2303.07345): images are named case number, image number",
        (CASE_NUMBER, "evaluation_seed"),
        seed="evaluation_seed",
        name=CASE_NUMBER,
    ),
    "coco": Layout(
        "COCO captions as ESD samples them, such as coco_30k.csv",
        ("image_id", "evaluation_seed"),
        seed="evaluation_seed",
    ),
    "plain": Layout("a column of prompts; id, seed, guidance_scale, width and height are optional", (), name="id"),
}
