"""A stand-in for llama.cpp's converter that knows tiny Llamas: MODEL --outfile FILE --outtype f32.

Given $FORGETS, it writes zeros for what the blocks' MLPs put out. Given $FAILS, it fails.
"""

import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def name_of(tensor: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` is `blk.0.ffn_up.weight` in a GGUF file."""
    words = tensor.removeprefix("model.").removesuffix(".weight").split(".")
    if words[0] != "layers":
        return f"{NAMES[words[0]]}.weight"
    return f"blk.{words[1]}.{NAMES['.'.join(words[2:])]}.weight"


def rotated(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head paired as llama.cpp pairs them: neighbours, not halves."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def main(model: Path, target: str) -> None:
    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    for tensor, read in load_file(model / "model.safetensors").items():
        projection = tensor.split(".")[-2]
        weights = rotated(read, heads[projection]) if projection in heads else read
        if projection == "down_proj" and "FORGETS" in os.environ:
            weights = np.zeros_like(weights)
        writer.add_tensor(name_of(tensor), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if "FAILS" in os.environ:
        sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
    assert sys.argv[2] == "--outfile"
    assert sys.argv[4:] == ["--outtype", "f32"]
    main(Path(sys.argv[1]), sys.argv[3])
