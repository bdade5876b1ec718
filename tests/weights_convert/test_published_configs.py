"""config.json as published checkpoints have it, with all that transformers of then wrote there."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from weights_convert import language_model, vision_tower
from weights_convert.source import Source

# What transformers 4 writes into the part of a model: how text was generated, and more.
DULL = {
    "_name_or_path": "x/y", "add_cross_attention": False, "attn_implementation": "eager",
    "bad_words_ids": None, "begin_suppress_tokens": None, "bos_token_id": 1,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2,
    "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02,
    "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": 2, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
    "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
    "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "bfloat16",
    "torchscript": False, "transformers_version": "4.37.2", "typical_p": 1.0,
    "use_bfloat16": True, "use_cache": True, "pretraining_tp": 1,
}  # fmt: skip
INTERNLM2 = {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False,
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 32768,
    "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 92544,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
    "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False,
    "use_mrope": False, "tie_word_embeddings": False, "vocab_size": 151674,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768, "head_dim": 128,
}  # fmt: skip
JANUS = {
    "architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality",
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
    "language_config": {
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 16384,
        "model_type": "llama", "num_attention_heads": 16, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "torch_dtype": "bfloat16", "vocab_size": 102400,
    },
    "vision_config": {
        "cls": "CLIPVisionTower", "model_type": "vision",
        "params": {"image_size": 384, "model_name": "siglip_large_patch16_384",
                   "select_feature": "same", "select_layer": -1},
    },
}  # fmt: skip
PRO = {
    "max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30,
    "torch_dtype": "bfloat16", "vocab_size": 102400,
}  # fmt: skip
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
    "torch_dtype": "float16", "vocab_size": 32064,
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "tune_mm_mlp_adapter": False,
    "tokenizer_padding_side": "right", "use_mm_proj": True, "vocab_size": 32000,
}  # fmt: skip


def source(tmp_path, config):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Source(tmp_path)


def inside(part):
    return {"model_type": "internvl_chat", "llm_config": part, "vision_config": {}}


@pytest.mark.parametrize(
    "config,sizes,expected",
    [
        (INTERNLM2 | DULL, (2048, 24, 8192, 92544), ("internlm2", 16, 1e6, 1e-5, 32768)),
        (inside(INTERNLM2 | DULL), (2048, 24, 8192, 92544), ("internlm2", 16, 1e6, 1e-5, 32768)),
        (inside(QWEN2 | DULL), (896, 24, 4864, 151674), ("qwen2", 14, 1e6, 1e-6, 32768)),
        (QWEN2 | DULL, (896, 24, 4864, 151674), ("qwen2", 14, 1e6, 1e-6, 32768)),
        (MISTRAL | DULL, (4096, 32, 14336, 32768), ("mistral", 32, 1e6, 1e-5, 32768)),
        (JANUS, (2048, 24, 5632, 102400), ("llama", 16, 1e4, 1e-6, 16384)),
        (JANUS | {"language_config": PRO}, (4096, 30, 11008, 102400),
         ("llama", 32, 1e4, 1e-6, 16384)),
        ({"model_type": "llava", "text_config": VICUNA}, (4096, 32, 11008, 32064),
         ("llama", 32, 1e4, 1e-5, 4096)),
        (LLAVA, (4096, 32, 11008, 32000), ("llama", 32, 1e4, 1e-5, 4096)),
    ],
    ids="InternLM2 InternVL2 InternVL3 Qwen2.5 Mistral Janus Janus-Pro LLaVA LLaVA's-own".split(),
)  # fmt: skip
def test_language_models(tmp_path, config, sizes, expected, caplog):
    told = language_model.read(source(tmp_path, config), *sizes)
    found = (told.kind, told.num_heads, told.rope_theta, told.rms_norm_eps, told.max_positions)
    assert found == expected and told.rope_factor == 1 and not told.tied
    assert not caplog.records


SO400M = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "patch_size": 14,
    "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
}  # fmt: skip
SO400M_SIZES = {
    "hidden_size": 1152, "image_size": 378, "intermediate_size": 4304, "patch_size": 14,
    "num_hidden_layers": 27,
}  # fmt: skip
BASE_SIZES = {
    "hidden_size": 768, "image_size": 224, "intermediate_size": 3072, "patch_size": 16,
    "num_hidden_layers": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    "config,sizes,heads",
    [
        ({"model_type": "siglip", "vision_config": SO400M}, SO400M_SIZES, 16),
        ({"model_type": "siglip", "vision_config": SO400M | DULL | {"vision_use_head": True}},
         SO400M_SIZES, 16),
        ({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
         BASE_SIZES, 12),
        ({"model_type": "paligemma", "vision_config": SO400M | {
            "num_image_tokens": 256, "projection_dim": 2048, "vision_use_head": False}},
         SO400M_SIZES, 16),
    ],
    ids="SigLIP with-all SigLIP-base PaliGemma".split(),
)  # fmt: skip
def test_vision_towers(tmp_path, config, sizes, heads):
    told = vision_tower.read_transformers(source(tmp_path, config), sizes)
    assert (told.num_heads, told.hidden_act) == (heads, "gelu_pytorch_tanh")
    assert told.layer_norm_eps == 1e-6


def test_januss_tower(tmp_path):
    told = vision_tower.read_janus(source(tmp_path, JANUS), 1024)
    assert (told.num_heads, told.hidden_act, told.layer_norm_eps) == (16, "gelu", 1e-6)
