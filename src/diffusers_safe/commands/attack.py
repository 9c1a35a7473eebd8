"""Attacks an erased model and the unerased one: how often does the erased concept come back?

    diffusers-safe attack --model runs/demo/weapon-0/model --emoji weapon --attacks seeds
    diffusers-safe attack --model sd-1.4-safe --original CompVis/stable-diffusion-v1-4 \\
        --prompts prompts.csv --metrics nudity --attacks seeds paraphrases --paraphrases translations.csv
    diffusers-safe attack --model ... --original ... --prompts "a photo of a church" --metrics ... \\
        --attacks inversion --concept church

Attacks: seeds (each prompt with more seeds), paraphrases (your own file of other wordings or translations), inversion
(Concept Inversion: learns the embedding of a new token that stands for the erased concept). --emoji needs no other
weights: the embedded model is the original, and its judge decides what succeeds. A stopped run continues when it is
started again. docs/robustness.md explains the numbers. The commands with Stable Diffusion are examples that follow no
paper and were not run here.
"""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from accelerate import PartialState

from ..arguments import typed
from ..attacks import Attack, ConceptInversion, InversionSettings, Paraphrases, SeedSearch, read_paraphrases
from ..attacks.inversion import TEMPLATE, square_side
from ..attacks.run import attack as attack_models
from ..attacks.run import check_attack, check_folder
from ..attacks.token_learning import check_learnable
from ..command_line import parse_dataclass
from ..comparison.models import check_models
from ..comparison.options import EvaluationOptions
from ..comparison.used_folder import report_claim
from ..diffusion.loss_weighting import LOSS_SPACE_HELP, LOSS_WEIGHTINGS
from ..emoji.evaluation import SETTINGS as EMOJI_SETTINGS
from ..emoji.evaluation import Erased
from ..families import StoredModel
from ..generation.folders import ImageFolder
from ..generation.models import DTYPES, SteeredModel
from ..generation.rows import GenerationSettings, PromptRow
from ..messages import exit_with_error
from ..metrics import METRICS, make_metrics
from ..metrics.base import check_once
from ..output_folders import OVERWRITE_HELP, check_claim
from ..report.builder import FEW_IMAGES, PICTURES
from ..report.results import PAGE_NAME, headline_table
from .evaluate import GUIDANCE_HELP, STEPS_HELP, embedded_base, named, read_models


# Attack -> its options, or prefixes of their names.
ATTACKS = {"seeds": ("num_seeds",), "paraphrases": ("paraphrases",), "inversion": ("concept", "inversion_")}
SUCCESS_METRICS = ("nudity", "q16", "inappropriate")  # those of METRICS that judge single images


