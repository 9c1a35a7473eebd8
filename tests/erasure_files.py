"""The same erasure, written as every kind of file."""

import re

import torch
from safetensors.torch import save_file

from diffusers_safe.formats import full_rank, low_rank, save_partial
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.weights.trained import select_parameters


def to_compvis(state):
    """A diffusers UNet of SD's layout by CompVis names, `input_blocks.1.0.in_layers.0.weight` and so on."""
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
              "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
    patterns = [
        (r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda b, kind, i: f"input_blocks.{1 + 3 * b + i}.{kind}"),
        (r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda b, kind, i: f"output_blocks.{3 * b + i}.{kind}"),
        (r"down_blocks\.(\d)\.(downsamplers)\.(\d)\.conv", lambda b, kind, i: f"input_blocks.{3 * b + 3}.0.op"),
        (
            r"up_blocks\.(\d)\.(upsamplers)\.(\d)\.conv",
            lambda b, kind, i: f"output_blocks.{3 * b + 2}.{2 if b else 1}.conv",
        ),
    ]
    converted = {}
    for name, value in state.items():
        new = name
        for start, other in fixed.items():
            if name.startswith(f"{start}."):
                new = other + name.removeprefix(start)
        for pattern, make in patterns:
            if match := re.match(pattern, name):
                kind = {"resnets": 0, "attentions": 1}.get(match[2])
                new = make(int(match[1]), kind, int(match[3])) + name.removeprefix(match[0])
        if "resnets" in name:
            new = re.sub(r"\.(norm1|conv1|norm2|conv2|time_emb_proj|conv_shortcut)\.",
                         lambda match: f".{resnet[match[1]]}.", new)  # fmt: skip
        converted[f"model.diffusion_model.{new}"] = value
    return converted


def write_form(form, unet, erased, path, base_model="base"):
    """Writes `erased`, parameters by name of a base `unet`, as one of many forms below the folder `path`; returns the
    path that is read."""
    path.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach().clone() for name, value in unet.named_parameters()}
    whole = {**own, **erased}
    provenance = Provenance(base_model, fingerprint(unet), ["knife"], "sdd", "xattn", {"seed": 1})
    if form == "partial":
        path /= "some.safetensors"
        save_partial(erased, provenance, path)
    elif form == "esd":
        path /= "esd-Van Gogh-from-a painting-esdx.safetensors"
        save_file(erased, path)
    elif form == "esd-v2":
        path /= "any.safetensors"
        save_file(erased, path, {"format": "erasing-esd-v2", "component": "unet", "base_model_id": base_model,
                                 "train_method": "esd-x", "guidance": "2"})  # fmt: skip
    elif form == "esd-alt":
        path /= "alt.pt"
        nested = {}
        for name, value in erased.items():
            module, _, kind = name.rpartition(".")
            nested.setdefault(f"unet.{module}", {})[kind] = value
        torch.save(nested, path)
    elif form in ("ldm", "ldm-lightning"):
        state = {**to_compvis(whole), "betas": torch.zeros(3), "first_stage_model.x": torch.zeros(1)}
        state["cond_stage_model.transformer.y"] = torch.zeros(1, dtype=torch.long)
        path /= "sd.ckpt" if form == "ldm" else "sd.pt"
        torch.save(state if form == "ldm" else {"state_dict": state, "global_step": 3}, path)
    elif form == "unet-pickle":
        path /= "diffusers-nudity-ESDu1-UNET.pt"
        torch.save(whole, path)
    elif form in ("unet", "unet-in-folder"):
        changed = type(unet).from_config(unet.config)
        changed.load_state_dict(whole)
        changed.save_pretrained(path if form == "unet" else path / "unet")
        if form == "unet-in-folder":
            provenance.save(path)
    elif form == "lora":
        path /= "pytorch_lora_weights.safetensors"
        save_file(low_rank(unet, erased, full_rank(unet, erased), biases=True).tensors, path)
    return path


FORMS = "partial esd esd-v2 esd-alt ldm ldm-lightning unet-pickle unet unet-in-folder lora".split()


def make_erased(unet, train_method="xattn"):
    """Values of the parameters that a train method selects; not the UNet's own."""
    parameters = dict(unet.named_parameters())
    generator = torch.Generator().manual_seed(1)
    return {
        name: parameters[name].detach() + 0.02 * torch.randn(parameters[name].shape, generator=generator)
        for name in select_parameters(unet, train_method)
    }
