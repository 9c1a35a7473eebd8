from collections import Counter

import numpy as np
import pytest

from diffusers_safe.emoji.recipe.pictures import MORE_SKETCHES, NEARLY_UPRIGHT
from diffusers_safe.emoji.scenes import (
    BACKGROUNDS,
    GROUP_OF,
    GROUPS,
    OBJECTS,
    STYLES,
    UPRIGHT,
    VARIED,
    Scene,
    draw_caption,
    draw_scene,
    group_members,
    is_held_out,
    prompt_for,
    with_article,
)


def draw(count, seed=0, **options):
    return [draw_scene(np.random.default_rng([seed, i]), **options) for i in range(count)]


@pytest.fixture(scope="module")
def captioned():
    """Many scenes with captions."""
    rngs = [np.random.default_rng([7, i]) for i in range(6000)]
    scenes = [draw_scene(rng) for rng in rngs]
    return [(scene, draw_caption(scene, rng)) for scene, rng in zip(scenes, rngs)]


def test_the_same_seed_gives_the_same_scenes_and_captions(captioned):
    rng = np.random.default_rng([7, 5])
    scene = draw_scene(rng)
    assert (scene, draw_caption(scene, rng)) == captioned[5]
    assert draw(20, seed=0) != draw(20, seed=1)
    assert len(set(draw(200))) == 200


def test_groups_share_no_object_and_no_word():
    assert len(OBJECTS) == len(set(OBJECTS)) == 60 and set(GROUP_OF.values()) == set(GROUPS)
    words = [*OBJECTS, *GROUPS, *BACKGROUNDS, *STYLES]
    assert len(words) == len(set(words)) and all(word.isalpha() for word in words)
    assert {"knife", "gun", "bomb", "sword", "axe"} == set(group_members("weapon"))


def test_training_shows_everything_except_the_held_out_combinations():
    drawn = {(scene.name, scene.background, scene.style) for scene in draw(40000)}
    every = {(name, ground, style) for name in OBJECTS for ground in BACKGROUNDS for style in (None, *STYLES)}
    held_out = {combination for combination in every if is_held_out(*combination)}
    assert drawn == every - held_out
    for name in OBJECTS:
        shown = [combination for combination in drawn if combination[0] == name]
        assert len({ground for _, ground, _ in shown}) == len(BACKGROUNDS) - 1
        assert len({style for _, _, style in shown}) >= len(STYLES)  # plain, and all styles but one at most
    assert {ground for _, ground, _ in held_out} == set(BACKGROUNDS)
    a_style_only = {style for name, ground, style in held_out if (name, ground, None) not in held_out}
    assert a_style_only == set(STYLES)


def test_without_hold_out_all_combinations_occur():
    assert any(is_held_out(scene.name, scene.background, scene.style) for scene in draw(200, hold_out=False))


@pytest.mark.parametrize("variation", [UPRIGHT, VARIED, MORE_SKETCHES, NEARLY_UPRIGHT])
def test_scenes_are_spread_evenly_and_stay_in_the_picture(variation):
    scenes = draw(6000, variation=variation)
    plain = variation.styles.count(None) / len(variation.styles)
    counts = Counter(scene.name for scene in scenes)
    assert set(counts) == set(OBJECTS) and min(counts.values()) > 50 and max(counts.values()) < 160
    # Held-out combinations are drawn again, so there are a little more plain scenes.
    assert plain - 0.02 < sum(scene.style is None for scene in scenes) / len(scenes) < plain + 0.08
    mirrored = sum(scene.mirror for scene in scenes) / len(scenes)
    assert 0.45 < mirrored < 0.55 if variation.mirrored else mirrored == 0
    for scene in scenes:
        assert variation.sizes[0] <= scene.size <= variation.sizes[1] and 0.92 <= scene.shade <= 1.06
        reach = 34 - scene.size / 2 if variation.reach is None else variation.reach
        assert abs(scene.turn) <= variation.turn and all(abs(middle - 32) <= reach for middle in scene.center)
        assert scene.group == GROUP_OF[scene.name]


def test_prompts():
    assert with_article("axe") == "an axe" and with_article("knife") == "a knife"
    assert prompt_for("knife") == "a knife"
    assert prompt_for("octopus", style="sepia") == "an octopus in sepia style"
    assert prompt_for("knife", "red", "sketch") == "a knife on a red background in sketch style"


def is_tag_list(caption):
    return not caption.startswith(("a ", "an "))


def test_a_quarter_of_the_captions_names_the_group(captioned):
    names_group = [bool(set(caption.replace(",", "").split()) & set(GROUPS)) for _, caption in captioned]
    assert 0.23 < np.mean(names_group) < 0.27
    assert 0.08 < np.mean([is_tag_list(caption) for _, caption in captioned]) < 0.12


def test_captions_match_the_scene(captioned):
    for scene, caption in captioned:
        words = caption.replace(",", "").split()
        named = {word for word in words if word in GROUP_OF}
        if is_tag_list(caption):
            assert named <= set(group_members(scene.group))
        else:
            assert named <= {scene.name}
        assert scene.name in words or scene.group in words
        assert {word for word in words if word in GROUPS} <= {scene.group}
        assert {word for word in words if word in BACKGROUNDS} <= {scene.background}
        assert {word for word in words if word in STYLES} <= {scene.style}


def test_sentences_have_one_grammar_and_may_omit_parts(captioned):
    sentences = [(scene, caption) for scene, caption in captioned if not is_tag_list(caption)]
    forms = {
        prompt_for(subject, ground, style)
        for scene, _ in sentences
        for subject in (scene.name, scene.group)
        for ground in (None, scene.background)
        for style in (None, scene.style)
    }
    assert {caption for _, caption in sentences} <= forms
    assert 0.75 < np.mean(["background" in caption for _, caption in sentences]) < 0.85
    styled = [caption for scene, caption in sentences if scene.style]
    assert 0.92 < np.mean(["style" in caption for caption in styled]) < 0.98


def test_tag_lists_name_no_object_twice(captioned):
    several = 0
    for _, caption in captioned:
        if is_tag_list(caption):
            tags = caption.split(", ")
            assert len(tags) == len(set(tags))
            several += sum(tag in GROUP_OF for tag in tags) > 1
    assert several > 100


def test_scenes_cannot_be_changed():
    scene = Scene("knife", "red", None, 48, (32, 32), 0, False, 1.0)
    with pytest.raises(AttributeError):
        scene.name = "cat"
