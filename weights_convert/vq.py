"""VQ tokenizers as Janus, LlamaGen, taming-transformers, Chameleon and transformers name them.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021). All share that
architecture. They differ in names, in the end from which the decoder's levels are counted, and in
whether codes are compared l2-normalised.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import VQConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.models.layers import make_rngs
from htfa_jax.models.vq import VQ
from weights_convert.adapters import refuse_adapters
from weights_convert.convert import ConversionSpec, Rule, conv, plan, same
from weights_convert.siglip import OTHER_COMPONENTS, count_layers
from weights_convert.source import Source

CODEBOOK = "quantize.embedding.weight"
GROUPS = 32  # of every group norm of these codebases


@dataclasses.dataclass(frozen=True)
class Names:
    """What a codebase calls the pieces of a tokenizer.

    Attributes:
      down: levels of the encoder.
      up: levels of the decoder.
      block: residual blocks of a level.
      middle: block, attention, block between levels and output.
    """

    down: str
    up: str
    block: str
    middle: tuple[str, str, str]

    @property
    def first(self) -> str:
        """A tensor by which the names are recognised."""
        return f"encoder.{self.down}.0.{self.block}.0.conv1.weight"


TAMING = Names("down", "up", "block", ("mid.block_1", "mid.attn_1", "mid.block_2"))
JANUS = Names("conv_blocks", "conv_blocks", "res", ("mid.0", "mid.1", "mid.2"))


def rules(
    names: Names = TAMING, up_order: Sequence[int] | None = None, codebook: str = CODEBOOK
) -> tuple[Rule, ...]:
    """The table.

    Args:
      names: of the pieces.
      up_order: numbers of the decoder's levels, in the order in which they run; None if they are
        numbered so.
      codebook: name of the codebook.
    """
    block1, attention, block2 = names.middle
    table = [Rule(r"codebook", codebook, same)]
    for half, levels, sample, outside in (
        ("encoder", names.down, "downsample", "quant_conv"),
        ("decoder", names.up, "upsample", "post_quant_conv"),
    ):
        pairs = {
            r"middle\.block1\.(norm1|conv1|norm2|conv2)": rf"{half}.{block1}.\1",
            r"middle\.block2\.(norm1|conv1|norm2|conv2)": rf"{half}.{block2}.\1",
            r"middle\.attention\.norm": f"{half}.{attention}.norm",
            r"middle\.attention\.([qkv])_proj": rf"{half}.{attention}.\1",
            r"middle\.attention\.o_proj": f"{half}.{attention}.proj_out",
            r"(conv_in|norm_out|conv_out)": rf"{half}.\1",
            outside: outside,
        }
        numbers = {r"(\d+)": r"\1"}
        if half == "decoder" and up_order is not None:
            numbers = {f"({ours})": str(theirs) for ours, theirs in enumerate(up_order)}
        for ours, theirs in numbers.items():
            place, level = rf"levels\.{ours}\.", f"{half}.{levels}.{theirs}"
            blocks, attentions = place + r"blocks\.(\d+)\.", place + r"attentions\.(\d+)\."
            block = rf"{level}.{names.block}.\2"
            pairs |= {
                blocks + "(norm1|conv1|norm2|conv2)": rf"{block}.\3",
                blocks + "shortcut": f"{block}.nin_shortcut",
                attentions + "norm": rf"{level}.attn.\2.norm",
                attentions + "([qkv])_proj": rf"{level}.attn.\2.\3",
                attentions + "o_proj": rf"{level}.attn.\2.proj_out",
                rf"{sample}s\.{ours}": f"{level}.{sample}.conv",
            }
        for path, key in pairs.items():
            table.append(Rule(rf"{half}\.{path}\.kernel", key + ".weight", conv))
            table.append(Rule(rf"{half}\.{path}\.scale", key + ".weight", same))
            table.append(Rule(rf"{half}\.{path}\.bias", key + ".bias", same))
    return tuple(table)


def ignored(prefix: str = "", has_decoder: bool = True) -> dict[str, str]:
    """Keys that are not needed, and why."""
    inside = re.escape(prefix)
    reasons = {
        rf"{inside}loss\..*": "discriminator and perceptual loss of its training",
        rf"{inside}quantize\.codebook_used": "which codes its training used lately",
        rf"{inside}quantize\.embedding\.(cluster_size|embed_avg)": "averages of its training",
    }
    if not has_decoder:
        reasons[rf"{inside}post_quant_conv\..*"] = "leads to a decoder that is not there"
    if prefix:
        reasons[rf"(?!{inside}).*"] = OTHER_COMPONENTS
    return reasons


# For transformers' `JanusVQVAE`.
RULES = rules()
IGNORED = ignored()


@functools.cache
def shapes(sizes: VQConfig) -> Flat:
    """`{path: shape}` of the tokenizer; allocates nothing."""
    model = nnx.eval_shape(lambda: VQ(sizes, dtype=jnp.dtype("float32"), rngs=make_rngs(0)))
    return param_paths.flatten(nnx.split(model)[1])


def conversion_spec(source: Source | Merged, decoder_from: Source | None = None) -> ConversionSpec:
    """What sort of VQ tokenizer a checkpoint holds.

    Args:
      source: the checkpoint.
      decoder_from: another checkpoint, whose decoder completes an encoder. The spec is then that
        of `Merged(source, decoder_from)`, from which the tensors have to be read.

    Raises:
      CheckpointError: no such tokenizer in it, sizes that ours cannot have, or two checkpoints
        that do not belong together.
    """
    if decoder_from is not None:
        source = Merged(source, decoder_from)
    else:
        refuse_adapters(source)
    names, prefix = find(source)
    # transformers' JanusVQVAE has the names of taming-transformers, but numbers the levels of the
    # decoder as they run; taming-transformers numbers them from the highest resolution, which
    # nothing upsamples. Only Janus compares normalised codes (transformers, unlike the original,
    # normalises them only where it decodes).
    in_order = any(key.startswith(f"{prefix}decoder.up.0.upsample.") for key in source.keys)
    is_janus = names is JANUS or in_order
    codebook = codebook_of(source, prefix)
    sizes = sizes_of(source, prefix, names, codebook, normalize_codes=is_janus)
    levels = len(sizes.channel_multipliers)
    naming = "Janus" if names is JANUS else "transformers (Janus)" if is_janus else "taming"
    return ConversionSpec(
        family="vq",
        variant=f"VQ tokenizer as {naming} names it ({prefix or 'no prefix'}), {levels} levels, "
        f"{sizes.codebook_size} {'normalised ' if is_janus else ''}codes of {sizes.codebook_dim}"
        + ("" if sizes.has_decoder else ", without decoder: it only encodes"),
        sizes=sizes,
        shapes=shapes(sizes),
        rules=rules(names, None if is_janus else range(levels)[::-1], codebook),
        prefix=prefix,
        ignored=ignored(prefix, sizes.has_decoder),
    )


def find(source: Source | Merged) -> tuple[Names, str]:
    """How the tensors of the only tokenizer are named, and the prefix of their keys."""
    places = [
        (names, key.removesuffix(names.first))
        for names in (JANUS, TAMING)
        for key in source.keys
        if key == names.first or key.endswith("." + names.first)
    ]
    if len(places) != 1:
        found = ", ".join(prefix + names.first for names, prefix in places) or "none"
        raise CheckpointError(
            f"{source.name} holds no VQ tokenizer: expected one encoder named as in Janus and "
            f"LlamaGen ({JANUS.first}) or as in taming-transformers and transformers "
            f"({TAMING.first}), found {found}; `python -m weights_convert info` shows what is "
            "inside"
        )
    return places[0]


def codebook_of(source: Source | Merged, prefix: str) -> str:
    """Name of the codebook, without prefix."""
    if any(key.startswith(f"{prefix}quantize.proj.") for key in source.keys):
        raise CheckpointError(
            f"{source.name} chooses codes by a Gumbel softmax ({prefix}quantize.proj); expected a "
            "tokenizer that takes the nearest code"
        )
    for name in (CODEBOOK, "quantize.embed.weight"):
        if prefix + name in source:
            return name
    raise CheckpointError(
        f"{source.name} has an encoder, but no codebook: expected {prefix}{CODEBOOK}"
    )


def sizes_of(
    source: Source | Merged, prefix: str, names: Names, codebook: str, normalize_codes: bool
) -> VQConfig:
    """The configuration that the shapes of the tensors tell."""

    def shape(name: str, rank: int = 4) -> tuple[int, ...]:
        if prefix + name not in source:
            raise CheckpointError(
                f"{source.name} has no tensor {prefix}{name}, which tells the sizes"
            )
        found = source.shape(prefix + name)
        if len(found) != rank:
            raise CheckpointError(
                f"{source.name}: {prefix}{name} is of shape {found}; expected {rank} axes"
            )
        return found

    down = re.escape(f"{prefix}encoder.{names.down}.")
    levels = count_layers(source, down + r"(\d+)\..*")
    base, channels = shape("encoder.conv_in.weight")[:2]
    stem = math.isqrt(channels // 3)
    if channels != 3 * stem**2:
        raise CheckpointError(
            f"{source.name}: the encoder reads images of {channels} channels; expected 3, or "
            "3 x n x n for squares of n x n pixels"
        )
    widths = [
        shape(f"encoder.{names.down}.{i}.{names.block}.0.conv1.weight")[0] for i in range(levels)
    ]
    if base % GROUPS or any(width % base for width in widths):
        raise CheckpointError(
            f"{source.name}: the encoder starts with {base} channels and has {widths} in its "
            f"levels; expected multiples of {GROUPS}, and multiples of the first"
        )
    with_attention = sorted(
        {int(m[1]) for key in source.keys if (m := re.match(down + r"(\d+)\.attn\.", key))}
    )
    if with_attention not in ([], [levels - 1]):
        raise CheckpointError(
            f"{source.name} has attention in encoder levels {with_attention} of {levels}; "
            f"expected it in level {levels - 1} only, or between encoder and output only"
        )
    codebook_size, codebook_dim = shape(codebook, 2)
    return VQConfig(
        stem=stem,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=count_layers(source, down + rf"0\.{names.block}\.(\d+)\..*"),
        attention="lowest" if with_attention else "middle",
        z_channels=shape("encoder.conv_out.weight")[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        normalize_codes=normalize_codes,
        has_decoder=any(key.startswith(f"{prefix}decoder.") for key in source.keys),
    )


class Merged:
    """An encoder with its codebook, and the decoder of another checkpoint, as one source.

    Keys are those of the encoder's checkpoint, with the decoder where it would stand there.

    Args:
      encoder: a tokenizer without decoder, such as transformers' `ChameleonVQVAE`.
      decoder: the same tokenizer with one, such as Chameleon's own `vqgan.ckpt`.

    Raises:
      CheckpointError: the first has a decoder, the second none, or they are not the same tokenizer:
        other sizes, other codes.
    """

    def __init__(self, encoder: Source, decoder: Source):
        ours, theirs = conversion_spec(encoder), conversion_spec(decoder)
        if ours.sizes.has_decoder:
            raise CheckpointError(f"{encoder.name} has a decoder; none can be added to it")
        if not theirs.sizes.has_decoder:
            raise CheckpointError(f"{decoder.name} has no decoder to complete {encoder.name} with")
        plan(theirs.shapes, decoder, theirs.rules, theirs.ignored, theirs.prefix)
        check_same(encoder, ours, decoder, theirs)
        self.name = f"{encoder.name} with the decoder of {decoder.name}"
        self.config, self.revision = encoder.config, encoder.revision
        self._encoder, self._decoder = encoder, decoder
        self._where = {key: (encoder, key) for key in encoder.keys}
        for key in decoder.keys:
            name = key.removeprefix(theirs.prefix)
            if key.startswith(theirs.prefix) and name.startswith(("decoder.", "post_quant_conv.")):
                self._where[ours.prefix + name] = decoder, key

    @property
    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        source, name = self._where[key]
        return source.shape(name)

    def dtype(self, key: str) -> np.dtype:
        """Type of a tensor."""
        source, name = self._where[key]
        return source.dtype(name)

    def read(self, key: str) -> np.ndarray:
        """A tensor."""
        source, name = self._where[key]
        return source.read(name)

    def hashes(self, keys: list[str]) -> list[dict[str, str]]:
        """Name and SHA-256 of the files that hold some tensors; see `Source.hashes`."""
        files = []
        for source, folder in ((self._encoder, ""), (self._decoder, "decoder_from/")):
            names = [name for origin, name in map(self._where.get, keys) if origin is source]
            files += [{**file, "name": folder + file["name"]} for file in source.hashes(names)]
        return files


def check_same(
    encoder: Source, ours: ConversionSpec, decoder: Source, theirs: ConversionSpec
) -> None:
    """Raises CheckpointError unless two checkpoints are of one tokenizer."""
    expected = dataclasses.asdict(ours.sizes) | {"has_decoder": True}
    found = dataclasses.asdict(theirs.sizes)
    differing = [f"{k} {found[k]} instead of {v}" for k, v in expected.items() if found[k] != v]
    if differing:
        raise CheckpointError(
            f"{decoder.name} is of another tokenizer than {encoder.name}: {', '.join(differing)}"
        )
    a, b = (
        source.read(one.prefix + codebook_of(source, one.prefix)).astype(np.float32)
        for source, one in ((encoder, ours), (decoder, theirs))
    )
    # As far apart as rounding to bfloat16 can bring them.
    if not np.allclose(a, b, rtol=2**-7, atol=1e-4 * np.abs(b).max()):
        raise CheckpointError(
            f"{decoder.name} is of another tokenizer than {encoder.name}: codes differ by up to "
            f"{np.abs(a - b).max():.3g} of {np.abs(b).max():.3g}"
        )
