"""Law 1: a method is one file. Two methods that are registered here alone go all the way through the package."""

import json
from dataclasses import dataclass

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_safe import ErasedStableDiffusionPipeline, cli, erase
from diffusers_safe.arguments import option
from diffusers_safe.hub import erasure_card, find_base
from diffusers_safe.methods import METHODS, GradientMethod, Method, Objective, find_method, register_method
from diffusers_safe.methods import method as registry
from diffusers_safe.methods.objective import squared_error, targets
from diffusers_safe.provenance import fingerprint


pytestmark = pytest.mark.usefixtures("on_cpu")


class Halfway(Objective):
    """Half of what the base model says, and a state that a resumed run continues."""

    name, trajectory_weights, output_weights = "halfway", "frozen", "student"

    def __init__(self):
        self.batches = 0

    def loss(self, predictor, batch):
        self.batches += 1
        concept, empty = targets(predictor, batch, [batch.prompts, [""] * len(batch.prompts)], "frozen")
        noise_pred = predictor(batch.model_input, batch.timesteps, batch.prompts, "student")
        return squared_error(noise_pred, (concept + empty) / 2) * (1 + 0.01 * self.batches)

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class HalfwayMethod(GradientMethod):
    name, title, authors, paper = "halfway", "Half a Concept", "Nobody, 2026", "0000.00000"
    summary = "The prediction for a concept moves halfway to nothing."
    defaults = {"max_train_steps": 4, "num_inference_steps": 3, "learning_rate": 1e-3}

    def objective(self, concepts):
        return Halfway()


@dataclass(kw_only=True)
class Shrink(Method):
    """A closed form: text projections are scaled."""

    name, title, authors, paper = "shrink", "Small Projections", "Nobody, 2026", "0000.00001"
    summary = "Keys and values of cross-attention are scaled."
    shrink_factor: float = option(0.5, "The factor.", above=0, below=1, essential=True)

    def erase(self, run):
        parameters = dict(run.family.denoiser.named_parameters())
        names = [name for name in parameters if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
        assert run.concepts == ["knife"]
        run.edit({name: parameters[name] * self.shrink_factor for name in names})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    assert METHODS.keys() >= {"sdd", "esd", "concept_ablation"}
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register_method(dataclass(kw_only=True)(HalfwayMethod))
    register_method(Shrink)


def words(method, model, folder, *more):
    known = {"method": method, "pretrained_model_name_or_path": model, "concepts": "knife", "output_dir": folder}
    return ["erase", *(word for name, value in known.items() for word in (f"--{name}", str(value))), *more]


@pytest.mark.parametrize("method", ["halfway", "shrink"])
def test_a_method_goes_all_the_way(method, tiny_model_folder, tmp_path, capsys):
    folder = tmp_path / "out"
    cli.main(words(method, tiny_model_folder, folder, "--dry_run"))
    assert f"knife by {method.upper()}" in capsys.readouterr().out and not folder.exists()
    cli.main(words(method, tiny_model_folder, folder, "--save", "both"))
    record = json.loads((folder / "erasure.json").read_text())
    assert (record["method"], record["concepts"]) == (method, ["knife"])
    base = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    saved = StableDiffusionPipeline.from_pretrained(folder)
    assert fingerprint(saved.unet) != fingerprint(base.unet)
    partial = ErasedStableDiffusionPipeline.from_pretrained(folder / "erased_weights.safetensors")
    assert fingerprint(partial.unet) == fingerprint(saved.unet)
    card = str(erasure_card(folder, "user/name", find_base(tiny_model_folder)))
    assert find_method(method).title in card and "Nobody, 2026" in card
    cli.main(["export", str(folder), "--output_dir", str(tmp_path / "lora"), "--to", "lora", "--rank", "4"])
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_a_closed_form_takes_no_step_and_has_no_option_for_one(tiny_pipeline, tmp_path, capsys):
    before = {name: value.clone() for name, value in tiny_pipeline.unet.state_dict().items()}
    erasure = erase(tiny_pipeline, ["knife"], "shrink", shrink_factor=0.25)
    for name, value in tiny_pipeline.unet.state_dict().items():
        factor = 0.25 if name in erasure.weights else 1
        assert torch.equal(value, before[name] * factor)
    assert erasure.record.train_method == "xattn-strict"
    with erasure.disabled() as pipeline:
        assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    assert not torch.equal(next(iter(erasure.weights.values())), before[next(iter(erasure.weights))])
    with pytest.raises(ValueError, match="learning_rate: no option of method 'shrink'"):
        erase(tiny_pipeline, ["knife"], "shrink", learning_rate=1e-3)
    with pytest.raises(SystemExit):
        cli.main(["erase", "--method", "shrink", "--help"])
    help = capsys.readouterr().out
    assert "--shrink_factor" in help and "--learning_rate" not in help and "Small Projections" in help


def test_an_edit_that_does_not_fit_changes_nothing(make_tiny_pipeline):
    @register_method
    @dataclass(kw_only=True)
    class Broken(Method):
        name, title, authors, paper, summary = "broken", "", "", "", ""
        kind: str = option("shape", "What is wrong.", ("shape", "nan"))

        def erase(self, run):
            name, weight = next(iter(run.family.denoiser.named_parameters()))
            run.edit({name: weight[:1] if self.kind == "shape" else weight * float("nan")})

    for kind, error in (("shape", ValueError), ("nan", FloatingPointError)):
        pipeline = make_tiny_pipeline()
        before = fingerprint(pipeline.unet)
        with pytest.raises(error, match="method 'broken'"):
            erase(pipeline, ["knife"], "broken", kind=kind)
        assert fingerprint(pipeline.unet) == before


def test_the_state_of_an_objective_is_part_of_a_checkpoint(tiny_model_folder, tmp_path):
    run = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "9"]
    cli.main(words("halfway", tiny_model_folder, tmp_path / "whole", *run))
    cli.main(words("halfway", tiny_model_folder, tmp_path / "parts", "--max_train_steps", "2", *run))
    resumed = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    cli.main(words("halfway", tiny_model_folder, tmp_path / "resumed", *resumed))
    folders = [StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("whole", "resumed", "parts")]
    whole, resumed, parts = (fingerprint(pipeline.unet) for pipeline in folders)
    assert whole == resumed != parts


