import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from support import golden, nhwc, taken_apart, tiny
from torch.nn.functional import gelu, interpolate

from htfa_jax.checkpoints.weights import CONFIG, WEIGHTS, read_weights, with_sizes
from htfa_jax.config import Level1Config, Level2Config, Level3Config, override
from htfa_jax.errors import CheckpointError
from htfa_jax.models.factory import build_model
from htfa_jax.models.level1_adaptive_fusion import AdaptiveFusion
from htfa_jax.models.level2_spatial_attention import SpatialAttention
from htfa_jax.models.level3_encoder_decoupling import EncoderDecoupling
from htfa_jax.training.pretrained import load_pretrained
from weights_convert.folder import CONVERSION, write_folder
from weights_convert.htfa import (
    LEFT_ENTRIES,
    LEFT_TENSORS,
    RESERVATIONS,
    UNKNOWN_ENTRY,
    conversion_spec,
)
from weights_convert.source import Source
from weights_convert.verify import verify

NUMBERS = {"rtol": 1e-5, "atol": 1e-5}
IMAGE, WIDTH, HEADS, HIDDEN, DECODER = 16, 24, 4, 28, 20
CODES, CODE_DIM, WORDS = 22, 6, 37


class Branch(torch.nn.Module):
    """A branch of Level 3: an adapter, and the placeholder VQ if it generates."""

    def __init__(self, width, norm=True, vq=None):
        super().__init__()
        self.adapter = torch.nn.Module()
        self.adapter.fc1 = torch.nn.Linear(width, HIDDEN)
        self.adapter.fc2 = torch.nn.Linear(HIDDEN, DECODER)
        self.adapter.layer_norm = torch.nn.LayerNorm(DECODER) if norm else torch.nn.Identity()
        if vq is not None:
            self.vq_tokenizer = vq

    def forward(self, x):
        return self.adapter.layer_norm(self.adapter.fc2(gelu(self.adapter.fc1(x))))


