"""VQ tokenizer as transformers names Janus's (`JanusVQVAE`)."""

from __future__ import annotations

from weights_convert.convert import Rule, conv, same


def rules() -> tuple[Rule, ...]:
    """The table; pieces that encoder and decoder share are written once."""
    renames = {
        r"levels\.(\d+)\.blocks\.(\d+)\.(norm1|conv1|norm2|conv2)": r"{side}.\1.block.\2.\3",
        r"levels\.(\d+)\.blocks\.(\d+)\.shortcut": r"{side}.\1.block.\2.nin_shortcut",
        r"levels\.(\d+)\.attentions\.(\d+)\.norm": r"{side}.\1.attn.\2.norm",
        r"levels\.(\d+)\.attentions\.(\d+)\.([qkv])_proj": r"{side}.\1.attn.\2.\3",
        r"levels\.(\d+)\.attentions\.(\d+)\.o_proj": r"{side}.\1.attn.\2.proj_out",
        r"downsamples\.(\d+)": r"down.\1.downsample.conv",
        r"upsamples\.(\d+)": r"up.\1.upsample.conv",
        r"middle\.block([12])\.(norm1|conv1|norm2|conv2)": r"mid.block_\1.\2",
        r"middle\.attention\.norm": r"mid.attn_1.norm",
        r"middle\.attention\.([qkv])_proj": r"mid.attn_1.\1",
        r"middle\.attention\.o_proj": r"mid.attn_1.proj_out",
        r"(conv_in|norm_out|conv_out)": r"\1",
    }
    table = [Rule(r"codebook", "quantize.embedding.weight", same)]
    for half, side in (("encoder", "down"), ("decoder", "up")):
        pairs = {
            rf"{half}\.{path}": f"{half}." + key.replace("{side}", side)
            for path, key in renames.items()
        }
        outside = "quant_conv" if half == "encoder" else "post_quant_conv"
        pairs[rf"{half}\.({outside})"] = r"\1"
        for path, key in pairs.items():
            table.append(Rule(path + r"\.kernel", key + ".weight", conv))
            table.append(Rule(path + r"\.scale", key + ".weight", same))
            table.append(Rule(path + r"\.bias", key + ".bias", same))
    return tuple(table)


RULES = rules()
IGNORED: dict[str, str] = {}
