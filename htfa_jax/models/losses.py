"""The two losses: text cross-entropy in chunks, code cross-entropy, their weighted sum.

Each is a mean over the valid tokens of the whole update. The counts are known before the
forward pass, so every accumulation step divides by the update's count and gradients simply add up.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from htfa_jax.config import Config
from htfa_jax.data.batch import Batch
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.registration import NO_BOX, box_mask, cell_means
from htfa_jax.sharding.mesh import BATCH_AXES, ambient_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counts:
    """Sums of the token weights of an update.

    Attributes:
      text: of the text tokens that are learned.
      codes: of the cells.
      samples: of the samples.
    """

    text: jax.Array
    codes: jax.Array
    samples: jax.Array


def text_weights(batch: Batch) -> jax.Array:
    """Weight of each text position [B, L]."""
    return batch.loss_mask * batch.weight[:, None]


def code_weights(batch: Batch, config: Config) -> jax.Array:
    """Weight of each cell [B, M]: up to `occluded_cell_weight` where it is covered.

    0 in padding, and in samples that have neither target nor reconstruction: all that is left of
    them to complete is the original, occluder and all.
    """
    size, grid = batch.image_orig.shape[1:3], config.code_grid
    inside_BM = cell_means(box_mask(batch.region_orig, size), grid) > 0.5
    covered_BM = cell_means(batch.occluder_mask, grid)
    weight_BM = 1.0 + (config.loss.occluded_cell_weight - 1.0) * covered_BM
    known_B = batch.has_target | batch.has_recon
    return inside_BM * weight_BM * (batch.weight * known_B)[:, None]


def count(batch: Batch, config: Config) -> Counts:
    """What the losses of these samples are divided by."""
    codes = code_weights(batch, config).sum() if config.loss.code_weight else jnp.float32(0)
    return Counts(text_weights(batch).sum(), codes, batch.weight.sum())


def at_least_one(total: jax.Array) -> jax.Array:
    """A divisor for sums over nothing."""
    return jnp.where(total > 0, total, 1.0)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
    """Cross-entropy in nats, in float32, over the last axis.

    Args:
      logits: [..., classes]; those behind `num_classes` are minus infinity.
      labels: [...], below the number of classes.
      num_classes: classes that share the smoothed part.
      smoothing: part of the probability that is spread over all classes.
    """
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    # By comparing and not by index, whose gradient would be scattered: two passes more.
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    loss = log_sum - jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    if smoothing:
        mean = logits[..., :num_classes].mean(axis=-1)
        loss = (1 - smoothing) * loss + smoothing * (log_sum - mean)
    return loss


def chunked_cross_entropy(
    logits_by: Callable[[jax.Array, jax.Array], jax.Array],
    kernel_DV: jax.Array,
    hidden_BLD: jax.Array,
    labels_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    num_classes: int,
    smoothing: float,
    chunk: int,
) -> jax.Array:
    """Weighted sum of the cross-entropy, with the logits of `chunk` positions at a time.

    Of several chunks the backward pass computes the logits again, so that they never exist for all
    positions. On a mesh each part of the batch has chunks of its own, and devices add up the
    matrix's gradient once, not once per chunk.

    Args:
      logits_by: (matrix, hidden states) -> logits.
      kernel_DV: the matrix.
      hidden_BLD: hidden states.
      labels_BL: tokens to find.
      weights_BL: of the positions.
      num_classes, smoothing: as in `cross_entropy`.
      chunk: positions.
    """

    def one(kernel, hidden, labels, weights):
        loss = cross_entropy(logits_by(kernel, hidden), labels, num_classes, smoothing)
        return jnp.sum(loss * weights)

    def total(kernel, hidden, labels, weights):
        L = hidden.shape[1]
        size = min(chunk, L)
        padding = -L % size

        def chunks(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

        first, *rest = (chunks(x) for x in (hidden, labels, weights))
        if size == L:
            return one(kernel, first[0], *(x[0] for x in rest))
        # The chunks' gradients of the matrix add up in the matrix's dtype. Logits are computed in
        # the dtype of the hidden states all the same.
        kernel = kernel.astype(jnp.float32)
        # A plain 0.0 would be replicated, and the scan would refuse to add what differs from device
        # to device: inside a mesh each has a sum of its own. So the zero is made from the weights.
        zero = 0 * weights[0, 0]
        total_, _ = jax.lax.scan(
            lambda sum_, x: (sum_ + jax.checkpoint(one)(kernel, *x), None), zero, (first, *rest)
        )
        return total_

    if (mesh := ambient_mesh()) is None or mesh.size == 1:
        return total(kernel_DV, hidden_BLD, labels_BL, weights_BL)

    def local_total(kernel, *shards):
        kernel = jax.lax.pcast(kernel, BATCH_AXES, to="varying")
        return jax.lax.psum(total(kernel, *shards), BATCH_AXES)

    replicated, sharded = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        local_total,
        in_specs=(replicated, sharded, sharded, sharded),
        out_specs=replicated,
        axis_names=set(BATCH_AXES),
    )(kernel_DV.astype(jnp.float32), hidden_BLD, labels_BL, weights_BL)


def loss_and_metrics(
    model: HTFA, batch: Batch, counts: Counts, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This batch's part of the update's loss, and its parts.

    Args:
      model: the merged model.
      batch: B samples.
      counts: of the whole update (`count`); zero counts give zero loss.
      key: dropout key, None in evaluation.
    """
    config = model.config
    output = model(batch, key)
    metrics, total = {}, jnp.float32(0)
    if output.text_BLD is not None:
        text = chunked_cross_entropy(
            model.decoder.logits_by,
            model.decoder.head_kernel(),
            output.text_BLD,
            batch.labels,
            text_weights(batch),
            num_classes=config.decoder.vocab_size,
            smoothing=config.loss.label_smoothing,
            chunk=config.loss.text_chunk,
        ) / at_least_one(counts.text)
        metrics["text_loss"] = text
        total += config.loss.text_weight * text
    if output.code_logits_BMC is not None:
        weights_BM = code_weights(batch, config)
        codes_BM = model.target_codes(batch, output.fusion.pair)
        loss_BM = cross_entropy(
            output.code_logits_BMC, codes_BM, config.vq.codebook_size, config.loss.label_smoothing
        )
        right_BM = output.code_logits_BMC.argmax(axis=-1) == codes_BM
        divisor = at_least_one(counts.codes)
        metrics["code_loss"] = jnp.sum(loss_BM * weights_BM) / divisor
        metrics["code_accuracy"] = jnp.sum(right_BM * weights_BM) / divisor
        total += config.loss.code_weight * metrics["code_loss"]
    share_B = batch.weight / at_least_one(counts.samples)
    if output.fusion.alpha_BHW is not None:
        alpha_BHW = jax.lax.stop_gradient(output.fusion.alpha_BHW)
        metrics["alpha_mean"] = jnp.sum(alpha_BHW.mean(axis=(1, 2)) * share_B)
        metrics["alpha_std"] = jnp.sum(alpha_BHW.std(axis=(1, 2)) * share_B)
    metrics["without_box"] = jnp.sum((output.fusion.pair.source_B == NO_BOX) * share_B)
    return total, {"loss": total, **metrics}
