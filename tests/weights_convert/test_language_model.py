"""Language models are what their config.json says, in transformers' own classes, or are refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from small_checkpoints import random, tensors_of, to_internlm2, written
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from htfa_jax.checkpoints.weights import load_component, read_weights
from htfa_jax.common.param_paths import flatten, unflatten
from htfa_jax.errors import CheckpointError
from htfa_jax.models.decoding import DecodingInternLM2, decoding_layout
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.models.layers import make_rngs
from weights_convert import internlm2
from weights_convert.folder import write_folder
from weights_convert.language_model import DEFAULTS, read
from weights_convert.source import Source
from weights_convert.verify import verify

SIZES = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama, its tensors and what its config.json says."""
    folder = tmp_path_factory.mktemp("llama")
    model = random(LlamaForCausalLM(LlamaConfig(**SIZES)))
    with torch.no_grad():  # small embeddings, as real ones are: epsilon counts
        model.model.embed_tokens.weight.mul_(0.02)
    model.save_pretrained(folder)
    return model, tensors_of(folder), json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A Qwen2, whose queries, keys and values have biases."""
    folder = tmp_path_factory.mktemp("qwen2")
    model = random(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    model.save_pretrained(folder)
    return model, tensors_of(folder), json.loads((folder / "config.json").read_text())


def spec_of(folder):
    return internlm2.conversion_spec(Source(folder))


def module_of(folder, out, decoding=False):
    """Our decoder with a checkpoint's weights in float32."""
    source = Source(folder)
    spec = internlm2.conversion_spec(source)
    write_folder(source, spec, out)
    params = load_component(out, "internlm2", spec.sizes, spec.shapes)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    kind = DecodingInternLM2 if decoding else InternLM2
    made = nnx.eval_shape(lambda: kind(spec.sizes, dtype=jnp.dtype("float32"), rngs=make_rngs(0)))
    params = decoding_layout(params) if decoding else params
    structure, state = nnx.split(made)
    assert flatten(state).keys() == params.keys()
    return spec.sizes, nnx.merge(structure, unflatten(params))


def agrees(folder, out, model, decoding=False):
    """Whether logits of 48 tokens are those of transformers' model."""
    ids = np.random.default_rng(5).integers(0, 130, (2, 48))
    sizes, ours = module_of(folder, out, decoding)
    hidden, _ = ours(ours.embed(jnp.asarray(ids)), jnp.broadcast_to(jnp.arange(48), ids.shape))
    found = np.asarray(ours.logits(hidden))[..., : sizes.vocab_size]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    return np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_table_of_defaults_is_that_of_the_classes():
    for kind, cls in (("llama", LlamaConfig), ("mistral", MistralConfig), ("qwen2", Qwen2Config)):
        theirs, ours = cls(), dict(DEFAULTS[kind])
        assert theirs.rope_parameters == {
            "rope_theta": ours.pop("rope_theta"),
            "rope_type": "default",
        }
        for name in ("num_key_value_heads", "head_dim"):  # None: computed from the others
            ours.pop(name)
        assert ours == {name: getattr(theirs, name) for name in ours}, kind


@pytest.mark.slow
def test_another_head_than_the_embedding_is_kept_whatever_config_json_says(llama, tmp_path, caplog):
    model, tensors, config = llama
    folder = written(tmp_path / "a", tensors, config | {"tie_word_embeddings": True})
    assert agrees(folder, tmp_path / "out", model)
    assert "the head is kept" in caplog.text and "tie_word_embeddings" in caplog.text
    told = json.loads((tmp_path / "out/conversion.json").read_text())
    assert told["ignored"] == {}
    assert "logits" in verify(tmp_path / "out", Source(folder))


def test_a_head_that_is_the_embedding_is_left_out(llama, tmp_path):
    _, tensors, config = llama
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert spec_of(
        written(tmp_path / "a", same, config | {"tie_word_embeddings": True})
    ).sizes.tie_head
    spec = spec_of(written(tmp_path / "b", same, config))
    assert not spec.sizes.tie_head  # it is said to be one of its own


def test_a_lost_head_is_not_invented(llama, tmp_path):
    _, tensors, config = llama
    headless = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    for said in (config, {k: v for k, v in config.items() if k != "tie_word_embeddings"}):
        with pytest.raises(CheckpointError, match=r"no LM head \(lm_head.weight\).*was lost"):
            spec_of(written(tmp_path / "a", headless, said))
    alone = {k.removeprefix("model."): v for k, v in headless.items()}
    with pytest.raises(CheckpointError, match="no LM head"):
        spec_of(written(tmp_path / "b", alone, config))
    tied = spec_of(written(tmp_path / "c", alone, config | {"tie_word_embeddings": True}))
    assert tied.sizes.tie_head


