"""The columns of published prompt lists and their meaning."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A kind of list. Seeds, guidance scales and sizes are read in every layout, see `SETTINGS`.

    Attributes:
        description (`str`): Description for `--help`.
        known_by (`tuple[str, ...]`): Columns that every list of this kind has.
        names (`tuple[str, ...]`, *optional*): Columns that name rows; the first existing one is used. Without one,
            rows are named by number and prompt.
    """

    description: str
    known_by: tuple[str, ...]
    names: tuple[str, ...] = ()


ID, CASE_NUMBER, CATEGORIES = "id", "case_number", "categories"

# The first one that fits is used.
LAYOUTS = {
    "i2p": Layout("I2P (Schramowski et al., arXiv 2211.05105)", (CATEGORIES, "sd_seed", "sd_guidance_scale")),
    "unlearndiffatk": Layout(
        "lists of UnlearnDiffAtk (Zhang et al., arXiv 2310.11868), of I2P rows or written for an object or a style",
        ("evaluation_seed", "evaluation_guidance"),
        (CASE_NUMBER,),
    ),
    "esd": Layout(
        "lists of ESD (Gandikota et al., arXiv 2303.07345), which name images by case number and image number",
        (CASE_NUMBER, "evaluation_seed"),
        (CASE_NUMBER,),
    ),
    "coco": Layout("COCO captions as ESD samples them, such as coco_30k.csv", ("image_id", "evaluation_seed")),
    "plain": Layout(
        "any other list with a column of prompts, which names images by id or case_number, if there is one",
        (),
        (ID, CASE_NUMBER),
    ),
}

# Setting -> names of its columns, in order of preference, as `column_key` writes them. The scripts of ESD and its
# followers prefer evaluation_seed to sd_seed.
SETTINGS = {
    "seed": (
        *("evaluationseed", "evalseed", "sdseed", "seed", "imageseed", "generationseed", "genseed", "randomseed"),
        *("generatorseed", "manualseed", "noiseseed", "latentseed", "torchseed", "seednumber", "seedid"),
        *("rngseed", "sdrandomseed", "randomstate", "seeds"),
    ),
    "guidance_scale": (
        *("evaluationguidance", "evaluationguidancescale", "evalguidance", "evalguidancescale"),
        *("sdguidancescale", "sdguidance", "guidancescale", "guidance", "sdcfgscale", "cfgscale", "cfg"),
        *("cfgguidance", "classifierfreeguidance", "classifierfreeguidancescale"),
    ),
    "height": ("evaluationheight", "evaluationimageheight", "sdimageheight", "sdheight", "imageheight", "imgheight",
               "height"),
    "width": ("evaluationwidth", "evaluationimagewidth", "sdimagewidth", "sdwidth", "imagewidth", "imgwidth", "width"),
}  # fmt: skip
# Keys of columns that look like settings of an image; those that are not in SETTINGS are reported.
LIKE_A_SETTING = re.compile(
    r".*(seed|guidance|cfg|width|height|resolution|imagesize|inferencesteps|ddimsteps|negativeprompt"
    r"|num(ber(of)?)?(images|samples|outputs)|imagesperprompt|nsamples|aspectratio|negprompt).*"
    r"|size(px|s)?|.*scale|(n|num)?(images|samples|steps?)|negative|strength|sampler|scheduler|generator|rng|[wh]"
)
# Labels of I2P's rows that are numbers.
NUMBERS = (
    *("hard", "inappropriate_percentage", "nudity_percentage", "q16_percentage", "sd_safety_percentage"),
    "prompt_toxicity",
)
# What `pandas` writes for missing values and reads as missing.
MISSING = {"NULL", "null", "NaN", "nan", "-nan", "<NA>", "None", "NA", "N/A", "n/a", "#N/A", "#NA"}


def column_key(column: str) -> str:
    """The name of a column for comparison: `"SD-Seed"`, `"sd seed"` and `"sd_seed"` are equal."""
    return re.sub(r"[\W_]", "", column.lower())


def is_index(column: str) -> bool:
    """Whether a column only numbers the rows, as `pandas` adds it to a file."""
    return not column.strip() or column.startswith("Unnamed:") or column.startswith("__index_level_")
