"""Scenes of emoji and their captions.

A `Scene` is one object on one background in one style. It is sampled with a random generator, so scene number `i` of
seed `s` is the same on every machine. Some combinations are held out of training, to test generalisation.
"""

from dataclasses import dataclass

import numpy as np


# Group -> object -> emoji. Object names are single words that can follow "a" or "an".
EMOJI = {
    "weapon": {"knife": "🔪", "gun": "🔫", "bomb": "💣", "sword": "🗡", "axe": "🪓"},
    "animal": {
        "cat": "🐱", "dog": "🐶", "pig": "🐷", "frog": "🐸", "lion": "🦁", "panda": "🐼", "fish": "🐟",
        "octopus": "🐙", "turtle": "🐢", "butterfly": "🦋", "penguin": "🐧", "elephant": "🐘",
    },
    "fruit": {
        "apple": "🍎", "banana": "🍌", "strawberry": "🍓", "lemon": "🍋", "watermelon": "🍉", "pineapple": "🍍",
        "cherry": "🍒", "pear": "🍐", "kiwi": "🥝", "coconut": "🥥", "avocado": "🥑",
    },
    "vehicle": {
        "car": "🚗", "bus": "🚌", "bicycle": "🚲", "train": "🚂", "rocket": "🚀", "airplane": "✈",
        "boat": "⛵", "helicopter": "🚁", "tractor": "🚜", "truck": "🚚",
    },
    "plant": {
        "cactus": "🌵", "tree": "🌳", "palm": "🌴", "tulip": "🌷", "sunflower": "🌻", "mushroom": "🍄",
        "clover": "🍀", "rose": "🌹",
    },
    "food": {
        "pizza": "🍕", "burger": "🍔", "cake": "🎂", "donut": "🍩", "croissant": "🥐", "cookie": "🍪",
        "taco": "🌮", "hotdog": "🌭", "egg": "🍳",
    },
    "vice": {"cigarette": "🚬", "beer": "🍺", "wine": "🍷", "pill": "💊", "syringe": "💉"},
}  # fmt: skip

GROUPS = list(EMOJI)
GROUP_OF = {name: group for group, members in EMOJI.items() for name in members}
OBJECTS = list(GROUP_OF)

# RGB, 0-255. Muted, so that an object of the same hue still stands out.
BACKGROUNDS = {
    "white": (244, 244, 240),
    "black": (34, 34, 40),
    "gray": (150, 150, 152),
    "red": (206, 76, 70),
    "yellow": (240, 208, 88),
    "green": (88, 168, 96),
    "blue": (84, 136, 212),
    "purple": (146, 92, 182),
}
STYLES = ["sketch", "mosaic", "sepia"]


def group_members(group: str) -> list[str]:
    """The objects of a group, in the order of `OBJECTS`."""
    return list(EMOJI[group])