def test_two_methods_cannot_have_one_name():
    @dataclass(kw_only=True)
    class Other(Shrink):
        pass

    with pytest.raises(ValueError, match="method 'shrink': is registered already"):
        register_method(Other)


def test_an_unknown_method_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["erase", "--method", "ufo"])
    assert stop.value.code == 2
    assert f"method 'ufo': unknown; allowed are {', '.join(METHODS)}" in capsys.readouterr().err


def test_the_list_of_methods_is_the_help_of_the_command(capsys):
    cli.main(["erase", "--help"])
    help = capsys.readouterr().out
    assert all(name in help and method.summary in help for name, method in METHODS.items())


def test_edits_in_several_steps_are_one(make_tiny_pipeline):
    @register_method
    @dataclass(kw_only=True)
    class Steps(Method):
        name, title, authors, paper, summary = "steps", "", "", "", ""
        fails: bool = option(False, "Raise after the edits.")

        def erase(self, run):
            parameters = dict(run.family.denoiser.named_parameters())
            for name in list(parameters)[:3]:
                run.edit({name: torch.zeros_like(parameters[name])})
            if self.fails:
                raise ValueError("no more")

    pipeline = make_tiny_pipeline()
    before = fingerprint(pipeline.unet)
    with pytest.raises(ValueError, match="no more"):
        erase(pipeline, ["knife"], "steps", fails=True)
    assert fingerprint(pipeline.unet) == before
    erasure = erase(pipeline, ["knife"], "steps")
    assert len(erasure.weights) == 3 and not any(value.any() for value in erasure.weights.values())
    with erasure.disabled():
        assert fingerprint(pipeline.unet) == before


@pytest.mark.parametrize("kind, message", [
    ("in place", "was changed in place; give new tensors"), ("list", "no parameter of this shape"),
    ("nothing", "neither trained nor edited anything"),
])  # fmt: skip
def test_edits_that_mean_nothing_are_errors(kind, message, tiny_pipeline):
    @register_method
    @dataclass(kw_only=True)
    class Wrong(Method):
        name, title, authors, paper, summary = "wrong", "", "", "", ""

        def erase(self, run):
            name, weight = next(iter(run.family.denoiser.named_parameters()))
            with torch.no_grad():
                run.edit({"in place": {name: weight.mul_(0)}, "list": {name: [0.0]}, "nothing": {}}[kind])

    with pytest.raises(ValueError, match=f"method 'wrong': .*{message}"):
        erase(tiny_pipeline, ["knife"], "wrong")


def test_a_closed_form_generates_its_validation_prompts(tiny_model_folder, tmp_path):
    cli.main(words("shrink", tiny_model_folder, tmp_path / "out", "--validation_prompts", "a knife"))
    assert (tmp_path / "out" / "validation" / "step-1.png").is_file()


def test_an_option_of_a_method_cannot_have_a_common_name(tiny_pipeline):
    @register_method
    @dataclass(kw_only=True)
    class Seeded(Method):
        name, title, authors, paper, summary = "seeded", "", "", "", ""
        seed: int = option(7, "Another seed.")

        def erase(self, run):
            raise AssertionError

    with pytest.raises(ValueError, match="option 'seed' of Seeded: is declared elsewhere, too"):
        erase(tiny_pipeline, ["knife"], "seeded")


def test_a_method_is_a_dataclass():
    with pytest.raises(TypeError, match="method 'plain': decorate Plain with @dataclass"):

        @register_method
        class Plain(Method):
            name = "plain"

            def erase(self, run):
                raise AssertionError


@pytest.mark.parametrize("name", ["config", "check", "defaults"])
def test_names_that_a_method_cannot_give_its_options(name):
    kind = dataclass(kw_only=True)(
        type("Named", (Shrink,), {"name": "named", "__annotations__": {name: int}, name: 1})
    )
    with pytest.raises(ValueError, match=f"method 'named': its options cannot be named {name}"):
        register_method(kind)


@pytest.mark.parametrize("value", [1e300, True])
def test_values_that_a_parameter_cannot_hold(value, tiny_pipeline):
    @register_method
    @dataclass(kw_only=True)
    class Odd(Method):
        name, title, authors, paper, summary = "odd", "", "", "", ""

        def erase(self, run):
            name, weight = next(iter(run.family.denoiser.named_parameters()))
            run.edit({name: torch.full(weight.shape, value, dtype=torch.bool if value is True else torch.float64)})

    with pytest.raises(FloatingPointError, match="method 'odd': .* is not finite"):
        erase(tiny_pipeline, ["knife"], "odd")


def test_other_parameters_that_a_closed_form_changes_in_place_are_found(tiny_pipeline):
    @register_method
    @dataclass(kw_only=True)
    class Sly(Method):
        name, title, authors, paper, summary = "sly", "", "", "", ""

        def erase(self, run):
            (first, weight), (_, other), *_ = run.family.denoiser.named_parameters()
            other.data.mul_(2)
            run.edit({first: weight * 2})

    with pytest.raises(ValueError, match="method 'sly': changed parameters in place"):
        erase(tiny_pipeline, ["knife"], "sly")