class Original(torch.nn.Module):
    """The PyTorch original's modules and names, written anew from its formulas."""

    def __init__(self, scales=1, norm=True, encoders=True, decoder_layers=2):
        super().__init__()

        def alpha(size):
            module = torch.nn.Module()
            module.fusion_weight_raw = torch.nn.Parameter(torch.zeros(1, 1, size, size))
            return module

        self.level1_fusion = alpha(IMAGE)
        if scales > 1:
            self.level1_fusion = torch.nn.Module()
            maps = [alpha(IMAGE // 2**s) for s in range(scales)]
            self.level1_fusion.fusion_layers = torch.nn.ModuleList(maps)
            self.level1_fusion.scale_weights = torch.nn.Parameter(torch.zeros(scales))
        self.level2_fusion = torch.nn.Module()
        for name in ("query", "key", "value", "output"):
            self.level2_fusion.add_module(f"{name}_proj", torch.nn.Linear(WIDTH, WIDTH))
        self.level2_fusion.layer_norm = torch.nn.LayerNorm(WIDTH)
        vq = torch.nn.Module()
        vq.codebook = torch.nn.Embedding(CODES, CODE_DIM)
        convs = [torch.nn.Conv2d(3, 4, 4), torch.nn.Conv2d(4, 5, 4), torch.nn.Conv2d(5, 4, 4)]
        convs = [layer for conv in convs for layer in (conv, torch.nn.ReLU())]
        vq.encoder = torch.nn.Sequential(*convs, torch.nn.Conv2d(4, CODE_DIM, 3))
        self.level3_fusion = torch.nn.Module()
        self.level3_fusion.understanding_branch = Branch(WIDTH, norm)
        self.level3_fusion.generation_branch = Branch(CODE_DIM, norm, vq)
        layer = torch.nn.TransformerDecoderLayer(
            DECODER, 2, 4 * DECODER, batch_first=True, norm_first=True
        )
        self.level3_fusion.autoregressive_decoder = torch.nn.TransformerDecoder(
            layer, decoder_layers
        )
        self.level3_fusion.output_norm = torch.nn.LayerNorm(DECODER)
        self.prediction_heads = torch.nn.Module()
        self.prediction_heads.head_understand = torch.nn.Linear(DECODER, WORDS, bias=False)
        self.prediction_heads.head_generate = torch.nn.Linear(DECODER, CODES, bias=False)
        if encoders:
            self.siglip_encoder = torch.nn.Linear(7, WIDTH)
            self.vq_tokenizer = vq  # the original stores it twice
            self.llm_decoder = torch.nn.Module()
            self.llm_decoder.embed_tokens = torch.nn.Embedding(WORDS, DECODER)
        torch.manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.5)

    def fuse(self, orig, recon):
        def blend(module, orig, recon):
            alpha = torch.sigmoid(module.fusion_weight_raw)
            if alpha.shape[2:] != orig.shape[2:]:
                alpha = interpolate(alpha, size=orig.shape[2:], mode="bilinear")
            return alpha * orig + (1 - alpha) * recon

        level = self.level1_fusion
        if not hasattr(level, "fusion_layers"):
            return blend(level, orig, recon)
        total, size = 0.0, orig.shape[2:]
        for s, weight in enumerate(torch.softmax(level.scale_weights, dim=0)):
            small = [n // 2**s for n in size]
            pair = (interpolate(x, size=small, mode="bilinear") for x in (orig, recon))
            fused = blend(level.fusion_layers[s], *pair)
            total = total + weight * interpolate(fused, size=size, mode="bilinear")
        return total

    def attend(self, orig, recon, fused):
        level = self.level2_fusion
        B, P, D = orig.shape

        def heads(x):
            return x.reshape(B, P, HEADS, D // HEADS).transpose(1, 2)

        q, k, v = (
            heads(project(x))
            for project, x in (
                (level.query_proj, orig),
                (level.key_proj, recon),
                (level.value_proj, fused),
            )
        )
        out = torch.softmax(q @ k.transpose(2, 3) / (D // HEADS) ** 0.5, dim=-1) @ v
        return level.layer_norm(level.output_proj(out.transpose(1, 2).reshape(B, P, D)) + orig)


def checkpoint(model, **changes):
    """What the original's trainer saves, after a step of its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    entries = {
        "epoch": 1,
        "global_step": 250,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "best_val_loss": float("inf"),
        "config": {"level2_num_heads": HEADS, "image_size": IMAGE, "vq_tokenizer_path": None},
        "lr_scheduler_state_dict": schedule.state_dict(),
    }
    return {key: value for key, value in (entries | changes).items() if value is not None}


def plan_of(folder, content):
    folder.mkdir(exist_ok=True)
    path = folder / "best_model.pt"
    torch.save(content, path)
    return Source(path), conversion_spec(Source(path))


def converted(folder, content):
    """(our three levels with the converted weights, config.json, conversion.json)"""
    source, plan = plan_of(folder, content)
    write_folder(source, plan, folder / "out")
    sizes, conversion = (
        json.loads((folder / "out" / name).read_text()) for name in (CONFIG, CONVERSION)
    )
    options = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    level3 = Level3Config(
        adapter_mlp_dim=sizes["adapter_mlp_dim"], adapter_norm=sizes["adapter_norm"]
    )
    modules = {
        "level1": AdaptiveFusion(
            Level1Config(alpha="map", num_scales=sizes["num_scales"]),
            sizes["image_size"],
            **options,
        ),
        "level2": SpatialAttention(
            Level2Config(num_heads=sizes["num_heads"]), sizes["embed_dim"], **options
        ),
        "level3": EncoderDecoupling(
            level3,
            understand_dim=sizes["embed_dim"],
            code_dim=sizes["codebook_dim"],
            codebook_size=sizes["codebook_size"],
            decoder_dim=sizes["decoder_dim"],
            **options,
        ),
    }
    weights = read_weights(folder / "out")
    levels = {}
    for name, module in modules.items():
        structure, fresh = taken_apart(module)
        levels[name] = structure.merge({path: weights.pop(f"{name}.{path}") for path in fresh})
    assert not weights
    return levels, sizes, conversion


def names(npz, *keys):
    return {name for key in keys for name in npz[key].tolist()}


def test_the_stand_in_has_the_names_of_the_original():
    expected = names(golden("optimizer"), "decay", "no_decay", "frozen")
    assert set(Original(encoders=False, decoder_layers=1).state_dict()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("scales,norm", [(1, True), (3, False)])
def test_three_levels_compute_what_the_original_does(tmp_path, scales, norm):
    model = Original(scales, norm)
    levels, sizes, _ = converted(tmp_path, checkpoint(model))
    assert sizes == sizes | {
        "family": "htfa",
        "image_size": IMAGE,
        "num_scales": scales,
        "embed_dim": WIDTH,
        "num_heads": HEADS,
        "adapter_mlp_dim": HIDDEN,
        "adapter_norm": norm,
        "codebook_dim": CODE_DIM,
        "codebook_size": CODES,
        "decoder_dim": DECODER,
    }
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        images = draw(2, 3, 3, 24, 20)
        ours, _ = levels["level1"](*(nhwc(x.numpy()) for x in images))
        np.testing.assert_allclose(ours, nhwc(model.fuse(*images).numpy()), **NUMBERS)
        features = draw(3, 2, 9, WIDTH)
        ours, _ = levels["level2"](*features.numpy())
        np.testing.assert_allclose(ours, model.attend(*features).numpy(), **NUMBERS)
        level3 = model.level3_fusion
        for ours, theirs, width in (
            (levels["level3"].understand, level3.understanding_branch, WIDTH),
            (levels["level3"].generate, level3.generation_branch, CODE_DIM),
            (levels["level3"].code_logits, model.prediction_heads.head_generate, DECODER),
        ):
            x = draw(2, 9, width)
            np.testing.assert_allclose(ours(x.numpy()), theirs(x).numpy(), **NUMBERS)


def test_agrees_with_reference_vectors(tmp_path):
    """Weights of the original itself; its understanding adapter is not among them."""
    g1, g2, g3 = (golden(name) for name in ("level1", "level2_attention", "adapter_heads"))
    rng = np.random.default_rng(0)
    adapter = {
        key.removeprefix("adapter.default.w."): value
        for key, value in g3.items()
        if key.startswith("adapter.default.w.")
    }
    other = adapter | {"fc1.weight": rng.standard_normal((40, 32)).astype(np.float32)}
    tensors = {"level1_fusion.fusion_weight_raw": g1["w.fusion_weight_raw"]}
    tensors |= {
        f"level2_fusion.{key.removeprefix('w.')}": value
        for key, value in g2.items()
        if key.startswith("w.")
    }
    for branch, weights in (("understanding", other), ("generation", adapter)):
        start = f"level3_fusion.{branch}_branch.adapter."
        tensors |= {start + key: value for key, value in weights.items()}
    for head in ("head_understand", "head_generate"):
        tensors[f"prediction_heads.{head}.weight"] = g3[f"heads.w.{head}.weight"]
    tensors = {key: torch.from_numpy(value) for key, value in tensors.items()}
    content = {"model_state_dict": tensors, "config": {"level2_num_heads": 4}}
    levels, _, _ = converted(tmp_path, content)
    for case in ("native", "up", "down"):
        pair = (nhwc(g1[f"{case}.img_{name}"]) for name in ("orig", "recon"))
        np.testing.assert_allclose(levels["level1"](*pair)[0], nhwc(g1[f"{case}.fused"]), **NUMBERS)
    features = (g2[f"batch2.feat_{n}"] for n in ("orig", "recon", "fused"))
    out, attention = levels["level2"](*features, with_weights=True)
    np.testing.assert_allclose(out, g2["batch2.out"], **NUMBERS)
    np.testing.assert_allclose(attention, g2["batch2.attention"], **NUMBERS)
    np.testing.assert_allclose(
        levels["level3"].generate(g3["adapter.x"]), g3["adapter.default.out"], **NUMBERS
    )
    np.testing.assert_allclose(
        levels["level3"].code_logits(g3["heads.hidden"][:, 4:10]),
        g3["heads.logits_generate"],
        **NUMBERS,
    )


def test_says_what_stays_behind_and_why(tmp_path, caplog):
    model = Original()
    with caplog.at_level("INFO", logger="htfa_jax.weights_convert"):
        _, config, conversion = converted(tmp_path, checkpoint(model, git_commit="abc"))
    left = config["left_behind"]
    assert left == LEFT_TENSORS | LEFT_ENTRIES | {"git_commit": UNKNOWN_ENTRY}
    assert all(left.values())
    assert config["reservations"] == RESERVATIONS
    for name in (*left, *RESERVATIONS):
        assert f"{name} " in caplog.text
    keys = set(model.state_dict())
    behind = {key for key in keys if key.startswith(tuple(f"{name}." for name in LEFT_TENSORS))}
    assert conversion["tensors"] == len(keys) - len(behind) == 1 + 10 + 2 * 6 + 1
    assert sum(conversion["ignored"].values()) == len(behind)
    assert set(conversion["ignored"]) == set(LEFT_TENSORS.values())


def test_says_nothing_of_what_was_never_there(tmp_path):
    _, plan = plan_of(tmp_path, Original(encoders=False).state_dict())
    assert set(plan.notes["left_behind"]) == {
        name for name in LEFT_TENSORS if name.startswith(("level3_fusion.", "prediction_heads."))
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_wrappers_may_stand_before_the_names(tmp_path, prefix):
    state = Original().state_dict()
    _, sizes, _ = converted(tmp_path / "plain", {"model_state_dict": state})
    wrapped = {prefix + key: value for key, value in state.items()}
    _, same_sizes, _ = converted(tmp_path / "wrapped", {"model_state_dict": wrapped})
    assert sizes == same_sizes
    plain, same = (read_weights(tmp_path / name / "out") for name in ("plain", "wrapped"))
    assert set(plain) == set(same)
    for path, value in plain.items():
        np.testing.assert_array_equal(value, same[path])


@pytest.mark.parametrize("config", [{}, None])
def test_heads_are_eight_if_nothing_says_so(tmp_path, config):
    _, plan = plan_of(tmp_path, checkpoint(Original(), config=config))
    assert plan.sizes.num_heads == 8
    assert "8 heads (the original's default" in plan.variant


def test_refuses_heads_that_do_not_divide_the_width(tmp_path):
    content = checkpoint(Original(), config={"level2_num_heads": 5})
    with pytest.raises(CheckpointError, match="5 heads .* do not divide 24"):
        plan_of(tmp_path, content)


def drop(key):
    return lambda state: state.pop(key)


def put(key, *shape):
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    "break_it,message",
    [
        (drop("level2_fusion.value_proj.bias"), "level2.v_proj.bias: no tensor level2_fusion.val"),
        (
            drop("level3_fusion.generation_branch.adapter.layer_norm.weight"),
            "no tensor level3_fusion.generation_branch.adapter.layer_norm.weight",
        ),
        (
            drop("prediction_heads.head_generate.weight"),
            "incomplete: no tensor prediction_heads.head_generate.weight",
        ),
        (drop("level1_fusion.fusion_weight_raw"), "no tensor level1_fusion.fusion_weight_raw"),
        (drop("level2_fusion.query_proj.weight"), "holds no HTFA of the PyTorch original"),
        (put("level2_fusion.gate.weight", 3), "tensor level2_fusion.gate.weight is not used"),
        (put("level3_fusion.output_normal.weight", 3), "output_normal.weight is not used"),
        (
            put("level1_fusion.fusion_weight_raw", 1, 1, 8, IMAGE),
            r"level1.raw.0 \(16, 16\) <- level1_fusion.fusion_weight_raw \(8, 16\)",
        ),
        (
            put("prediction_heads.head_generate.weight", CODES),
            r"number of dimensions: prediction_heads.head_generate.weight \(22,\)",
        ),
    ],
)
def test_names_what_does_not_fit(tmp_path, break_it, message):
    state = Original().state_dict()
    break_it(state)
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, {"model_state_dict": state})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scales", [1, 3])
def test_verify_runs_the_original_beside_ours(tmp_path, scales):
    source, plan = plan_of(tmp_path, checkpoint(Original(scales)))
    write_folder(source, plan, tmp_path / "out")
    shown = verify(tmp_path / "out", source)
    for part in ("Level 1", "Level 2", "understanding adapter", "generation head"):
        assert f"{part}: largest difference" in shown
    arrays = {path: x + 0.1 * path.startswith("level2.q") for path, x in
              read_weights(tmp_path / "out").items()}  # fmt: skip
    save_file(arrays, tmp_path / "out" / WEIGHTS)
    with pytest.raises(CheckpointError, match="does not compute what"):
        verify(tmp_path / "out", source)


def test_training_starts_from_what_carries_over(tmp_path, caplog):
    source, plan = plan_of(tmp_path, checkpoint(Original()))
    write_folder(source, plan, tmp_path / "out")
    arrays = read_weights(tmp_path / "out")
    config = tiny(
        image_size=IMAGE, siglip__patch_size=8, decoder__embed_dim=DECODER, decoder__num_heads=2,
        decoder__num_kv_heads=1, level2__num_heads=2, pretrained__htfa=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="num_heads: 4 in the folder, 2 in the config"):
        load_pretrained(config, build_model(config))
    config = with_sizes(config, config)
    assert config.level2.num_heads == HEADS and config.level3.adapter_mlp_dim == HIDDEN
    # What the original computes with them, unless a flag says otherwise.
    choices = config.level1.alpha, config.level2.alignment, config.level2.values
    assert choices == ("map", "features", "fused")
    unaligned = override(config, {"level2.alignment": "none"})
    assert with_sizes(unaligned, config).level2.alignment == "none"
    loaded = load_pretrained(config, build_model(config))
    assert loaded.keys() == arrays.keys()
    for path, value in arrays.items():
        np.testing.assert_array_equal(loaded[path], value)
    other = override(config, {"vq.codebook_size": 30})
    with caplog.at_level("WARNING"):
        kept = load_pretrained(other, build_model(other))
    assert "level3.head_generate starts fresh" in caplog.text
    assert set(arrays) - set(kept) == {"level3.head_generate.kernel"}
    larger = override(config, {"image_size": 24})
    with pytest.raises(CheckpointError, match=r"level1.raw.0: \(16, 16\) in .*\(24, 24\)"):
        load_pretrained(larger, build_model(larger))