@pytest.mark.parametrize(
    "kind", "granite smollm3 qwen3 gemma gemma2 phi3 olmo cohere mixtral whoever".split()
)
def test_architectures_of_the_same_names_are_refused_by_name(llama, tmp_path, kind):
    _, tensors, config = llama
    config = {k: v for k, v in config.items() if k != "architectures"} | {"model_type": kind}
    with pytest.raises(CheckpointError, match=f"is of model_type '{kind}'.*llama, internlm2, mis"):
        spec_of(written(tmp_path, tensors, config))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "mistral", "max_position_embeddings": 131072},  # 4096 by default
        {"sliding_window": 8},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 24},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"no_rope_layers": [1, 0]},
        {"partial_rotary_factor": 0.5},
        {"embedding_multiplier": 12.0},
        {"logits_scaling": 8.0},
        {"residual_multiplier": 0.22},
        {"attention_multiplier": 0.015625},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"query_pre_attn_scalar": 256},
        {"use_qk_norm": True},
        {"num_local_experts": 8},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 8, 8]}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rms_norm_eps": "small"},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 4},
        {"hidden_size": 64},
        {"num_hidden_layers": 1},
        {"vocab_size": 128},
        {"architectures": ["GraniteForCausalLM"]},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
    ],
    ids=str,
)
def test_a_field_that_changes_what_is_computed_is_named(llama, tmp_path, changes):
    _, tensors, config = llama
    config = {k: v for k, v in config.items() if k != "architectures"} | changes
    name = next(k for k in changes if k != "model_type")
    if "sliding_window" in changes or changes.get("model_type") == "mistral":
        name = "sliding_window"
    with pytest.raises(CheckpointError, match=name if name != "num_attention_heads" else "heads"):
        spec_of(written(tmp_path, tensors, config))


def test_fields_that_change_nothing_are_passed(llama, tmp_path, caplog):
    _, tensors, config = llama
    dull = {
        "sliding_window": None, "layer_types": ["full_attention"] * 2, "head_dim": 12,
        "attention_dropout": 0.1, "pretraining_tp": 2, "embedding_multiplier": 1.0,
        "no_rope_layers": [1, 1], "final_logit_softcapping": None, "use_qk_norm": False,
        "quantization_config": None, "temperature": 1.0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    before = spec_of(written(tmp_path / "a", tensors, config)).sizes
    assert spec_of(written(tmp_path / "b", tensors, config | dull)).sizes == before
    spec_of(written(tmp_path / "c", tensors, config | {"favourite_color": "blue"}))
    assert "favourite_color 'blue', which is not read" in caplog.text


def test_a_window_that_nothing_leaves_and_an_unused_one(llama, tmp_path):
    _, tensors, config = llama
    config = {k: v for k, v in config.items() if k != "architectures"}
    mistral = config | {"model_type": "mistral", "sliding_window": 96}
    assert spec_of(written(tmp_path / "a", tensors, mistral)).sizes.max_positions == 96
    assert spec_of(written(tmp_path / "b", tensors, mistral | {"sliding_window": None}))


def test_what_is_left_out_is_the_default_of_its_class(llama, tmp_path):
    """Janus's language_config says neither rope_theta nor epsilon; Janus-Pro-7B's no heads."""
    model, tensors, _ = llama
    part = {k: v for k, v in SIZES.items() if k not in ("attn_implementation",)}
    part |= {"model_type": "llama"}
    janus = {"model_type": "multi_modality", "language_config": part}
    inside = {f"language_model.{k}": v for k, v in tensors.items()}
    folder = written(tmp_path / "a", inside, janus)
    assert agrees(folder, tmp_path / "out", model)
    sizes = spec_of(folder).sizes
    assert (sizes.rms_norm_eps, sizes.rope_theta) == (1e-6, 10000)
    del part["num_attention_heads"], part["num_key_value_heads"]
    with pytest.raises(CheckpointError, match="num_attention_heads is 32 by the default of llama"):
        spec_of(written(tmp_path / "a", inside, janus))


def test_without_a_config_json_nothing_is_guessed(llama, tmp_path):
    _, tensors, config = llama
    with pytest.raises(CheckpointError, match=r"no config.json beside the weights.*model_type"):
        spec_of(written(tmp_path / "a", tensors))
    unsaid = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with pytest.raises(CheckpointError, match="config.json says no model_type"):
        spec_of(written(tmp_path / "b", tensors, unsaid))
    with pytest.raises(CheckpointError, match="config.json says internlm2, the tensors"):
        spec_of(written(tmp_path / "c", tensors, unsaid | {"model_type": "internlm2"}))


def test_internlm2_with_biases_is_refused_and_its_defaults_are_its_own(llama, tmp_path):
    _, tensors, config = llama
    named = to_internlm2(tensors)
    config = {"model_type": "internlm2", "num_attention_heads": 4, "bias": False}
    sizes = spec_of(written(tmp_path / "a", named, config)).sizes
    assert (sizes.rms_norm_eps, sizes.rope_theta, sizes.max_positions) == (1e-6, 10000, 2048)
    with pytest.raises(CheckpointError, match="bias True: InternLM2 with biases"):
        spec_of(written(tmp_path / "b", named, config | {"bias": True}))


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [False, True])
def test_qwen2_with_its_biases(qwen2, tmp_path, decoding):
    model, tensors, config = qwen2
    folder = written(tmp_path / "a", tensors, config)
    assert agrees(folder, tmp_path / "out", model, decoding)
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["attention_bias"] is True
    assert "layers.attention.q_proj.bias" in read_weights(tmp_path / "out")
    if not decoding:
        assert "transformers' Qwen2" in verify(tmp_path / "out", Source(folder))


