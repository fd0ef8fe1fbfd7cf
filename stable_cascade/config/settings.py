"""Every setting of every trainer: flat keys as the training guide writes them, checked before any weight is read.

A trainer's config is a dataclass composed of the small ones below. The line under a field is its documentation:
`--help` and the reference page are generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stable_cascade.config import rules
from stable_cascade.config.fields import REQUIRED, setting


@dataclass
class RunSettings:
    """The run: names, folders, length, saving, logging."""

    experiment_id: str = setting(REQUIRED, check=rules.folder_name, resume="free")
    """Name of the run; its folders under `checkpoint_path` and `output_path` carry it."""
    checkpoint_path: str = setting(REQUIRED, path=True, resume="free", card=False)
    """Folder for run checkpoints and trained weights; the run's own are in `checkpoint_path/experiment_id`."""
    output_path: str = setting(REQUIRED, path=True, resume="free", card=False, elsewhere="output_dir")
    """Folder for preview images and logs; the run's own are in `output_path/experiment_id`."""
    updates: int = setting(REQUIRED, at_least=1, elsewhere="max_train_steps")
    """Number of training steps (optimizer updates); a resumed run may change it if `lr_scheduler` allows."""
    seed: int = setting(0, at_most=2**63 - 1)
    """Seed of everything random: sample order, crops, noise, dropout, previews."""
    resume: str = setting("latest", path=True, resume="free", card=False, elsewhere="resume_from_checkpoint")
    """`latest` continues from the newest checkpoint, `latest_intact` from the newest undamaged; `never`; or a path."""
    resume_with_other_data: bool = setting(False, resume="free")
    """Resume a run although its data differ from those it began with; False refuses and says what differs."""
    save_every: int = setting(1000, at_least=1, resume="free", card=False, elsewhere="checkpointing_steps")
    """Steps between run checkpoints; each comes with an export of the model and a preview sheet."""
    backup_every: int | None = setting(None, at_least=1, resume="free", card=False)
    """Steps between checkpoints that rotation never deletes; absent: none."""
    checkpoints_total_limit: int | None = setting(2, at_least=1, resume="free", card=False)
    """Number of newest run checkpoints to keep; null keeps all."""
    tracker: Literal["none", "wandb", "tensorboard", "all"] | None = setting(
        None, resume="free", card=False, elsewhere="report_to"
    )
    """Where to log; absent: `wandb` if `wandb_project` is set, else `none`."""
    wandb_project: str | None = setting(None, resume="free", card=False)
    """Weights & Biases project."""
    wandb_entity: str | None = setting(None, resume="free", card=False)
    """Weights & Biases user or team."""
    log_every: int = setting(10, at_least=1, resume="free", card=False)
    """Steps between points in the log and refreshes of the progress bar's figures."""
    use_fsdp: bool = False
    """Whether the run is sharded; must agree with the accelerate config it is launched with."""
    push_to_hub: bool = setting(False, resume="free", card=False)
    """Upload the final export to the Hugging Face hub."""
    hub_model_id: str | None = setting(None, resume="free", card=False)
    """Hub repository of `push_to_hub`; absent: the `experiment_id`."""
    hub_private: bool = setting(False, resume="free", card=False)
    """Make the hub repository private when it is created."""
    check: bool = setting(False, resume="free", card=False)
    """Print the plan (what trains, geometry, files needed) and stop before any weight is read."""


