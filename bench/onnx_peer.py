"""onnxruntime with int8 weights of a transformers decoder: a contender of the side-by-side benchmark on a CPU.

transformers' model is exported twice by PyTorch's own exporter, for a prompt and for one token behind it, with the
lengths fixed, which is the best case, and quantised by onnxruntime's own tool: weights by output, activations while it
runs. Keys and values that a token adds are computed and not fetched.

A model of half a billion parameters takes minutes to prepare: that tool quantises one output after the other in Python.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Step(nn.Module):
    """Tokens (1, n) behind keys and values (1, heads, past, head_dim) of each layer -> logits, all keys and values."""

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.decoder, self.head = peer.model.language_model, peer.lm_head

    def forward(self, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = import_module("transformers").DynamicCache(config=self.decoder.config)
        for index in range(0, len(past), 2):
            cache.update(past[index], past[index + 1], index // 2)
        hidden = self.decoder(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        return (self.head(hidden[:, -1]), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class OnnxPeer:
    """peer: transformers' model in fp32, which is not kept; tokens: (n,) int64, the prompt; folder: for files."""

    def __init__(self, peer: Any, tokens: Tensor, folder: Path) -> None:
        step = _Step(peer).eval()
        self._prompt, self._token = {"tokens": tokens[None].numpy()}, {"tokens": tokens[None, :1].numpy()}
        past = step(tokens[None])[1:]
        self._token |= {f"past_{index}": tensor.contiguous().numpy() for index, tensor in enumerate(past)}
        self._prefill = _session(step, (tokens[None],), folder / "prefill")
        self._decode = _session(step, (tokens[None, :1], *past), folder / "decode")

    def prefill(self) -> Tensor:
        """The logits (1, vocab) behind the prompt."""
        return _run(self._prefill, self._prompt)

    def decode(self) -> Tensor:
        """The logits (1, vocab) behind one more token."""
        return _run(self._decode, self._token)


def _run(session: Any, inputs: dict[str, Any]) -> Tensor:
    return torch.from_numpy(cast(Any, session.run(["logits"], inputs)[0]))


def _session(step: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Any:
    """A session of the model for inputs of these shapes, in int8. Takes the model's size in files while it is made."""
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    quantization = import_module("onnxruntime.quantization")
    folder.mkdir()
    plain, quantised = folder / "plain.onnx", folder / "int8.onnx"
    outputs = ["logits", *(f"present_{index}" for index in range(2 * len(cast(Any, step).decoder.layers)))]
    names = ["tokens", *(f"past_{index}" for index in range(len(inputs) - 1))]
    program = torch.onnx.export(step, inputs, input_names=names, output_names=outputs, dynamo=True, verbose=False)
    cast(Any, program).save(plain, external_data=True)
    model = onnx.load(plain, load_external_data=False)
    del model.graph.value_info[:]  # shapes that the tool, which turns matrices over, would trip on
    onnx.save(model, plain)
    quantization.quantize_dynamic(
        plain,
        quantised,
        per_channel=True,
        reduce_range=True,  # as its guide says for processors without VNNI: sums of pairs would saturate
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(quantised, options, providers=["CPUExecutionProvider"])
    for file in folder.iterdir():
        if file.name.startswith("plain"):
            file.unlink()
    return session
