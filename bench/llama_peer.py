"""llama.cpp through its Python binding: a contender of the side-by-side benchmark on a CPU.

Its file is made of the weights that the others have, without a vocabulary.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vitrail.runtime.layers.kv_cache import BLOCK_SIZE
from vitrail.runtime.models.decoder import Decoder

PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # module -> what to install for it


class LlamaPeer:
    """decoder: of Qwen2's architecture; kind: of its matrices, e.g. Q8_0; tokens: (n,) int64, the prompt; folder: for
    the file.
    """

    def __init__(self, decoder: Decoder, kind: str, tokens: Tensor, folder: Path) -> None:
        path = folder / f"{kind}.gguf"
        write_gguf(decoder, path, kind)
        self.tokens: list[int] = tokens.tolist()
        threads = torch.get_num_threads()
        self.library: Any = import_module("llama_cpp")
        self.model = self.library.Llama(
            str(path),
            n_ctx=len(self.tokens) + BLOCK_SIZE,
            n_batch=len(self.tokens),
            n_ubatch=len(self.tokens),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def prefill(self) -> Tensor:
        """The logits (1, vocab) behind the prompt."""
        self.model.n_tokens = 0  # what stands behind is thrown away by `eval`
        self.model.eval(self.tokens)
        return self._logits()

    def decode(self) -> Tensor:
        """The logits (1, vocab) behind one more token."""
        if self.model.n_tokens < len(self.tokens):
            self.prefill()
        self.model.n_tokens = len(self.tokens)
        self.model.eval(self.tokens[:1])
        return self._logits()

    def _logits(self) -> Tensor:
        row = self.library.llama_get_logits_ith(self.model.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(row, (1, self.model.n_vocab())).copy())


def write_gguf(decoder: Decoder, path: Path, kind: str) -> None:
    """The decoder, of Qwen2's architecture, as a llama.cpp file without a vocabulary; matrices in `kind`."""
    gguf: Any = import_module("gguf")
    config = decoder.config
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in llama_tensors(decoder).items():
        values = tensor.float().numpy()
        if tensor.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights by llama.cpp's names."""
    config = decoder.config
    rows = (config.num_attention_heads * config.head_dim, *[config.num_key_value_heads * config.head_dim] * 2)
    tensors: dict[str, Tensor] = {
        "token_embd.weight": decoder.embedding,
        "output_norm.weight": decoder.norm.weight,
        "output.weight": cast(Tensor, decoder.head.weight),
    }
    names = {
        "attention_norm.weight": "attn_norm.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "attention.o.weight": "attn_output.weight",
        "mlp.down.weight": "ffn_down.weight",
    }
    for index, layer in enumerate(decoder.layers):
        for name, parameter in layer.named_parameters():
            kind = name.rpartition(".")[2]
            if name.startswith("attention.qkv"):
                parts = {
                    f"attn_{letter}.{kind}": part for letter, part in zip("qkv", parameter.split(rows), strict=True)
                }
            elif name.startswith("mlp.gate_up"):
                parts = {
                    f"ffn_{key}.{kind}": part for key, part in zip(("gate", "up"), parameter.chunk(2), strict=True)
                }
            else:
                parts = {names[name]: parameter}
            tensors |= {f"blk.{index}.{key}": part.detach() for key, part in parts.items()}
    return tensors
