"""The sections of the configuration: every option, its type and its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["bfloat16", "float16", "float32"]
# Beside the levels: one image alone, or the tokens of both, one after the other.
Fusion = Literal["levels", "original", "reconstruction", "tokens"]


@dataclass(frozen=True)
class SigLIPConfig:
    """The understanding encoder (SigLIP vision tower)."""

    patch_size: int = 14  # pixels per patch side
    embed_dim: int = 1152  # width
    num_layers: int = 27  # transformer blocks
    num_heads: int = 16  # attention heads
    mlp_dim: int = 4304  # hidden width of the MLPs
    layer_norm_eps: float = 1e-6  # epsilon of the layer norms
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = (
        "gelu_pytorch_tanh"  # of the MLPs (gelu: exact)
    )


@dataclass(frozen=True)
class VQConfig:
    """The generation encoder: a VQGAN-family tokenizer."""

    stem: int = 1  # space-to-depth factor before the first convolution
    base_channels: int = 128  # channels of the first level
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # one level each, halved in between
    num_res_blocks: int = 2  # residual blocks per level
    attention: Literal["lowest", "middle"] = "middle"  # lowest level too (Janus) or middle only
    z_channels: int = 256  # channels between encoder and quantizer
    codebook_size: int = 8192  # number of codes
    codebook_dim: int = 256  # length of a code vector
    normalize_codes: bool = False  # compare codes l2-normalised (Janus) or as they are (Chameleon)
    has_decoder: bool = True  # False: it encodes images only (ChameleonVQVAE)


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder (InternLM2)."""

    vocab_size: int = 92544  # tokens, special ones included
    embed_dim: int = 2048  # width
    num_layers: int = 4  # transformer blocks
    num_heads: int = 16  # query heads
    num_kv_heads: int = 8  # key and value heads
    mlp_dim: int = 8192  # hidden width of the SwiGLU
    rope_theta: float = 1e6  # base of the rotary angles
    rope_factor: float = 1.0  # positions are divided by it (linear scaling to longer sequences)
    max_positions: int | None = None  # longest sequence that the weights can read (None: any)
    rms_norm_eps: float = 1e-5  # epsilon of the norms
    dropout: float = 0.0  # after attention and MLP, in training
    tie_head: bool = False  # the LM head is the embedding table
    attention_bias: bool = False  # biases of queries, keys and values (Qwen2)


@dataclass(frozen=True)
class Level1Config:
    """Level 1: adaptive weighted fusion of the two images."""

    alpha: Literal["map", "predicted"] = "predicted"  # one map, or that plus what a head sees
    init_alpha: float = 0.5  # weight of the original at the start
    learnable: bool = True  # False: alpha is init_alpha everywhere, without parameters
    num_scales: int = 1  # more than 1: fused at halved sizes too, and summed
    head_channels: int = 16  # channels of the predicting convolutions


@dataclass(frozen=True)
class Level2Config:
    """Level 2: spatial attention over aligned features."""

    num_heads: int = 8  # attention heads
    dropout: float = 0.1  # on the attention weights, in training
    alignment: Literal["features", "pixels", "none"] = "pixels"  # where the box affine acts
    values: Literal["fused", "reconstruction"] = "reconstruction"  # whose features are attended to
    append_reconstruction: bool = True  # its aligned features stand behind F_spatial's
    mask_keys: bool = True  # hide keys outside the image or the object mask
    intensity_threshold: float = 0.01  # mean RGB in [0, 1] above which a pixel is foreground


@dataclass(frozen=True)
class Level3Config:
    """Level 3: the two branches into the decoder."""

    generation: bool = True  # False: no VQ branch at all (single encoder)
    adapter_mlp_dim: int | None = None  # hidden width of the adapters (None: 4 x decoder width)
    adapter_dropout: float = 0.1  # inside the adapters, in training
    adapter_norm: bool = True  # layer norm at the adapters' end


@dataclass(frozen=True)
class LossConfig:
    """The two losses. A weight of 0 drops that head, its targets and its loss."""

    text_weight: float = 0.7  # of the text cross-entropy
    code_weight: float = 0.3  # of the code cross-entropy
    label_smoothing: float = 0.0  # of both
    occluded_cell_weight: float = 1.0  # of cells that something covers, in the code loss
    text_chunk: int = 128  # text positions whose logits exist at one time


