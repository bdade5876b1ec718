"""Adapters (LoRA and its kin) in or beside a checkpoint: what they change must be merged first."""

from __future__ import annotations

import re

from htfa_jax.errors import CheckpointError
from weights_convert.convert import Tensors
from weights_convert.source import Source

# Names of PEFT's, InternVL's, diffusers' and kohya's adapter tensors.
_TENSOR = re.compile(
    r"(^|[._])lora([._]|$)|\.base_layer\.|\.modules_to_save\.|ia3_l|hada_w|\.lokr_|\.oft_[rs]|"
    r"vera_lambda|\.boft_|\.randlora_|prompt_embeddings|prompt_encoder\.",
    re.IGNORECASE,
)
_FILE = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)|.*lora.*\.safetensors")


def refuse_adapters(source: Tensors) -> None:
    """Raises CheckpointError for a checkpoint with adapters that are not merged into its weights.

    Without them the weights would be those of before the training that the adapters hold.
    """
    tensors = [key for key in source.keys if _TENSOR.search(key)]
    folder = source.files.names if isinstance(source, Source) and not source.is_file else []
    files = [name for name in folder if _FILE.fullmatch(name)]
    if not tensors and not files:
        return
    name = getattr(source, "name", "the checkpoint")
    merge = (
        "merge it into the weights first (PEFT: PeftModel.from_pretrained(base, adapter)"
        ".merge_and_unload(), then save_pretrained; InternVL: tools/merge_lora.py) and convert "
        "the merged checkpoint"
    )
    if tensors and len(tensors) == len(list(source.keys)):
        raise CheckpointError(
            f"{name} is a LoRA adapter alone ({tensors[0]}, ...), without the model that it "
            f"changes: {merge}"
        )
    if tensors:
        raise CheckpointError(
            f"{name} holds a LoRA adapter beside its weights ({len(tensors)} tensors, "
            f"{tensors[0]} is one): {merge}"
        )
    raise CheckpointError(
        f"{name} holds a LoRA adapter beside its weights ({', '.join(files)}), which would "
        f"be left out: {merge}. If the weights are meant without it, move these files away"
    )