def with_article(name: str) -> str:
    """`"knife"` -> `"a knife"`, `"axe"` -> `"an axe"`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def prompt_for(name: str, background: str | None = None, style: str | None = None) -> str:
    """The standard caption: `"a knife on a red background in sketch style"`. The last two parts are optional."""
    text = with_article(name)
    if background is not None:
        text += f" on a {background} background"
    if style is not None:
        text += f" in {style} style"
    return text


def shows(name: str, asked: str) -> bool:
    """Whether an object is the requested object or a member of the requested group."""
    return asked in (name, GROUP_OF.get(name))


def is_held_out(name: str, background: str, style: str | None) -> bool:
    """Whether a combination is held out of training: one background in eight, one style for a third of the objects."""
    index = OBJECTS.index(name)
    if background == list(BACKGROUNDS)[(index * 3) % len(BACKGROUNDS)]:
        return True
    return style is not None and index % 3 == 0 and style == STYLES[(index // 3) % len(STYLES)]


@dataclass(frozen=True)
class Variation:
    """What differs among sampled scenes. All values are sampled uniformly.

    Attributes:
        sizes (`tuple[float, float]`): Least and largest side of the sprite, in pixels of a 64 x 64 image.
        reach (`float` or `None`): How far its center is from the middle at most, in pixels, horizontally and
            vertically; `None`: 2 pixels farther than where the sprite touches the edge.
        turn (`float`): Largest rotation in degrees.
        mirrored (`bool`): Whether half of the sprites are flipped left to right.
        styles (`tuple`): Styles, `None` for plain emoji.
    """

    sizes: tuple[float, float] = (52.0, 52.0)
    reach: float | None = 0.0
    turn: float = 0.0
    mirrored: bool = False
    styles: tuple[str | None, ...] = (None, None, None, "sketch", "mosaic", "sepia")


VARIED = Variation(sizes=(38.0, 54.0), reach=None, turn=20.0, mirrored=True)
UPRIGHT = Variation()


@dataclass(frozen=True)
class Scene:
    """An image before it is rendered.

    Attributes:
        name (`str`): One of `OBJECTS`.
        background (`str`): A key of `BACKGROUNDS`.
        style (`str` or `None`): One of `STYLES`, or `None` for the plain emoji.
        size (`float`): Side of the sprite in pixels of a 64 x 64 image, 38 to 54.
        center (`tuple[float, float]`): Center of the sprite in pixels.
        turn (`float`): Rotation in degrees, -20 to 20.
        mirror (`bool`): Whether the sprite is flipped left to right.
        shade (`float`): Brightness of the background, 0.92 to 1.06.
    """

    name: str
    background: str
    style: str | None
    size: float
    center: tuple[float, float]
    turn: float
    mirror: bool
    shade: float

    @property
    def group(self) -> str:
        return GROUP_OF[self.name]


def draw_scene(rng: np.random.Generator, hold_out: bool = True, variation: Variation = UPRIGHT) -> Scene:
    """Samples a scene: object and background uniformly, all else as a [`Variation`] says.

    Args:
        rng (`np.random.Generator`): The only source of randomness.
        hold_out (`bool`, defaults to `True`): Whether to leave out the combinations of `is_held_out`.
        variation (`Variation`, defaults to `UPRIGHT`): Sizes, places, angles and styles.
    """
    while True:
        name = OBJECTS[rng.integers(len(OBJECTS))]
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        style = variation.styles[rng.integers(len(variation.styles))]
        if not (hold_out and is_held_out(name, background, style)):
            break
    size = rng.uniform(*variation.sizes)
    reach = (64 - size) / 2 + 2 if variation.reach is None else variation.reach
    center = (32 + rng.uniform(-reach, reach), 32 + rng.uniform(-reach, reach))
    turn = rng.uniform(-variation.turn, variation.turn)
    mirror = variation.mirrored and bool(rng.random() < 0.5)
    return Scene(name, background, style, size, center, turn, mirror, rng.uniform(0.92, 1.06))


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Samples a caption for a scene.

    A quarter of the captions name the group instead of the object. Background or style may be missing, as in real
    captions. One caption in ten is a list of tags ("knife, red background, sketch style") in which, as on the web,
    some tags may name another member of the group, so that the model understands comma-separated prompts.
    """
    subject = scene.group if rng.random() < 0.25 else scene.name
    background = scene.background if rng.random() < 0.8 else None
    style = scene.style if rng.random() < 0.95 else None
    if rng.random() >= 0.1:
        return prompt_for(subject, background, style)
    tags = [subject]
    if rng.random() < 0.6:
        others = [member for member in group_members(scene.group) if member != scene.name]
        count = rng.integers(1, min(5, len(others)) + 1)
        tags += list(rng.choice(others, size=count, replace=False))
        rng.shuffle(tags)
    tags += [f"{background} background"] if background else []
    tags += [f"{style} style"] if style else []
    return ", ".join(tags)