@typed
@dataclass(kw_only=True)
class AttackArguments(EvaluationOptions):
    model: list[str] = field(metadata={"help": "Erased models: folders or Hub ids of pipelines, also as name=MODEL."})
    original: str | None = field(
        default=None,
        metadata={"help": "The model before the erasure, the control. Default with --emoji: the embedded model."},
    )
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts, or one .csv file with a column `prompt`. Default with --emoji: those of what was erased."
        },
    )
    attacks: list[str] = field(metadata={"help": f"Attacks to run: {', '.join(ATTACKS)}.", "choices": ATTACKS})
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Metrics that recognise the concept on an image; an image is a success if one of them does: "
            f"{', '.join(SUCCESS_METRICS)}; or your own as module:name."
        },
    )
    emoji: str | None = field(
        default=None,
        metadata={
            "help": "What was erased from the embedded model: a group of emoji (weapon), an object (knife) or a style "
            "(sketch). Adds the emoji judge to the metrics."
        },
    )
    images_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Number of images per prompt, with consecutive seeds; each is attacked. Default: as many as give"
            f" each attack at least {FEW_IMAGES} pairs of prompt and seed."
        },
    )
    num_seeds: int = field(
        default=4, metadata={"help": "Number of seeds per prompt for --attacks seeds, including its own."}
    )
    paraphrases: str | None = field(
        default=None,
        metadata={"help": "Paraphrases: a .csv or .jsonl file with columns `prompt` and `paraphrase`, one per row."},
    )
    concept: str | None = field(
        default=None,
        metadata={
            "help": "Words in the prompts that inversion replaces by its token. Prompts without them are left out."
        },
    )
    inversion_steps: int = field(default=1000, metadata={"help": "Number of training steps of inversion."})
    inversion_batch_size: int = field(default=4, metadata={"help": "Batch size of inversion."})
    inversion_learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the token's embedding."})
    inversion_loss_space: str = field(
        default="prediction", metadata={"help": LOSS_SPACE_HELP, "choices": LOSS_WEIGHTINGS}
    )
    inversion_initializer: str | None = field(
        default=None, metadata={"help": "Words whose embedding is the token's initial value. Default: --concept."}
    )
    inversion_pictures: str | None = field(
        default=None,
        metadata={"help": "Folder with training images of the concept. Default: generated with the original model."},
    )
    inversion_template: str = field(
        default=TEMPLATE, metadata={"help": "Caption of --inversion_pictures; {} stands for the learned token."}
    )
    inversion_num_pictures: int = field(
        default=8, metadata={"help": "Number of training images to generate with the original model."}
    )
    inversion_checkpointing_steps: int = field(
        default=100, metadata={"help": "Training steps between checkpoints of inversion. 0: no checkpoints."}
    )
    output_dir: str = field(default="runs/attack", metadata={"help": "Output folder: images, numbers and report."})
    pictures: int = field(
        default=PICTURES, metadata={"help": "Number of prompts per attack whose images are in the report. 0: none."}
    )
    dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the weights: {', '.join(DTYPES)}.", "choices": DTYPES}
    )

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})
    num_inference_steps: int | None = field(default=None, metadata={"help": STEPS_HELP})
    guidance_scale: float | None = field(default=None, metadata={"help": GUIDANCE_HELP})

    def __post_init__(self):
        settings = GenerationSettings() if self.emoji is None else EMOJI_SETTINGS
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(settings, name))
        super().__post_init__()
        if not self.attacks:
            raise ValueError(f"attacks: none given; known are {', '.join(ATTACKS)}")
        check_once("attack", self.attacks)
        self._check_use()
        self.made_models = self._read_models()
        self.made_attacks = [self._make_attack(name) for name in self.attacks]
        self.rows = self._attacked_rows()

    def _check_use(self) -> None:
        """Checks that every given option has an effect.

        Raises:
            `ValueError`: If a metric cannot judge success, or an option has no effect on the attacks.
        """
        for name in self.metrics:
            if name in METRICS and name not in SUCCESS_METRICS:
                raise ValueError(
                    f"metric '{name}': does not say of an image whether it shows the concept; allowed are "
                    f"{', '.join(SUCCESS_METRICS)}, or your own as module:name"
                )
        given = [item.name for item in fields(self) if item.init and getattr(self, item.name) != item.default]
        for attack, options in ATTACKS.items():
            for name in given:
                if name.startswith(options) and attack not in self.attacks:
                    raise ValueError(f"{name}: has no effect without --attacks {attack}")
        if self.inversion_pictures is None and self.inversion_template != TEMPLATE:
            raise ValueError("inversion_template: has no effect without --inversion_pictures")
        if self.inversion_pictures is not None and "inversion_num_pictures" in given:
            raise ValueError("inversion_num_pictures: has no effect with --inversion_pictures")

    def _read_models(self) -> list[SteeredModel]:
        if self.original is None and self.emoji is None:
            raise ValueError("original: none given; a success rate needs that of the unerased model next to it")
        words = [named(self.original or embedded_base(self.model[0]), "original")]
        words += [named(word, "erased") if len(self.model) == 1 else word for word in self.model]
        models = read_models(words, self.dtype)
        check_models(models)
        for model in models:
            if isinstance(model, ImageFolder):
                raise ValueError(f"model '{model.folder}': not a folder of a diffusers pipeline")
        return models

    def _attacked_rows(self) -> list[PromptRow]:
        erased = None if self.emoji is None else Erased(self.emoji)
        labels = {}
        if erased is not None:  # labels that its metric needs
            labels = {"subject": erased.name, "part": "erased", **({"style": erased.style} if erased.style else {})}
        self.chosen_prompts = bool(self.prompts)
        self.prompts = self.prompts or (erased.prompts if erased else [])
        if not self.prompts:
            raise ValueError("prompts: none given")
        if self.images_per_prompt is None:
            self.images_per_prompt = 1
            rows = self.read_rows()
            fewest = min(len(attack.targets(rows)) for attack in self.made_attacks)
            self.images_per_prompt = math.ceil(FEW_IMAGES / (fewest or FEW_IMAGES))
        rows = [replace(row, labels={**row.labels, **labels}) for row in self.read_rows()]
        targets = {row.id for attack in self.made_attacks for row in attack.targets(rows)}
        return [row for row in rows if row.id in targets] or rows

    @property
    def source(self) -> dict:
        """The source of the prompts, for the protocol."""
        return super().source if self.chosen_prompts else {"source": f"--emoji {self.emoji}"}

    def _make_attack(self, name: str) -> Attack:
        if name == "seeds":
            return SeedSearch(self.num_seeds)
        if name == "paraphrases":
            if self.paraphrases is None:
                raise ValueError("paraphrases: none given; a .csv or .jsonl file with columns prompt and paraphrase")
            return Paraphrases(read_paraphrases(self.paraphrases), Path(self.paraphrases).name)
        if self.concept is None:
            raise ValueError("concept: none given; inversion needs the words of the prompts that it replaces")
        square_side(self.settings)
        settings = InversionSettings(
            steps=self.inversion_steps,
            batch_size=self.inversion_batch_size,
            learning_rate=self.inversion_learning_rate,
            loss_space=self.inversion_loss_space,
            initializer=self.inversion_initializer,
            num_pictures=self.inversion_num_pictures,
            seed=self.seed,
            checkpointing_steps=self.inversion_checkpointing_steps,
        )
        return ConceptInversion(self.concept, settings, self.inversion_pictures, self.inversion_template)


