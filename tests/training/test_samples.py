import torch

from diffusers_safe.evaluation import grid
from diffusers_safe.training import samples
from diffusers_safe.training.samples import sample_grid
from diffusers_safe.weights import TrainedWeights, select_parameters


def test_before_is_the_base_model_and_after_is_the_student(tiny_pipeline, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        samples,
        "draw_grid",
        lambda groups, caption: drawn.append((groups, caption)) or grid.draw_grid(groups, caption),
    )
    weights = TrainedWeights(tiny_pipeline.unet, select_parameters(tiny_pipeline.unet, "xattn"))
    arguments = {"num_images": 2, "num_inference_steps": 2, "seed": 5}
    concepts = [f"concept {i}" for i in range(10)]
    sample_grid(tiny_pipeline, weights, concepts, ["a cat"], **arguments)
    with torch.no_grad():
        for value in weights.student.values():
            value.add_(torch.randn_like(value))
    learned = {name: value.clone() for name, value in weights.student.items()}
    sample_grid(tiny_pipeline, weights, concepts, ["a cat"], **arguments)
    (first, caption), (second, _) = drawn
    assert [group.prompts for group in first] == [["concept 0", "concept 2", "concept 5", "concept 7"], ["a cat"]]
    assert "seeds 5 to 6" in caption
    pictures = [
        [
            [image.tobytes() for row in rows for image in row]
            for group in groups
            for rows in (group.before, group.after)
        ]
        for groups in (first, second)
    ]
    untouched, changed = pictures
    assert untouched[0] == untouched[1] == changed[0] and untouched[2] == changed[2]
    assert all(before != after for before, after in zip(changed[0] + changed[2], changed[1] + changed[3]))
    assert len(set(untouched[0])) == 8  # every prompt and seed is a picture of its own
    assert all(torch.equal(value, learned[name]) for name, value in weights.student.items())


def test_without_prompts_to_keep_there_is_one_group(tiny_pipeline):
    weights = TrainedWeights(tiny_pipeline.unet, select_parameters(tiny_pipeline.unet, "xattn"))
    alone = sample_grid(tiny_pipeline, weights, ["a"], [], num_inference_steps=1)
    both = sample_grid(tiny_pipeline, weights, ["a"], ["b"], num_inference_steps=1)
    assert alone.width < both.width
