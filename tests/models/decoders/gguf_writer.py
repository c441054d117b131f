"""Writes decoders as GGUF files, as llama.cpp's converter does."""

import numpy as np

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permuted(weights, heads):
    """As ``LlamaModel.permute`` of llama.cpp's converter has it."""
    d = weights.shape[0] // heads
    return weights.reshape(heads, 2, d // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def gguf_name(name):
    """llama.cpp's name of a tensor, given Hugging Face's."""
    module, leaf = name.removesuffix(".weight"), ".weight"
    if module in _OUTSIDE:
        return _OUTSIDE[module] + leaf
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}{leaf}"


def write_gguf(path, tensors, *, heads, kv_heads, rope_theta=10000.0, architecture="llama", kind=None, tokens=()):
    """Writes a file.

    Args:
        path: The file.
        tensors: By Hugging Face's names, in the layout of its files.
        heads: Of queries.
        kv_heads: Of keys and values.
        rope_theta: Of rotary positions.
        architecture: What the file calls it.
        kind: A ``gguf.GGMLQuantizationType`` for matrices.
        tokens: Of a byte-level vocabulary: these are control tokens, behind them come the bytes, and one merge.
    """
    import gguf
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name))
    writer.add_embedding_length(tensors["model.norm.weight"].size)
    writer.add_feed_forward_length(tensors["model.layers.0.mlp.up_proj.weight"].shape[0])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    if tokens:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*tokens, *alphabet, "th"])
        writer.add_token_types([3] * len(tokens) + [1] * (len(alphabet) + 1))
        writer.add_token_merges(["t h"])
        writer.add_eos_token_id(len(tokens) - 1)
    for name, value in tensors.items():
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            value = permuted(value, count) if name.endswith(f"{projection}.weight") else value
        value = np.ascontiguousarray(value, np.float32)
        if kind is not None and value.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
