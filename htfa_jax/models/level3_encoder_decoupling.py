"""Level 3: two decoupled branches, understanding and generation, into one decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import Level3Config
from htfa_jax.models.layers import dropout, layer_norm, linear, split_key

# Logit of a cell's own code with which a fresh generation head starts, about.
TIED_LOGIT = 6.0


class MLPAdapter(nnx.Module):
    """LayerNorm(W2 GELU(W1 x)): brings an encoder's width to the decoder's. Exact GELU.

    Args:
      config: Level 3 part of the configuration.
      in_features: width of the encoder's tokens.
      out_features: width of the decoder.
      dtype: of the computation.
    """

    def __init__(
        self,
        config: Level3Config,
        in_features: int,
        out_features: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        hidden = config.adapter_mlp_dim or 4 * out_features
        self.dropout, self.has_norm = config.adapter_dropout, config.adapter_norm
        self.fc1 = linear(in_features, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, out_features, dtype=dtype, rngs=rngs)
        if self.has_norm:
            self.norm = layer_norm(out_features, 1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, T, in_features] -> [B, T, out_features]; no key means no dropout."""
        key1, key2 = split_key(key, 2)
        x_BTF = dropout(jax.nn.gelu(self.fc1(x_BTD), approximate=False), self.dropout, key1)
        x_BTD = dropout(self.fc2(x_BTF), self.dropout, key2)
        return self.norm(x_BTD) if self.has_norm else x_BTD


class EncoderDecoupling(nnx.Module):
    """The two adapters and the generation head; the LM head is the decoder's own.

    Args:
      config: Level 3 part of the configuration.
      understand_dim: width of what the understanding branch reads.
      code_dim: length of a code vector.
      codebook_size: codes that the generation head chooses from; 0 leaves the head out.
      decoder_dim: width of the decoder.
      dtype: of the computation.
    """

    def __init__(
        self,
        config: Level3Config,
        *,
        understand_dim: int,
        code_dim: int,
        codebook_size: int,
        decoder_dim: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.adapter_understand = MLPAdapter(
            config, understand_dim, decoder_dim, dtype=dtype, rngs=rngs
        )
        if config.generation:
            self.adapter_generate = MLPAdapter(
                config, code_dim, decoder_dim, dtype=dtype, rngs=rngs
            )
        if codebook_size:
            self.head_generate = linear(
                decoder_dim, codebook_size, bias=False, dtype=dtype, rngs=rngs
            )

    def understand(self, spatial_BPD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """F_spatial, and what stands beside it, to decoder tokens [B, P, D]."""
        return self.adapter_understand(spatial_BPD, key)

    def generate(self, vectors_BME: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Code vectors of the fused image to decoder tokens [B, M, D]."""
        return self.adapter_generate(vectors_BME, key)

    def tied_head_kernel(self, vectors_CE: jax.Array) -> jax.Array:
        """The kernel [D, C] that a fresh generation head starts from: the tokens of all codes.

        The input embedding serves as the output embedding (Press and Wolf, "Using the Output
        Embedding to Improve Language Models", 2017), here at the start only. So the most probable
        code of a cell is the one that it has, and what the head must learn is where to leave it.
        """
        tokens_CD = self.generate(vectors_CE[None])[0]
        return TIED_LOGIT / tokens_CD.shape[-1] * tokens_CD.T.astype(jnp.float32)

    def code_logits(self, hidden_BMD: jax.Array) -> jax.Array:
        """Hidden states of the generation positions to logits [B, M, C] in float32."""
        return self.head_generate(hidden_BMD).astype(jnp.float32)