@dataclass
class OptimizerSettings:
    """The optimizer: step size, batch, precision, moving average."""

    lr: float = setting(1e-4, at_least=0, elsewhere="learning_rate")
    """Learning rate after the warm-up."""
    batch_size: int = setting(REQUIRED, at_least=1, at_most=65_536, elsewhere="train_batch_size")
    """Images per step over all processes and accumulation steps together."""
    grad_accum_steps: int = setting(1, at_least=1, at_most=65_536, elsewhere="gradient_accumulation_steps")
    """Micro-batches whose gradients make one step; more of them need less memory."""
    warmup_updates: int = setting(1, at_least=0, elsewhere="lr_warmup_steps")
    """Steps over which the learning rate rises linearly; step k of n uses k/n of it."""
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt"] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_final_share: float = setting(0.0, at_least=0, at_most=1)
    """Share of `lr` at which `linear`, `cosine` and `polynomial` end."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """Optimizer; `adamw_8bit` keeps its averages in eight bits and needs bitsandbytes."""
    adam_betas: tuple[float, float] = setting((0.9, 0.999), check=rules.averaging_factors)
    """AdamW's averaging factors of the gradient and of its square."""
    adam_epsilon: float = setting(1e-8, at_least=0)
    """AdamW's term against division by zero."""
    weight_decay: float = setting(0.01, at_least=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = setting(1.0, above=0)
    """Largest gradient norm; a larger gradient is scaled down to it; null does not clip."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass, for less memory: all, or with `selective` those that are cheap."""
    float8: bool = False
    """Compute large linear layers in float8 (torchao), on CUDA devices of compute capability 8.9 and later."""
    compile: bool = False
    """Compile the blocks of the networks with torch.compile: a slower first step, faster ones after it."""
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", elsewhere="mixed_precision")
    """Number format of the frozen networks; what trains is float32 (accelerate's mixed precision is separate)."""
    ema_beta: float | None = setting(None, at_least=0, below=1)
    """Factor of the moving average of the weights; absent: no moving average."""
    ema_start_iters: int | None = setting(None, at_least=0)
    """First step that averages; before it the average is a copy of the weights. Default 0."""
    ema_iters: int | None = setting(None, at_least=1)
    """Steps between updates of the moving average. Default 1."""
    ema_offload: bool = setting(False, resume="free")
    """Keep the moving average in main memory: slower steps, no device memory for it."""
    offload: bool = setting(False, resume="free")
    """Keep the networks that only serve in main memory and bring each to the device only while it works."""


@dataclass
class ModelSettings:
    """The networks and where their weights come from."""

    pretrained_model_name_or_path: str | None = setting(None, path=True)
    """Folder or hub name of a whole cascade in diffusers layout, or `embedded` for the one in the package."""
    generator_checkpoint_path: str | None = setting(None, path=True)
    """File or folder of the network that trains or that the adapters are put on; `scratch`: newly initialised."""
    effnet_checkpoint_path: str | None = setting(None, path=True)
    """File or folder of the semantic encoder (EfficientNet)."""
    previewer_checkpoint_path: str | None = setting(None, path=True)
    """File or folder of the previewer."""
    stage_a_checkpoint_path: str | None = setting(None, path=True)
    """File or folder of Stage A."""
    clip_text_model_name: str | None = setting(None, path=True)
    """Folder or hub name of the CLIP text encoder and tokenizer; absent: the cascade's, or CLIP-ViT-bigG-14."""
    clip_image_model_name: str | None = setting(None, path=True)
    """Folder or hub name of the CLIP image encoder; absent: the cascade's, or CLIP ViT-L/14."""


@dataclass
class PriorSettings(ModelSettings):
    """Stage C: which prior."""

    model_version: Literal["3.6B", "1B", "embedded"] | None = None
    """Size of the prior; absent: that of `pretrained_model_name_or_path`."""
    stage_b_checkpoint_path: str | None = setting(None, path=True, resume="free")
    """File or folder of Stage B, or `pretrained`: previews show whole images; absent: the previewer's rough ones."""


@dataclass
class DecoderModelSettings(ModelSettings):
    """Stage B: which decoder."""

    model_version: Literal["3B", "700M", "embedded"] | None = None
    """Size of the decoder; absent: that of `pretrained_model_name_or_path`."""


@dataclass
class DataSettings:
    """The images and captions."""

    webdataset_path: Any = setting(
        None, path=True, check=rules.image_sets, resume="same data", values="text | list of text or of sets"
    )
    """Shards: paths, folders, `s3://` and `http(s)://` addresses, brace lists; a list may hold sets (data.md)."""
    dataset_name: Any = setting(
        None, path=True, check=rules.image_sets, elsewhere="train_data_dir", values="text | list of text or of sets"
    )
    """Hugging Face dataset, or a local folder that `datasets` reads, instead of shards; or a list of such sets."""
    image_column: str = "image"
    """Column of `dataset_name` with the images."""
    caption_column: str = "text"
    """Column of `dataset_name` with the captions."""
    streaming: Any = setting("auto", check=rules.streaming, resume="same data", values="auto | True | False")
    """Read images while training instead of looking at all of them first; auto: where shards are many (data.md)."""
    stream_lanes: int = setting(64, at_least=1, at_most=65_536)
    """Shards that a stream reads at a time, over all processes, whose number must divide it."""
    shuffle_buffer: int = setting(1024, at_least=1, at_most=10_000_000)
    """Images that a stream holds to draw the next one from, over all processes."""
    captions_getter: list[str] | None = setting(None, check=rules.caption_getter)
    """Field of a sample that holds the caption and what to do with it: `['txt', 'identity']` or a safe lambda."""
    dataset_filters: list[list[str]] | None = setting(None, check=rules.sample_filters)
    """Samples to keep: a list of `[json key, 'lambda x: condition']`, all of which must hold."""
    image_size: int = setting(REQUIRED, at_least=8, at_most=16_384, elsewhere="resolution")
    """Side of the square training image in pixels; with `multi_aspect_ratio` its square is the area."""
    multi_aspect_ratio: list[str] | None = setting(None, check=rules.aspect_ratios)
    """Aspect ratios of the training images as `'3/4'`; each counts for its inverse too."""
    bucketeer_random_ratio: float = setting(0.05, at_least=0, at_most=1)
    """Share of batches whose aspect ratio is drawn without regard to the image."""
    crop: Literal["center", "random", "smart"] | None = None
    """How an image is cut to size; absent: `random` with `multi_aspect_ratio`, else `smart`."""
    num_workers: int = setting(
        0, at_least=0, at_most=512, resume="free", card=False, elsewhere="dataloader_num_workers"
    )
    """Processes that decode images beside each training process; the samples do not depend on it."""
    max_broken_share: float = setting(0.1, at_least=0, at_most=1, resume="free")
    """Share of unreadable samples above which training stops with an error."""
    allow_missing_captions: bool = False
    """Give an image without a caption the empty one, instead of stopping."""
    crops_per_image: int | None = setting(None, at_least=1, at_most=65_536)
    """Number of different crops of an image in one bucket; absent: a fresh one each time it is shown."""
    cache_dir: str | None = setting(None, path=True, resume="free", card=False)
    """Folder that keeps the index of the shards between runs; absent: none is kept."""


@dataclass
class PriorDataSettings(DataSettings):
    """The images and captions of Stage C's trainings: parts of them that count less, latents computed once."""

    masked_loss: bool = False
    """Weigh the loss by each sample's mask: the member `KEY.mask.png`, or `mask_column`; white counts fully."""
    mask_column: str = "mask"
    """Column of `dataset_name` with the masks."""
    unmasked_weight: float = setting(0.1, at_least=0, at_most=1)
    """Weight of what a mask leaves black."""
    cache: bool = False
    """Compute latents and text embeddings once and train from files; crops then default to one per image."""


@dataclass
class ObjectiveSettings:
    """What a step computes."""

    edm_objective: bool = False
    """Train with the v target (`prediction_type: v_prediction`)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow"] | None = None
    """What the network predicts; absent: `v_prediction` with `edm_objective`, else `epsilon`."""
    adaptive_loss_weight: bool = False
    """Weight noise levels by the inverse of the loss seen there, instead of by `loss_weight`."""
    loss_weight: (
        Literal["p2", "min_snr", "debiased", "sech", "sigmoid", "truncated_snr", "constant", "adaptive"] | None
    ) = None
    """Weight of noise levels; absent: `adaptive` with `adaptive_loss_weight`, else `p2`."""
    min_snr_gamma: float = setting(5.0, at_least=0, elsewhere="snr_gamma")
    """Signal-to-noise ratio at which `loss_weight: min_snr` is cut."""
    shift: float = setting(1.0, above=0)
    """Shift of the training noise towards more noise, for large images: logSNR - 2 ln shift."""
    caption_dropout: float = setting(0.05, at_least=0, at_most=1)
    """Share of samples trained with an empty caption, which guidance needs."""


@dataclass
class PriorObjectiveSettings(ObjectiveSettings):
    """What a step of Stage C computes."""

    offset_noise: float = setting(0.0, at_least=0, elsewhere="noise_offset")
    """Strength of noise that is constant over a channel, for very dark and very bright images."""
    image_embedding_share: float = setting(0.1, at_least=0, at_most=1)
    """Share of samples that are shown their own CLIP image embedding; the others get zeros."""


@dataclass
class DecoderObjectiveSettings(ObjectiveSettings):
    """What a step of Stage B computes."""

    effnet_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Share of samples trained without semantic latents, which guidance needs."""
    effnet_min_scale: float = setting(0.5, above=0, at_most=1)
    """Smallest size, relative to the image, at which the semantic encoder sees it; drawn per step."""
    effnet_interpolation: Literal["nearest", "bilinear"] = "nearest"
    """How that image is shrunk: `nearest` as published, `bilinear` (antialiased) as at inference."""
    effnet_noise: float = 0.0
    """Largest strength of noise on the semantic latents, drawn per sample; teaches Stage B to forgive Stage C."""
    pyramid_noise: bool = True
    """Add noise at coarser scales to the Gaussian noise."""


@dataclass
class PreviewSettings:
    """The preview sheets."""

    validation_prompts: list[str] | None = setting(None, resume="free", elsewhere="validation_prompt")
    """Prompts of the preview sheet; absent: captions of the training data."""
    num_preview_images: int = setting(4, at_least=0, at_most=64, resume="free")
    """Images on the preview sheet."""
    preview_steps: int = setting(20, at_least=1, at_most=10_000, resume="free")
    """Sampling steps of Stage C in previews."""
    preview_decoder_steps: int = setting(10, at_least=1, at_most=10_000, resume="free")
    """Sampling steps of Stage B in previews."""
    preview_guidance_scale: float = setting(4.0, resume="free")
    """Guidance scale of Stage C in previews."""


@dataclass
class LoraSettings:
    """The adapters and the tokens that are learned with them."""

    module_filters: list[str] | None = setting(None, check=rules.layer_filters, elsewhere="lora_layers")
    """Parts of the names of the layers that get an adapter; absent: `['.attn']`."""
    rank: int = setting(4, at_least=1, at_most=rules.LARGEST_RANK, elsewhere="lora_rank")
    """Rank of the adapters."""
    lora_alpha: float | None = setting(None, above=0)
    """Numerator of the adapters' scale `lora_alpha / rank`; absent: equal to `rank`."""
    lora_dropout: float = setting(0.0, at_least=0, below=1)
    """Dropout in front of the adapters."""
    use_dora: bool = False
    """Learn magnitude and direction separately (DoRA)."""
    module_excludes: list[str] | None = None
    """Parts of the names of layers that get no adapter although `module_filters` names them."""
    rank_pattern: dict[str, int] | None = setting(None, check=rules.ranks)
    """Rank of the layers whose name contains a part, as `{'up_blocks': 16}`; the others have `rank`."""
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """Number format of the frozen prior's linear layers; nf4 needs bitsandbytes."""
    train_text_encoder: bool = False
    """Put adapters on the text encoder as well."""
    text_encoder_module_filters: list[str] | None = None
    """Layers of the text encoder that get an adapter; absent: `['q_proj', 'k_proj', 'v_proj', 'out_proj']`."""
    text_encoder_rank: int | None = setting(None, at_least=1, at_most=rules.LARGEST_RANK)
    """Rank of the text encoder's adapters; absent: `rank`."""
    text_encoder_lr: float | None = setting(None, at_least=0)
    """Learning rate of the text encoder's adapters; absent: `lr`."""
    train_tokens: list[list[str | None]] | None = setting(None, check=rules.tokens)
    """Tokens: `['[new]', '^dog</w>']` adds one, first the mean of the matches; `['^dog', null]` trains existing."""
    token_lr: float | None = setting(None, at_least=0)
    """Learning rate of the tokens; absent: `lr`."""
    lora_checkpoint_path: str | None = setting(None, path=True)
    """LoRA file to start from; absent: a new one."""
    regularization_path: str | list[str] | None = setting(None, path=True, resume="same data")
    """Shards with images of the whole class (prior preservation), so that the subject does not take it over."""
    regularization_share: float = setting(0.5, at_least=0, at_most=1)
    """Share of the images shown that are regularisation images."""
    prior_loss_weight: float = setting(1.0, at_least=0)
    """Weight of the loss on regularisation images."""


@dataclass
class ControlNetSettings:
    """The ControlNet and its control images."""

    controlnet_blocks: list[int] = setting(REQUIRED, check=rules.block_numbers)
    """Residual blocks of Stage C that get the control signal, counted from 0 over down and up blocks."""
    controlnet_filter: str = REQUIRED
    """Class that makes the control image: `CannyFilter`, `InpaintFilter`, `SREffnetFilter`, … or your own."""
    controlnet_filter_params: dict[str, Any] | None = None
    """Arguments of that class."""
    controlnet_bottleneck_mode: Literal["effnet", "simple", "large"] = "effnet"
    """Backbone of the ControlNet."""
    controlnet_checkpoint_path: str | None = setting(None, path=True)
    """ControlNet file to start from; absent: a new one."""


@dataclass
class TrainingSettings(OptimizerSettings, RunSettings):
    """What the loop itself reads."""


@dataclass
class TextToImageConfig(PreviewSettings, PriorObjectiveSettings, PriorDataSettings, PriorSettings, TrainingSettings):
    """Training or finetuning Stage C."""


@dataclass
class LoraConfig(
    LoraSettings, PreviewSettings, PriorObjectiveSettings, PriorDataSettings, PriorSettings, TrainingSettings
):
    """LoRA and token training on Stage C."""


@dataclass
class ControlNetConfig(
    ControlNetSettings, PreviewSettings, PriorObjectiveSettings, PriorDataSettings, PriorSettings, TrainingSettings
):
    """ControlNet training on Stage C."""


@dataclass
class DecoderConfig(PreviewSettings, DecoderObjectiveSettings, DataSettings, DecoderModelSettings, TrainingSettings):
    """Training or finetuning Stage B, image reconstruction."""


@dataclass
class VQGANConfig(DataSettings, TrainingSettings):
    """Training Stage A."""

    model_version: Literal["released", "embedded"] = "released"
    """Size of Stage A."""
    stage_a_checkpoint_path: str = setting("scratch", path=True)
    """Single file or folder of Stage A to start from, or `scratch`: newly initialised."""
    quantize_share: float = setting(0.5, at_least=0, at_most=1)
    """Share of samples that the decoder sees as codes, the others as they are; 0 leaves the quantiser untrained."""
    codebook_weight: float = setting(1.0, at_least=0)
    """Weight of the loss that pulls codes to latents."""
    commitment_weight: float = setting(0.25, at_least=0)
    """Weight of the loss that pulls latents to codes."""
    revive_every: int | None = setting(100, at_least=1)
    """Steps between replacements of codes that no image used in them; null never replaces."""
    adversarial_weight: float = setting(0.1, at_least=0)
    """Weight of the discriminator's judgement in the loss of Stage A; 0 trains without a discriminator."""
    adversarial_start: int = setting(0, at_least=0)
    """First step in which the discriminator trains and judges, counted from 0."""
    discriminator_lr: float | None = setting(None, at_least=0)
    """Learning rate of the discriminator; absent: `lr`."""
    discriminator_channels: int = setting(64, at_least=1, at_most=4096)
    """Width of the discriminator's first layer."""
    num_preview_images: int = setting(4, at_least=0, at_most=64, resume="free")
    """Images on the preview sheet."""


@dataclass
class SemanticEncoderConfig(DataSettings, TrainingSettings):
    """Training the semantic encoder together with the previewer."""

    model_version: Literal["released", "embedded"] = "released"
    """Size of the semantic encoder and the previewer."""
    effnet_checkpoint_path: str = setting("scratch", path=True)
    """Single file or folder of the semantic encoder to start from, or `scratch`: newly initialised."""
    previewer_checkpoint_path: str = setting("scratch", path=True)
    """Single file or folder of the previewer to start from, or `scratch`: newly initialised."""
    latent_noise: float = setting(0.15, at_least=0)
    """Standard deviation of the noise between encoder and previewer, so that nearby latents mean nearby images."""


@dataclass
class CLIPConfig(DataSettings, TrainingSettings):
    """Training a CLIP text and image encoder from scratch."""

    clip_text_model_name: str = setting(REQUIRED, path=True)
    """Folder that holds the `tokenizer` whose vocabulary the text encoder gets."""


TRAINERS: tuple[type, ...] = (
    LoraConfig, TextToImageConfig, ControlNetConfig, DecoderConfig, VQGANConfig, SemanticEncoderConfig, CLIPConfig,
)  # fmt: skip
"""The trainers' configs."""
