"""Files of every kind give the same weights, and what does not fit changes nothing."""

import json
import os
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_safe.formats import full_rank, load_denoiser, low_rank, read_erased_weights
from diffusers_safe.provenance import Provenance, fingerprint
from erasure_files import FORMS, make_erased, write_form


def state_of(unet):
    return {name: value.detach().clone() for name, value in unet.named_parameters()}


@pytest.mark.parametrize("train_method", ["xattn", "esd-u"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(tiny_pipeline, tmp_path, form, train_method):
    unet = tiny_pipeline.unet
    expected = {**state_of(unet), **make_erased(unet, train_method)}
    erased = read_erased_weights(write_form(form, unet, make_erased(unet, train_method), tmp_path))
    erased.apply(unet)
    for name, value in unet.named_parameters():
        # Only a LoRA computes; all else is copied.
        assert torch.allclose(value, expected[name], atol=2e-6 if form == "lora" else 0, rtol=0), name


@pytest.mark.parametrize("form", FORMS)
def test_what_each_form_tells(tiny_pipeline, tmp_path, form):
    unet = tiny_pipeline.unet
    known = read_erased_weights(write_form(form, unet, make_erased(unet), tmp_path)).known
    ours = {"base_model": "base", "concepts": ["knife"], "method": "sdd", "train_method": "xattn",
            "arguments": {"seed": 1}}  # fmt: skip
    told = {
        "partial": ours,
        "unet-in-folder": ours,
        "esd": {"concepts": ["Van Gogh"], "method": "esd", "train_method": "xattn",
                "arguments": {"erase_from": "a painting"}},
        "esd-v2": {"base_model": "base", "method": "esd", "train_method": "xattn", "arguments": {"guidance": "2"}},
        "esd-alt": {"method": "esd"},
    }.get(form, {})  # fmt: skip
    assert {name: known.get(name) for name in told} == told
    assert ("base_fingerprint" in known) == (told is ours)
    record = read_erased_weights(tmp_path if form == "unet-in-folder" else _path(tmp_path, form)).provenance(
        "given", None, "f" * 16
    )
    assert record.method == told.get("method", "unknown") and record.base_model == "given"


def _path(folder, form):
    return folder if form == "unet" else next(path for path in folder.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_values_take_the_denoisers_dtype(make_tiny_pipeline, tmp_path, form):
    unet = make_tiny_pipeline().unet
    path = write_form(form, unet, make_erased(unet), tmp_path)
    half = make_tiny_pipeline().unet.to(torch.bfloat16)
    if form in ("partial", "unet-in-folder"):
        with pytest.raises(ValueError, match="in torch.bfloat16; load it in float32"):
            read_erased_weights(path).apply(half)
    else:
        read_erased_weights(path).apply(half)
        name, value = next(iter(make_erased(unet).items()))
        assert torch.allclose(dict(half.named_parameters())[name].float(), value, rtol=2e-2, atol=2e-3)
        assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def refused(path, unet, match):
    before = fingerprint(unet)
    with pytest.raises(ValueError, match=match) as refusal:
        read_erased_weights(path).apply(unet)
    assert fingerprint(unet) == before and "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_does_not_belong_is_refused(tiny_pipeline, tmp_path, form):
    unet = tiny_pipeline.unet
    path = write_form(form, unet, make_erased(unet), tmp_path)
    if form.startswith("unet") and form != "unet-pickle":
        weights = next(path.rglob("*.safetensors"))
        save_file({**load_file(weights), "nowhere.weight": torch.zeros(1)}, weights, {"format": "pt"})
    elif path.suffix == ".safetensors":
        extra = {f"unet.nowhere.lora_{x}.weight": torch.zeros(1, 1) for x in "AB"} if form == "lora" else {}
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({**load_file(path), **(extra or {"nowhere.weight": torch.zeros(1)})}, path, metadata)
    else:
        state = torch.load(path)
        if form == "esd-alt":
            state["unet.nowhere"] = {"weight": torch.zeros(1)}
        else:
            name = "nowhere.weight" if form == "unet-pickle" else "model.diffusion_model.nowhere.weight"
            state.get("state_dict", state)[name] = torch.zeros(1)
        torch.save(state, path)
    refused(path, unet, "nowhere")


@pytest.mark.parametrize("form", FORMS)
def test_another_architecture_is_refused(tiny_pipeline, tmp_path, form):
    path = write_form(form, tiny_pipeline.unet, make_erased(tiny_pipeline.unet), tmp_path)
    config = {**tiny_pipeline.unet.config, "cross_attention_dim": 40}
    refused(path, type(tiny_pipeline.unet).from_config(config), "shape|fingerprint")


@pytest.mark.parametrize("form", ["ldm", "ldm-lightning", "unet-pickle", "unet"])
def test_a_whole_unet_lacks_nothing(tiny_pipeline, tmp_path, form):
    unet = tiny_pipeline.unet
    path = write_form(form, unet, make_erased(unet), tmp_path)
    if form == "unet":
        weights = path / "diffusion_pytorch_model.safetensors"
        state = load_file(weights)
        state.pop("conv_out.bias")
        save_file(state, weights, {"format": "pt"})
    else:
        state = torch.load(path)
        tensors = state.get("state_dict", state)
        tensors.pop("conv_out.bias" if form == "unet-pickle" else "model.diffusion_model.out.2.bias")
        torch.save(state, path)
    refused(path, unet, "missing.*conv_out.bias")


def test_a_smaller_unet_does_not_pass_for_the_base(tiny_pipeline, tmp_path):
    """A block-removed student's names are a part of its teacher's."""
    config = {**tiny_pipeline.unet.config, "layers_per_block": 1}
    type(tiny_pipeline.unet).from_config(config).save_pretrained(tmp_path)
    refused(tmp_path, tiny_pipeline.unet, "missing|shape|no parameter")


def test_values_that_are_no_numbers_are_refused(tiny_pipeline, tmp_path):
    erased = make_erased(tiny_pipeline.unet)
    name = list(erased)[-1]
    erased[name].view(-1)[0] = float("nan")
    refused(write_form("esd", tiny_pipeline.unet, erased, tmp_path), tiny_pipeline.unet, f"{name} holds values")
    erased[name] = torch.zeros_like(erased[name], dtype=torch.long)
    refused(write_form("esd", tiny_pipeline.unet, erased, tmp_path), tiny_pipeline.unet, f"{name} holds values")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_with_code_is_refused_and_does_not_run(tiny_pipeline, tmp_path):
    target = tmp_path / "created"
    evil = {"conv_in.weight": Evil(str(target))}
    torch.save(evil, tmp_path / "evil.pt")
    refused(
        tmp_path / "evil.pt", tiny_pipeline.unet, r"refused, the pickle holds more than tensors \(it names .*mkdir"
    )
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(evil, protocol=2))
    refused(tmp_path / "evil.ckpt", tiny_pipeline.unet, "evil.ckpt: (refused|not a file of torch.save)")
    assert not target.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert target.exists()  # the code was real


def test_files_that_are_nothing(tiny_pipeline, tmp_path):
    unet = tiny_pipeline.unet
    files = {
        "empty.safetensors": "not a whole safetensors file",
        "empty.pt": "not a file of torch.save",
        "text.ckpt": "not a file of torch.save|refused",
        "table.csv": "erased weights are in files ending in",
    }
    for name, message in files.items():
        (tmp_path / name).write_text("" if name.startswith("empty") else "some text")
        refused(tmp_path / name, unet, message)
    refused(tmp_path / "none.pt", unet, "no such file or folder")
    save_file({}, tmp_path / "nothing.safetensors")
    refused(tmp_path / "nothing.safetensors", unet, "holds no weights")
    for value, message in (
        ({}, "no weights"),
        ([1], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({"a": 1}, "'a' is of type int; weights, tensors by name, are needed"),
    ):
        torch.save(value, tmp_path / "value.pt")
        refused(tmp_path / "value.pt", unet, message)
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", unet, "holds no erased weights")
    refused(tmp_path, unet, "several files, of which weight_name must name one")


@pytest.mark.parametrize(
    "metadata, match",
    [
        ({"format": "diffusers-safe-partial-9"}, "format 'diffusers-safe-partial-9'; allowed are"),
        ({"format": "erasing-esd-v2", "component": "vae"}, "component 'vae'"),
        ({"format": "diffusers-safe-partial-1", "concepts": "knife"}, "metadata concepts 'knife'"),
        ({"format": "diffusers-safe-partial-1", "concepts": "[" * 100_000}, "metadata concepts"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(tiny_pipeline, tmp_path, metadata, match):
    save_file(make_erased(tiny_pipeline.unet), tmp_path / "x.safetensors", metadata)
    refused(tmp_path / "x.safetensors", tiny_pipeline.unet, match)


def test_the_alt_form_knows_weight_and_bias_of_the_unet_only(tiny_pipeline, tmp_path):
    for state, match in (
        ({"text_encoder.x": {"weight": torch.zeros(1)}}, "text_encoder.x is no module of the unet"),
        ({"unet.conv_in": {"running_mean": torch.zeros(1)}}, "holds 'running_mean'"),
    ):
        torch.save(state, tmp_path / "alt.pt")
        refused(tmp_path / "alt.pt", tiny_pipeline.unet, match)


def test_a_whole_pipeline_folder(make_tiny_pipeline, tmp_path):
    pipeline = make_tiny_pipeline()
    provenance = Provenance("base", fingerprint(pipeline.unet), ["knife"], "sdd", "xattn", {})
    expected = {**state_of(pipeline.unet), **make_erased(pipeline.unet)}
    read_erased_weights(write_form("esd", pipeline.unet, make_erased(pipeline.unet), tmp_path / "file")).apply(
        pipeline.unet
    )
    pipeline.save_pretrained(tmp_path / "model")
    provenance.save(tmp_path / "model")
    unet = make_tiny_pipeline().unet
    erased = read_erased_weights(tmp_path / "model")
    assert erased.provenance("elsewhere", None, fingerprint(unet)) == provenance
    erased.apply(unet)
    assert all(torch.equal(value, expected[name]) for name, value in unet.named_parameters())
    with pytest.raises(ValueError, match="nothing was erased"):
        read_erased_weights(tmp_path / "model" / "unet").changes(unet)
    refused(tmp_path / "model", make_tiny_pipeline(seed=3).unet, "made for base with fingerprint")


@pytest.mark.parametrize(
    ("name", "concepts", "erase_from", "train_method"),
    [
        ("esd-Van_Gogh-from-Van_Gogh-esdx", ["Van Gogh"], None, "xattn"),
        ("esd-Van_Gogh-from-a_painting-esdxstrict", ["Van Gogh"], "a painting", "xattn-strict"),
        ("esd-Spider-Man-from-a_man-esdu", ["Spider-Man"], "a man", "esd-u"),
        ("esd-nudity-from-nudity-esdall", ["nudity"], None, "full"),
        ("esd-Van_Gogh-from-Van_Gogh-esd-x", ["Van Gogh"], None, "xattn"),
        ("esd-Van_Gogh-from-a_painting-esd-x-strict", ["Van Gogh"], "a painting", "xattn-strict"),
        ("esd-Spider-Man-from-X-Men-xattn-strict", ["Spider-Man"], "X-Men", "xattn-strict"),
        ("esd-man_from_Mars-from-man_from_Mars-noxattn", ["man from Mars"], None, "noxattn"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_of_esds_files_are_read(tiny_pipeline, tmp_path, name, concepts, erase_from, train_method, suffix):
    path, erased = tmp_path / f"{name}{suffix}", make_erased(tiny_pipeline.unet)
    save_file(erased, path) if suffix == ".safetensors" else torch.save(erased, path)
    known = read_erased_weights(path).known
    assert known["concepts"] == concepts and known["train_method"] == train_method
    assert known["arguments"] == ({} if erase_from is None else {"erase_from": erase_from})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("name", "concept", "train_method", "arguments"),
    [
        ("esd-Van_Gogh_from_Van_Gogh-xattn-strict_1-epochs_200", "Van Gogh", "xattn-strict", {}),
        ("esd-vangogh_from_vangogh-xattn_1.0-epochs_200", "vangogh", "xattn", {"negative_guidance": "1.0"}),
        ("esd-ironman_from_man-esd-x_1-epochs_200", "ironman", "xattn", {"erase_from": "man"}),
    ],
)
def test_names_of_esds_older_files_are_read(
    make_tiny_pipeline, tmp_path, name, concept, train_method, arguments, suffix
):
    """`.pt` files hold a dict for each module."""
    unet, path = make_tiny_pipeline().unet, tmp_path / f"{name}{suffix}"
    erased = make_erased(unet)
    modules = {key.rpartition(".")[0]: {} for key in erased}
    for key, value in erased.items():
        modules[key.rpartition(".")[0]][key.rpartition(".")[2]] = value
    pickled = {f"unet.{module}": parts for module, parts in modules.items()}
    save_file(erased, path) if suffix == ".safetensors" else torch.save(pickled, path)
    known = read_erased_weights(path).known
    assert known["method"] == "esd" and known["concepts"] == [concept] and known["train_method"] == train_method
    assert known["arguments"] == {"negative_guidance": "1", "iterations": "200", **arguments}


def test_names_that_are_not_esds_tell_nothing(tiny_pipeline, tmp_path):
    for name in ("esd-a-from-b-esdx-lr-0.000020-iter-200", "esd-a-from-b", "esd-xattn_1-epochs_200"):
        save_file(make_erased(tiny_pipeline.unet), tmp_path / f"{name}.safetensors")
        assert read_erased_weights(tmp_path / f"{name}.safetensors").known == {}


def test_metadata_of_esd_wins_over_the_name(tiny_pipeline, tmp_path):
    path = tmp_path / "esd-a_b-from-c-esdu.safetensors"
    metadata = {"format": "erasing-esd-v2", "train_method": "esd-x", "erase_concept": "a_b", "erase_from": "",
                "guidance_scale": "3", "negative_guidance": "2"}  # fmt: skip
    save_file(make_erased(tiny_pipeline.unet), path, metadata)
    known = read_erased_weights(path).known
    assert known["concepts"] == ["a_b"] and known["train_method"] == "xattn"
    assert known["arguments"] == {"erase_from": "c", "guidance_scale": "3", "negative_guidance": "2"}


@pytest.mark.parametrize("train_method", ["xattn", "selfattn", "noxattn", "full"])
@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"unet": state},
    lambda state: {"model": state, "optimizer": {"lr": 1}},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {f"unet.{name}": value for name, value in state.items()},
])  # fmt: skip
def test_a_pickle_may_hold_what_a_train_method_trains(tiny_pipeline, tmp_path, train_method, wrap):
    erased = make_erased(tiny_pipeline.unet, train_method)
    torch.save(wrap(erased), tmp_path / "weights.pt")
    values = read_erased_weights(tmp_path / "weights.pt").values(tiny_pipeline.unet)
    assert values.keys() == erased.keys() and all(torch.equal(values[name], erased[name]) for name in erased)


def test_a_pickle_of_some_other_weights_says_what_to_do(tiny_pipeline, tmp_path):
    erased = dict(list(make_erased(tiny_pipeline.unet).items())[:5])
    torch.save(erased, tmp_path / "some.pt")
    refused(
        tmp_path / "some.pt", tiny_pipeline.unet, "holds 5 of the denoiser's 684 parameters.*save it as .safetensors"
    )
    save_file(erased, tmp_path / "some.safetensors")
    assert len(read_erased_weights(tmp_path / "some.safetensors").values(tiny_pipeline.unet)) == 5


@pytest.mark.parametrize("state, match", [
    ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 8)}}, "a textual inversion embedding"),
    ({"<knife>": torch.zeros(8)}, "a textual inversion embedding, and no erasure of a denoiser"),
    ({"image_proj": {"proj.weight": torch.zeros(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)}}, "an IP-Ad"),
    ({"decoder.up_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, "weights of an autoencoder"),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2)}, "weights of a text encoder"),
    ({"lora_unet_mid_block_x.hada_w1_a": torch.zeros(2)}, "a LyCORIS file"),
    ({"lora_unet_x.lora_mid.weight": torch.zeros(2), "lora_unet_x.lora_up.weight": torch.zeros(2)}, "only plain LoRA"),
    ({"conv_in.weight": torch.zeros(8, 4, 3, 3).to_sparse()}, "sparse or quantized"),
])  # fmt: skip
def test_files_of_other_kinds_are_named(tiny_pipeline, tmp_path, state, match):
    torch.save(state, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", tiny_pipeline.unet, match)


def test_paths_that_cannot_be_read(tiny_pipeline, tmp_path):
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    torch.save(make_erased(tiny_pipeline.unet), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    refused(tmp_path / "loop.pt", tiny_pipeline.unet, "no such file or folder")
    refused(tmp_path / f"{'a' * 5000}.pt", tiny_pipeline.unet, r"aaa\.\.\.aaa.*no such file or folder")
    refused(tmp_path / "cut.pt", tiny_pipeline.unet, "cut.pt: not a file of torch.save .it is not whole")


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_lora_counts_as_diffusers_counts_it(make_tiny_pipeline, tmp_path, alpha):
    """The reference is diffusers' own loading and fusing."""
    from peft import LoraConfig, get_peft_model_state_dict

    donor = make_tiny_pipeline().unet
    config = LoraConfig(r=2, lora_alpha=alpha or 2, target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
                        rank_pattern={"conv1": 3}, alpha_pattern={"conv1": 5} if alpha else {})  # fmt: skip
    donor.add_adapter(config)
    for name, value in donor.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    metadata = None if alpha is None else {**config.to_dict(), "target_modules": sorted(config.target_modules)}
    metadata = metadata and {key: value for key, value in metadata.items() if key in
                             ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")}  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(donor), unet_lora_adapter_metadata=metadata
    )
    stock = make_tiny_pipeline()
    stock.load_lora_weights(tmp_path)
    stock.fuse_lora()
    stock.unload_lora_weights()
    unet = make_tiny_pipeline().unet
    read_erased_weights(tmp_path).apply(unet)
    fused = dict(stock.unet.named_parameters())
    assert all(torch.allclose(value, fused[name], atol=1e-6) for name, value in unet.named_parameters())
    assert fingerprint(unet) != fingerprint(make_tiny_pipeline().unet)


def test_an_old_lora_of_diffusers(tiny_pipeline, tmp_path):
    unet, layer = tiny_pipeline.unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    before = unet.get_submodule(layer).weight.clone()
    up, down = torch.randn(8, 2), torch.randn(2, 32)
    old = layer.replace(".to_k", ".processor.to_k_lora")
    save_file({f"unet.{old}.up.weight": up, f"unet.{old}.down.weight": down}, tmp_path / "lora.safetensors")
    read_erased_weights(tmp_path / "lora.safetensors").apply(unet)
    assert torch.allclose(unet.get_submodule(layer).weight, before + up @ down, atol=1e-6)


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"text_encoder.x.lora_A.weight": (2, 8), "text_encoder.x.lora_B.weight": (8, 2)}, "text_encoder.x.*another"),
        ({"lora_unet_conv_in.lora_down.weight": (2, 8)}, "lora_unet_conv_in.lora_up.weight is missing"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "1 of its 1 .*: unet.conv_in.lora_B.weight is missing"),
        (
            {"unet.x.lora_A.weight": (2, 8), "unet.x.lora_B.weight": (8, 3)},
            r"lora_B.weight \(8, 3\) do not make",
        ),
        ({"unet.mid_block.lora_A.weight": (2, 8), "mid_block.lora_A.weight": (2, 8)}, "is there twice, by two names"),
        ({"unet.x.lora_B.bias": (8,)}, "x: a bias without matrices"),
        (
            {"unet.x.lora_A.weight": (2, 8), "unet.x.lora_magnitude_vector": (8,)},
            "DoRA or another relative of LoRA.: only plain LoRAs can be read",
        ),
        ({"unet.x.lora_up.weight": (8, 2), "unet.x.alpha": (2,)}, r"unet.x.alpha: has shape \(2,\); one number"),
        ({"unet.x.lora_up.weight": (8, 2), "unet.y.alpha": ()}, "unet.y.alpha: has no matrices"),
    ],
)
def test_what_is_no_lora_of_a_unet_is_refused(tiny_pipeline, tmp_path, tensors, match):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", tiny_pipeline.unet, match)


def test_load_denoiser_makes_nothing_up(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="config.json: No such file"):
        load_denoiser(tmp_path)
    tiny_pipeline.unet.save_pretrained(tmp_path)
    assert fingerprint(load_denoiser(tmp_path)) == fingerprint(tiny_pipeline.unet)


def by_kohya(tensors):
    """A LoRA by the names of kohya-ss' scripts, with their alphas."""
    renamed = {}
    for name, value in tensors.items():
        layer, _, which = name.removeprefix("unet.").partition(".lora_")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{layer}.lora_{'down' if which[0] == 'A' else 'up'}.weight"] = value
        renamed[f"{layer}.alpha"] = torch.tensor(float(value.shape[0 if which[0] == "A" else 1]))
    return renamed


@pytest.mark.parametrize("names", ["diffusers", "no prefix", "peft", "peft with adapter", "kohya"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_lora_is_read_by_the_names_of_each_program(tiny_pipeline, tmp_path, names, suffix):
    unet = tiny_pipeline.unet
    erased = make_erased(unet, "xattn-strict")
    tensors = low_rank(unet, erased, full_rank(unet, erased)).tensors
    if names != "diffusers":
        tensors = {name.removeprefix("unet."): value for name, value in tensors.items()}
    if "peft" in names:
        adapter = ".default" if "adapter" in names else ""
        tensors = {f"base_model.model.{name.removesuffix('.weight')}{adapter}.weight": value
                   for name, value in tensors.items()}  # fmt: skip
        ranks = {f"{name.removesuffix('.weight')}": min(value.shape) for name, value in erased.items()}
        config = {"r": 1, "lora_alpha": 1, "alpha_pattern": {name: 2 * rank for name, rank in ranks.items()}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if names == "kohya":
        tensors = by_kohya(tensors)
    path = tmp_path / f"lora{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    values, scale = read_erased_weights(path).values(unet), 2 if "peft" in names else 1
    own = dict(unet.named_parameters())
    assert values.keys() == erased.keys()
    for name, value in values.items():
        torch.testing.assert_close(value - own[name], scale * (erased[name] - own[name]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config, match", [
    ({"lora_alpha": "8"}, "lora_alpha '8': must be a number"),
    ({"lora_alpha": None}, "lora_alpha 'None': must be a number"),
    ({"alpha_pattern": ["x"]}, "alpha_pattern .'x'.: must be an object"),
    ({"alpha_pattern": {"x": True}}, "x 'True': must be a number"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["adapter_config.json", "metadata"])
def test_an_alpha_that_is_no_number_is_named(tiny_pipeline, tmp_path, config, match, where):
    prefix = "unet." if where == "metadata" else "base_model.model."
    layer = f"{prefix}down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_"
    tensors = {f"{layer}A.weight": torch.ones(2, 32), f"{layer}B.weight": torch.ones(8, 2)}
    prefixed = {f"unet.{name}": value for name, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(prefixed)} if where == "metadata" else None
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path / "lora.safetensors", tiny_pipeline.unet, f"{where}: {match}|{where} *.*{match}")


def test_a_lora_that_also_changes_the_text_encoder_is_no_erasure(tiny_pipeline, tmp_path):
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{layer}.lora_down.weight": torch.zeros(2, 32), f"{layer}.lora_up.weight": torch.zeros(32, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", tiny_pipeline.unet, "changes another component than the denoiser.*--lora")
