"""A straightforward implementation of SDD, written from the paper, as the baseline of the erasure benchmarks."""

from copy import deepcopy

import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional

from diffusers_safe.diffusion.generators import sample_generator
from diffusers_safe.weights.trained import select_parameters


class PlainLoop:
    """Algorithm 1 of SDD (arXiv 2307.05977) for one concept and batch size 1: two UNets, prompts encoded at every
    step, a simple sampling loop, and gradients for all weights although only cross-attention is updated (the reference
    implementation does not freeze the others).

    It samples the same noise and the same number of sampling steps as our loop.

    Args:
        pipeline ([`~diffusers.StableDiffusionPipeline`]): The pipeline whose UNet becomes the student.
        concept (`str`): The concept to erase.
        num_inference_steps (`int`): Number of steps of the sampling schedule.
        device (`torch.device`): Device of both UNets.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, concept: str, num_inference_steps: int, device):
        self.pipeline, self.concept, self.device = pipeline.to(device), concept, device
        self.student = pipeline.unet.train()
        self.average = deepcopy(self.student).requires_grad_(False)
        names = set(select_parameters(self.student, "xattn"))
        self.optimizer = torch.optim.AdamW(
            [parameter for name, parameter in self.student.named_parameters() if name in names],
            lr=1e-5,
            weight_decay=1e-4,
        )
        self.num_inference_steps = num_inference_steps

    def encode(self, prompt: str) -> torch.Tensor:
        with torch.no_grad():
            return self.pipeline.encode_prompt(prompt, self.device, 1, do_classifier_free_guidance=False)[0]

    @torch.no_grad()
    def sample(self, number: int, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator, unet, scheduler = sample_generator(0, "erase", number), self.average, self.pipeline.scheduler
        scheduler.set_timesteps(self.num_inference_steps)
        stop = int(torch.randint(self.num_inference_steps, (), generator=generator))
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        latents = torch.randn(shape, generator=generator).to(self.device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps[:stop]:
            model_input = scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1)
            noise_uncond, noise_text = unet(model_input, t, prompt_embeds).sample.chunk(2)
            latents = scheduler.step(noise_uncond + 3.0 * (noise_text - noise_uncond), t, latents).prev_sample
        t = scheduler.timesteps[stop]
        return scheduler.scale_model_input(latents, t), t

    def train_step(self, number: int) -> float:
        """One optimizer step; returns the loss."""
        empty, concept = self.encode(""), self.encode(self.concept)
        model_input, t = self.sample(number, torch.cat([empty, concept]))
        with torch.no_grad():
            target = self.student(model_input, t, empty).sample
        loss = functional.mse_loss(self.student(model_input, t, concept).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.student.zero_grad()
        with torch.no_grad():
            for average, value in zip(self.average.parameters(), self.student.parameters()):
                average.lerp_(value, 1 - 0.999)
        return loss.item()