def check_surroundings(args: AttackArguments) -> None:
    """Checks the models' indices, what metrics need, the attacks, and the output folder."""
    if (count := PartialState().num_processes) > 1:
        raise ValueError(f"{count} processes: attacks run in one process; start the command without a launcher")
    for model in args.made_models:
        model.check()
        for inversion in (attack for attack in args.made_attacks if isinstance(attack, ConceptInversion)):
            stored = StoredModel(model.model, args.height, "model", revision=model.revision)
            check_learnable(stored.make_scheduler(), args.inversion_loss_space)
            stored.check_prompts(inversion.single_token_texts(args.rows))
            if model.dtype == "float16":
                raise ValueError("dtype float16: gradients of inversion underflow; use float32 or bfloat16")
    args.made_metrics = make_metrics(args.metrics, args) if args.metrics or args.emoji is None else []
    if args.emoji is not None:
        args.made_metrics.append(Erased(args.emoji).recognition())
    check_attack(args.made_models, args.rows, args.made_attacks, args.made_metrics)
    check_folder(args.made_models, args.rows, args.made_attacks, args.output_dir, args.settings, args.overwrite)
    check_claim(args.output_dir, **report_claim("attack", args.overwrite))


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(AttackArguments, __doc__, argv, prog, check_surroundings)
    with exit_with_error():
        results = attack_models(
            args.made_models,
            args.rows,
            args.made_attacks,
            args.made_metrics,
            args.output_dir,
            prompts=args.source,
            overwrite=args.overwrite,
            **args.shown,
        )
    print(f"\n{headline_table(results)}\n")
    print((Path(args.output_dir) / PAGE_NAME).resolve().as_uri())