@dataclass(frozen=True)
class FreezeConfig:
    """Parts whose weights stay as they are."""

    siglip: bool = True  # the SigLIP encoder
    vq: bool = True  # the VQ tokenizer (its decoder half never trains here)
    decoder: bool = False  # InternLM2 and its LM head
    adapters: bool = False  # both MLP adapters and the generation head
    level1: bool = False  # alpha
    level2: bool = False  # the spatial attention


@dataclass(frozen=True)
class PretrainedConfig:
    """Where weights come from; None starts a component at random.

    Each is a weight folder (config.json and weights.safetensors), or a PyTorch checkpoint, a hub
    id, or "tiny" for the small one of this package: converted once, into `data.cache_dir`.
    """

    siglip: str | None = None  # SigLIP
    vq: str | None = None  # VQ tokenizer
    decoder: str | None = None  # InternLM2, with its tokenizer
    htfa: str | None = None  # levels, adapters and generation head of the PyTorch original
    run: str | None = None  # a run: all weights of its best or latest checkpoint
    # What becomes of components without pretrained weights.
    random_components: Literal["train", "as_configured"] = "train"


@dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they become arrays."""

    train: str = "held_objects"  # file, shards, URL or tfds:NAME (README), or the embedded dataset
    sources: tuple[tuple[str, float], ...] = ()  # (source, weight): a mixture instead of train
    validation: str | None = None  # same, for evaluation during training; or "from_train"
    test: str | None = None  # same, for the evaluation at the end ("from_train": a tenth of train)
    image_root: str | None = None  # folder or URL that holds all images (None: the file's own)
    recon_template: str | None = None  # path of a missing image_recon, as in "recon/{id}.png"
    tokenizer: str | None = None  # Hugging Face folder (None: the decoder's, or a trained one)
    tokenizer_vocab_size: int = 512  # of a tokenizer that is trained on the data's text
    resize: Literal["letterbox", "squash"] = "letterbox"  # how images become square
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, of RGB in [0, 1]
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel
    use_object_mask: bool = True  # give the model the records' object masks
    drop_recon: float = 0.0  # probability that a training sample loses its reconstruction
    default_query: str = "What's the object in the hand?"  # where a user asks nothing
    max_text_length: int = 2048  # tokens of a conversation; the answers that are whole within it
    text_buckets: tuple[int, ...] = (128, 512, 2048)  # lengths that text is padded to
    on_error: Literal["raise", "skip"] = "raise"  # bad records stop the run, or are skipped
    max_bad_records: int = 100  # skipped records after which the run stops
    num_workers: int = 0  # loading processes (0: threads of this one)
    num_threads: int = 4  # loading threads per process
    cache_dir: str = "~/.cache/htfa_jax"  # embedded images, VQ tokenizers, indexed data, and:
    cache_codes: bool = False  # keep the targets' codes on disk (see `encoder_cache`)
    cache_features: bool = False  # keep what a frozen SigLIP sees in both images on disk
    cache_gb: float = 50.0  # disk space that one run's codes and features may take


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training samples, the same for all images of a record (see `augment`)."""

    crop: float = 0.0  # share of both sides that a crop cuts off at most; the object's box stays
    flip: float = 0.0  # probability that left and right change places (answers may speak of them)
    brightness: float = 0.0  # values are multiplied by 1 +- up to this
    gamma: float = 0.0  # values in [0, 1] are raised to 1 +- up to this
    saturation: float = 0.0  # distances from grey are multiplied by 1 +- up to this