def test_qwen2_inside_internvl_and_back_under_its_own_names(qwen2, tmp_path):
    from weights_convert.to_hf import internlm2_tensors

    _, tensors, config = qwen2
    parts = {f"language_model.{k}": v for k, v in tensors.items()}
    parts |= {"vision_model.x": np.zeros(2, np.float32), "mlp1.0.weight": np.zeros(2, np.float32)}
    whole = {"model_type": "internvl_chat", "llm_config": config, "vision_config": {}}
    source = Source(written(tmp_path / "a", parts, whole))
    spec = internlm2.conversion_spec(source)
    write_folder(source, spec, tmp_path / "out")
    back = internlm2_tensors(read_weights(tmp_path / "out"), spec.sizes)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.slow
def test_names_of_a_module_as_transformers_has_them_now(llama, tmp_path):
    """`model.language_model.layers`, the head apart; and a body alone with its head tied."""
    model, tensors, config = llama
    named = {k.replace("model.", "model.language_model.", 1): v for k, v in tensors.items()}
    named |= {"model.vision_tower.x": np.zeros(2, np.float32)}
    whole = {"model_type": "llava", "text_config": config}
    folder = written(tmp_path / "a", named, whole)
    assert agrees(folder, tmp_path / "out", model)
    assert "transformers' Llama" in verify(tmp_path / "out", Source(folder))
    saved = {f"language_model.{k}": v for k, v in tensors.items()}
    untold = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    folder = written(tmp_path / "b", saved, {"model_type": "llava", "text_config": untold})
    assert agrees(folder, tmp_path / "out", model)


def test_llavas_own_checkpoints_keep_the_tower_in_the_body(llama, tmp_path):
    model, tensors, config = llama
    more = {"model.mm_projector.0.weight": np.zeros((2, 2), np.float32)}
    more["model.vision_tower.vision_tower.x"] = np.zeros(2, np.float32)
    config = config | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    config |= {"mm_hidden_size": 64, "mm_vision_select_layer": -2, "use_mm_proj": True}
    folder = written(tmp_path / "a", tensors | more, config)
    assert agrees(folder, tmp_path / "out", model)
    assert "transformers' Llama" in verify(tmp_path / "out", Source(folder))


def test_verify_asks_config_json_and_not_the_converter(llama, tmp_path, monkeypatch):
    """A converter that overlooked an epsilon is found out."""
    _, tensors, config = llama
    folder = written(tmp_path / "a", tensors, config | {"rms_norm_eps": 0.1})
    module_of(folder, tmp_path / "out")
    assert verify(tmp_path / "out", Source(folder))
    wrong = json.loads((tmp_path / "out/config.json").read_text()) | {"rms_norm_eps": 1e-6}
    (tmp_path / "out/config.json").write_text(json.dumps(wrong))
    right = internlm2._sizes

    def misread(source, place):
        sizes, kind = right(source, place)
        return type(sizes)(**{**vars(sizes), "rms_norm_eps": 1e-6}), kind

    monkeypatch.setattr(internlm2, "_sizes", misread)
    with pytest.raises(CheckpointError, match="does not compute what"):
        verify(tmp_path / "out", Source(folder))


ODD = [None, True, -1, 0, 1e400, float("nan"), 10**400, "x", [], [[]], {}, {"a": {}}, "llama"]


def test_odd_values_end_in_sentences(llama, tmp_path):
    _, tensors, config = llama
    whole = {"model_type": "llava", "text_config": config}
    folder = written(tmp_path, tensors, config)
    changed = [config | {name: value} for name in config for value in ODD]
    changed += [
        {**config, "rope_parameters": {"rope_type": k, n: v}}
        for k in ("linear", "dynamic", {})
        for n in ("factor", "rope_theta")
        for v in ODD
    ]
    changed += [whole | {name: value} for name in whole for value in ODD]
    refused = 0
    for said in changed:
        (folder / "config.json").write_text(json.dumps(said))
        try:
            read(Source(folder), 48, 2, 56, 130)
        except CheckpointError:
            refused += 1
    assert refused > len(changed) / 4


def test_metas_own_names_are_named(tmp_path):
    save_file(
        {"layers.0.attention.wq.weight": np.zeros((2, 2), np.float32)},
        tmp_path / "consolidated.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"Meta's own names; take the repository"):
        spec_of(tmp_path)
