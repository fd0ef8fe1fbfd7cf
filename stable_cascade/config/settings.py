"""Every setting of every trainer: flat keys as the training guide writes them, checked before any weight is read.

A trainer's config is a dataclass composed of the small ones below. The line under a field is its documentation:
`--help` and the reference page are generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

REQUIRED: Any = "???"
"""The default of a key that every config must set (OmegaConf's mark of a missing value)."""


PATH_KEYS = frozenset({
    "checkpoint_path", "output_path", "resume", "pretrained_model_name_or_path", "generator_checkpoint_path",
    "effnet_checkpoint_path", "previewer_checkpoint_path", "stage_a_checkpoint_path", "stage_b_checkpoint_path",
    "clip_text_model_name", "clip_image_model_name", "webdataset_path", "dataset_name", "cache_dir",
    "lora_checkpoint_path", "regularization_path", "controlnet_checkpoint_path",
})  # fmt: skip
"""Keys that may name a file or folder: a leading `~` in them is the home folder."""


@dataclass
class RunSettings:
    """The run: names, folders, length, saving, logging."""

    experiment_id: str = REQUIRED
    """Name of the run; its folders under `checkpoint_path` and `output_path` carry it."""
    checkpoint_path: str = REQUIRED
    """Folder for run checkpoints and trained weights; the run's own are in `checkpoint_path/experiment_id`."""
    output_path: str = REQUIRED
    """Folder for preview pictures and logs; the run's own are in `output_path/experiment_id`."""
    updates: int = REQUIRED
    """Number of training steps (optimizer updates)."""
    seed: int = 0
    """Seed of everything random: sample order, crops, noise, dropout, previews."""
    resume: str = "latest"
    """`latest` continues from the newest checkpoint, `latest_intact` from the newest undamaged; `never`; or a path."""
    resume_with_other_data: bool = False
    """Whether a run may go on with other data than it began with; False refuses them and tells what differs."""
    save_every: int = 1000
    """Steps between run checkpoints; each comes with an export of the model and a preview sheet."""
    backup_every: int | None = None
    """Steps between checkpoints that rotation never deletes; absent: none."""
    checkpoints_total_limit: int | None = 2
    """Number of newest run checkpoints to keep; null keeps all."""
    tracker: Literal["none", "wandb", "tensorboard", "all"] | None = None
    """Where to log; absent: `wandb` if `wandb_project` is set, else `none`."""
    wandb_project: str | None = None
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases user or team."""
    log_every: int = 10
    """Steps between points in the log and refreshes of the progress bar's figures."""
    use_fsdp: bool = False
    """Whether the run is sharded; must agree with the accelerate config it is launched with."""
    push_to_hub: bool = False
    """Upload the final export to the Hugging Face hub."""
    hub_model_id: str | None = None
    """Hub repository of `push_to_hub`; absent: the `experiment_id`."""
    hub_private: bool = False
    """Make the hub repository private when it is created."""
    check: bool = False
    """Print the plan (what trains, geometry, files needed) and stop before any weight is read."""


@dataclass
class OptimizerSettings:
    """The optimizer: step size, batch, precision, moving average."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    batch_size: int = REQUIRED
    """Pictures per step over all processes and accumulation steps together."""
    grad_accum_steps: int = 1
    """Micro-batches whose gradients make one step; more of them need less memory."""
    warmup_updates: int = 1
    """Steps over which the learning rate rises linearly; step k of n uses k/n of it."""
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt"] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_final_share: float = 0.0
    """Share of `lr` at which `linear`, `cosine` and `polynomial` end."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """Optimizer; `adamw_8bit` keeps its averages in eight bits and needs bitsandbytes."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors of the gradient and of its square."""
    adam_epsilon: float = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Largest gradient norm; a larger gradient is scaled down to it; null does not clip."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass, for less memory: all, or with `selective` those that are cheap."""
    float8: bool = False
    """Compute large linear layers in float8 (torchao), on CUDA devices of compute capability 8.9 and later."""
    compile: bool = False
    """Compile the blocks of the networks with torch.compile: a slower first step, faster ones after it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen networks; what trains is float32 (accelerate's mixed precision is separate)."""
    ema_beta: float | None = None
    """Factor of the moving average of the weights; absent: no moving average."""
    ema_start_iters: int | None = None
    """First step that averages; before it the average is a copy of the weights. Default 0."""
    ema_iters: int | None = None
    """Steps between updates of the moving average. Default 1."""
    ema_offload: bool = False
    """Keep the moving average in main memory: slower steps, no device memory for it."""
    offload: bool = False
    """Keep the networks that only serve in main memory and bring each to the device only while it works."""


@dataclass
class ModelSettings:
    """The networks and where their weights come from."""

    pretrained_model_name_or_path: str | None = None
    """Folder or hub name of a whole cascade in diffusers layout, or `embedded` for the one in the package."""
    generator_checkpoint_path: str | None = None
    """File or folder of the network that trains or that the adapters are put on; `scratch`: newly initialised."""
    effnet_checkpoint_path: str | None = None
    """File or folder of the image encoder."""
    previewer_checkpoint_path: str | None = None
    """File or folder of the previewer."""
    stage_a_checkpoint_path: str | None = None
    """File or folder of Stage A."""
    clip_text_model_name: str | None = None
    """Folder or hub name of the CLIP text encoder and tokenizer; absent: the cascade's, or CLIP-ViT-bigG-14."""
    clip_image_model_name: str | None = None
    """Folder or hub name of the CLIP image encoder; absent: the cascade's, or CLIP ViT-L/14."""


@dataclass
class PriorSettings(ModelSettings):
    """Stage C: which prior."""

    model_version: Literal["3.6B", "1B", "embedded"] | None = None
    """Size of the prior; absent: that of `pretrained_model_name_or_path`."""
    stage_b_checkpoint_path: str | None = None
    """File or folder of Stage B, or `pretrained`: previews show whole pictures; absent: the previewer's rough ones."""


@dataclass
class DecoderModelSettings(ModelSettings):
    """Stage B: which decoder."""

    model_version: Literal["3B", "700M", "embedded"] | None = None
    """Size of the decoder; absent: that of `pretrained_model_name_or_path`."""


@dataclass
class DataSettings:
    """The pictures and captions."""

    webdataset_path: str | list[str] | None = None
    """Shards: local paths, folders, `file:`, `s3://` and `http(s)://` addresses, brace lists; one or a list."""
    dataset_name: str | None = None
    """Hugging Face dataset, or a local folder that `datasets` reads, instead of shards."""
    image_column: str = "image"
    """Column of `dataset_name` with the pictures."""
    caption_column: str = "text"
    """Column of `dataset_name` with the captions."""
    streaming: bool = False
    """Read `dataset_name` as a stream, without downloading it first."""
    captions_getter: list[str] | None = None
    """Field of a sample that holds the caption and what to do with it: `['txt', 'identity']` or a safe lambda."""
    dataset_filters: list[list[str]] | None = None
    """Samples to keep: a list of `[json key, 'lambda x: condition']`, all of which must hold."""
    image_size: int = REQUIRED
    """Side of the square training picture in pixels; with `multi_aspect_ratio` its square is the area."""
    multi_aspect_ratio: list[str] | None = None
    """Aspect ratios of the training pictures as `'3/4'`; a ratio also stands for its inverse."""
    bucketeer_random_ratio: float = 0.05
    """Share of batches whose aspect ratio is drawn without regard to the picture."""
    crop: Literal["center", "random", "smart"] | None = None
    """How a picture is cut to size; absent: `random` with `multi_aspect_ratio`, else `smart`."""
    num_workers: int = 0
    """Processes that decode pictures beside each training process; the samples do not depend on it."""
    max_broken_share: float = 0.1
    """Share of unreadable samples above which training stops with an error."""
    allow_missing_captions: bool = False
    """Give a picture without a caption the empty one, instead of stopping."""
    crops_per_image: int | None = None
    """Number of different crops of a picture in one bucket; absent: a fresh one each time it is shown."""
    cache_dir: str | None = None
    """Folder that keeps the index of the shards between runs; absent: none is kept."""


@dataclass
class PriorDataSettings(DataSettings):
    """The pictures and captions of Stage C's trainings: parts of them that count less, latents computed once."""

    masked_loss: bool = False
    """Weigh the loss by each sample's mask: the member `KEY.mask.png`, or `mask_column`; white counts fully."""
    mask_column: str = "mask"
    """Column of `dataset_name` with the masks."""
    unmasked_weight: float = 0.1
    """Weight of what a mask leaves black."""
    cache: bool = False
    """Compute latents and text embeddings once and train from files; crops then default to one per picture."""


@dataclass
class ObjectiveSettings:
    """What a step computes."""

    edm_objective: bool = False
    """Train with the v target (`prediction_type: v_prediction`)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow"] | None = None
    """What the network predicts; absent: `v_prediction` with `edm_objective`, else `epsilon`."""
    adaptive_loss_weight: bool = False
    """Weight noise levels by the inverse of the loss seen there, instead of by `loss_weight`."""
    loss_weight: Literal["p2", "min_snr", "constant", "adaptive"] | None = None
    """Weight of noise levels; absent: `adaptive` with `adaptive_loss_weight`, else `p2`."""
    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio at which `loss_weight: min_snr` is cut."""
    shift: float = 1.0
    """Shift of the training noise towards more noise, for large pictures: logSNR - 2 ln shift."""
    caption_dropout: float = 0.05
    """Share of samples trained with an empty caption, which guidance needs."""


@dataclass
class PriorObjectiveSettings(ObjectiveSettings):
    """What a step of Stage C computes."""

    offset_noise: float = 0.0
    """Strength of noise that is constant over a channel, for very dark and very bright pictures."""
    image_embedding_share: float = 0.1
    """Share of samples that are shown their own CLIP image embedding; the others get zeros."""


@dataclass
class DecoderObjectiveSettings(ObjectiveSettings):
    """What a step of Stage B computes."""

    effnet_dropout: float = 0.1
    """Share of samples trained without semantic latents, which guidance needs."""
    effnet_min_scale: float = 0.5
    """Smallest size, relative to the picture, at which the image encoder sees it; drawn per step."""
    effnet_interpolation: Literal["nearest", "bilinear"] = "nearest"
    """How that picture is shrunk: `nearest` as published, `bilinear` (antialiased) as at inference."""
    effnet_noise: float = 0.0
    """Largest strength of noise on the semantic latents, drawn per sample; teaches Stage B to forgive Stage C."""
    pyramid_noise: bool = True
    """Add noise at coarser scales to the Gaussian noise."""


@dataclass
class PreviewSettings:
    """The preview sheets."""

    validation_prompts: list[str] | None = None
    """Prompts of the preview sheet; absent: captions of the training data."""
    num_preview_images: int = 4
    """Pictures on the preview sheet."""
    preview_steps: int = 20
    """Sampling steps of Stage C in previews."""
    preview_decoder_steps: int = 10
    """Sampling steps of Stage B in previews."""
    preview_guidance_scale: float = 4.0
    """Guidance scale of Stage C in previews."""


@dataclass
class LoraSettings:
    """The adapters and the tokens that are learned with them."""

    module_filters: list[str] | None = None
    """Parts of the names of the layers that get an adapter; absent: `['.attn']`."""
    rank: int = 4
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """Numerator of the adapters' scale `lora_alpha / rank`; absent: equal to `rank`."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""
    use_dora: bool = False
    """Learn magnitude and direction separately (DoRA)."""
    module_excludes: list[str] | None = None
    """Parts of the names of layers that get no adapter although `module_filters` names them."""
    rank_pattern: dict[str, int] | None = None
    """Rank of the layers whose name contains a part, as `{'up_blocks': 16}`; the others have `rank`."""
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """Number format of the frozen prior's linear layers; nf4 needs bitsandbytes."""
    train_text_encoder: bool = False
    """Put adapters on the text encoder as well."""
    text_encoder_module_filters: list[str] | None = None
    """Layers of the text encoder that get an adapter; absent: `['q_proj', 'k_proj', 'v_proj', 'out_proj']`."""
    text_encoder_rank: int | None = None
    """Rank of the text encoder's adapters; absent: `rank`."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoder's adapters; absent: `lr`."""
    train_tokens: list[list[str | None]] | None = None
    """Tokens: `['[new]', '^dog</w>']` adds one, first the mean of the matches; `['^dog', null]` trains existing."""
    token_lr: float | None = None
    """Learning rate of the tokens; absent: `lr`."""
    lora_checkpoint_path: str | None = None
    """LoRA file to start from; absent: a new one."""
    regularization_path: str | list[str] | None = None
    """Shards with pictures of the whole class (prior preservation), so that the subject does not take it over."""
    regularization_share: float = 0.5
    """Share of the pictures shown that are regularisation pictures."""
    prior_loss_weight: float = 1.0
    """Weight of the loss on regularisation pictures."""


@dataclass
class ControlNetSettings:
    """The ControlNet and its control pictures."""

    controlnet_blocks: list[int] = REQUIRED
    """Residual blocks of Stage C that get the control signal, counted from 0 over down and up blocks."""
    controlnet_filter: str = REQUIRED
    """Class that makes the control picture: `CannyFilter`, `InpaintFilter`, `SREffnetFilter`, … or your own."""
    controlnet_filter_params: dict[str, Any] | None = None
    """Arguments of that class."""
    controlnet_bottleneck_mode: Literal["effnet", "simple", "large"] = "effnet"
    """Backbone of the ControlNet."""
    controlnet_checkpoint_path: str | None = None
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
    stage_a_checkpoint_path: str = "scratch"
    """Single file or folder of Stage A to start from, or `scratch`: newly initialised."""
    quantize_share: float = 0.5
    """Share of samples that the decoder sees as codes, the others as they are; 0 leaves the quantiser untrained."""
    codebook_weight: float = 1.0
    """Weight of the loss that pulls codes to latents."""
    commitment_weight: float = 0.25
    """Weight of the loss that pulls latents to codes."""
    revive_every: int | None = 100
    """Steps between replacements of codes that no picture used in them; null never replaces."""
    adversarial_weight: float = 0.1
    """Weight of the discriminator's judgement in the loss of Stage A; 0 trains without a discriminator."""
    adversarial_start: int = 0
    """First step in which the discriminator trains and judges, counted from 0."""
    discriminator_lr: float | None = None
    """Learning rate of the discriminator; absent: `lr`."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    num_preview_images: int = 4
    """Pictures on the preview sheet."""


@dataclass
class ImageEncoderConfig(DataSettings, TrainingSettings):
    """Training the image encoder together with the previewer."""

    model_version: Literal["released", "embedded"] = "released"
    """Size of the image encoder and the previewer."""
    effnet_checkpoint_path: str = "scratch"
    """Single file or folder of the image encoder to start from, or `scratch`: newly initialised."""
    previewer_checkpoint_path: str = "scratch"
    """Single file or folder of the previewer to start from, or `scratch`: newly initialised."""
    latent_noise: float = 0.15
    """Standard deviation of the noise between encoder and previewer, so that nearby latents mean nearby pictures."""


@dataclass
class CLIPConfig(DataSettings, TrainingSettings):
    """Training a CLIP text and image encoder from scratch."""

    clip_text_model_name: str = REQUIRED
    """Folder that holds the `tokenizer` whose vocabulary the text encoder gets."""


@dataclass
class GenerateConfig(ModelSettings):
    """Generating pictures, with the keys of the guide's inference configs."""

    model_version: Literal["3.6B", "1B", "3B", "700M", "embedded"] | None = None
    """Size of the network that `generator_checkpoint_path` holds."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the networks."""
    lora_checkpoint_path: str | None = None
    """LoRA file to put on the prior."""
    module_filters: list[str] | None = None
    """Layers that the LoRA file adapts; needed only for files that do not name them."""
    rank: int | None = None
    """Rank of the LoRA file; needed only to check it."""
    train_tokens: list[list[str | None]] | None = None
    """Tokens that the LoRA file brings."""
    controlnet_checkpoint_path: str | None = None
    """ControlNet file."""
    controlnet_blocks: list[int] | None = None
    """Residual blocks of Stage C that the ControlNet acts on."""
    controlnet_filter: str | None = None
    """Class that makes the control picture."""
    controlnet_filter_params: dict[str, Any] | None = None
    """Arguments of that class."""
    controlnet_bottleneck_mode: Literal["effnet", "simple", "large"] = "effnet"
    """Backbone of the ControlNet."""
    webdataset_path: str | list[str] | None = None
    """Shards with the pictures to reconstruct or to control by."""
    image_size: int | None = None
    """Side of the pictures in pixels; absent: the model's own."""
    batch_size: int = 4
    """Pictures per batch."""
    grad_accum_steps: int = 1
    """Accepted because the guide's Stage B config carries it; generation takes no steps."""
    check: bool = False
    """Print the plan and stop before any weight is read."""


TRAINERS: tuple[type, ...] = (
    LoraConfig, TextToImageConfig, ControlNetConfig, DecoderConfig, VQGANConfig, ImageEncoderConfig, CLIPConfig,
)  # fmt: skip
"""The trainers' configs."""