@dataclass(frozen=True)
class HeldObjectsConfig:
    """The embedded dataset, made on first use."""

    num_train: int = 4000  # training scenes
    num_validation: int = 100  # scenes for evaluation during training
    num_test: int = 500  # scenes for the evaluation at the end
    seed: int = 0  # another seed, other scenes
    answers: Literal["word", "sentence"] = "word"  # "red", or "The object is red."


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and what applies to which parameter."""

    # optimizer; adamw_8bit is AdamW with moments of one byte a value
    name: Literal["adamw", "adamw_8bit", "lion", "adafactor"] = "adamw"
    learning_rate: float = 5e-7  # peak, before the factors below
    # (parameter path regex, factor): the first that matches the whole path counts, else 1
    learning_rate_factors: tuple[tuple[str, float], ...] = (
        (r"level1\..*|level2\..*|level3\..*", 200.0),
    )
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.01  # decoupled
    # parameters without weight decay (path regex, the whole path)
    no_decay: str = r"level1\.(raw|scale).*|.*position_embed|.*embedding|.*norm.*|.*bias"
    clip_norm: float = 1.0  # global gradient norm
    schedule: Literal["cosine", "cosine_restarts", "linear", "constant"] = "cosine"  # after warm-up
    num_cycles: int = 2  # of cosine_restarts
    min_ratio: float = 0.1  # floor of the schedule, as a share of the peak
    warmup_ratio: float = 0.03  # share of all steps
    warmup_steps: int = 0  # instead of warmup_ratio, if above 0


@dataclass(frozen=True)
class ShardingConfig:
    """How a run spreads over devices: a mesh (data, fsdp, tensor); -1 takes what is left."""

    mode: Literal["replicated", "zero2", "fsdp"] = "zero2"  # what the fsdp axis shards
    data: int | None = None  # replicas of the rest (None: 1, or what leaves 16 for fsdp)
    fsdp: int = -1  # shards of weights, moments and gradients
    tensor: int = 1  # shards of heads and hidden units
    reduce_dtype: Literal["compute", "float32"] = "compute"  # type that gradients are added up in


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = 2  # samples per accumulation step and data shard (a device, without tensor)
    accumulation_steps: int = 4  # accumulation steps per update
    epochs: int = 4  # passes over the training data
    max_steps: int | None = None  # updates, instead of epochs
    dtype: DType = "bfloat16"  # of the computation (float16 scales its loss); weights are float32
    frozen_dtype: DType = "bfloat16"  # of frozen weights
    remat: Literal["none", "dots", "full"] = "full"  # what blocks recompute in the backward pass
    log_every: int = 10  # steps between lines of metrics
    on_nonfinite: Literal["stop", "skip"] = "stop"  # updates that are not finite: see loss_guard
    max_skipped: int = 10  # such updates in a row that "skip" leaves out before it stops too
    watchdog_seconds: float = 1800.0  # without a step, then all stacks are printed (0: never)
    profile_steps: int = 0  # steps that JAX's profiler records, after the first two (0: none)
    save: Literal["steps", "epoch", "no"] = "steps"  # when to write a checkpoint
    save_every: int | None = None  # steps or epochs between checkpoints (None: 250 or 1)
    keep_checkpoints: int = 3  # latest ones kept, besides the best
    best_metric: str = "loss"  # validation metric that chooses the best checkpoint
    best_mode: Literal["min", "max"] = "min"  # which end of it is best


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation, during training and by `htfa_jax.evaluate`."""

    during_training: Literal["steps", "epoch", "no"] = "epoch"  # when to evaluate
    every: int | None = None  # steps or epochs between evaluations (None: 250 or 1)
    batch_size: int = 8  # samples per step and data shard (a device, without tensor)
    max_samples: int | None = None  # of the validation split, during training (None: all)
    max_new_tokens: int = 64  # longest answer
    panel_samples: int = 8  # rows of the image panel


@dataclass(frozen=True)
class VQTrainConfig:
    """The VQ stage (`htfa_jax.train_vq`), run first when no pretrained VQ is given."""

    num_steps: int = 20000  # updates
    batch_size: int = 16  # images per update
    learning_rate: float = 1e-4  # peak of a cosine schedule
    commitment_weight: float = 0.25  # of the commitment loss
    l1_weight: float = 1.0  # of the absolute reconstruction error
    l2_weight: float = 1.0  # of the squared reconstruction error
    perceptual_weight: float = 0.0  # of the error in features of pretrained.siglip
    revive_after: int = 100  # steps without use after which a code is re-seeded
    save_every: int = 1000  # steps between checkpoints
