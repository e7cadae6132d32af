"""A language half split over ranks: which rows and columns each holds, how they are loaded, and what they add up to.

Ranks are threads here, which meet as processes do, by gloo.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.runtime import weights
from vitrail.runtime.config import load_config, parse_config
from vitrail.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from vitrail.runtime.layers.parallel import WHOLE, Part, Share, TensorParallel, vocabulary_share
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.decoder import config_of, shares_of
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.quantization.config import METHODS, QuantizationConfig
from vitrail.runtime.quantization.formats.detect import stored_format
from vitrail.runtime.quantization.methods import WEIGHTS, quantize_weight
from vitrail.runtime.quantization.weight import QuantizedWeight
from vitrail.runtime.weights import build_model, load_model

from ...random_checkpoints import (
    ARCHITECTURES,
    chat_config,
    contrastive_config,
    llava_config,
    random_weights,
    write_checkpoint,
)
from ..quantization.test_foreign_checkpoints import FORMATS, quantised

CPU = torch.device("cpu")
# Inputs that groups of 16 and nf4's blocks of 64 divide, also by halves.
WIDE = {"hidden_size": 128, "intermediate_size": 128}
IDS = torch.tensor([3, 508, 1, 254, 255, 256, 257, 77, 2, 400])
pytestmark = pytest.mark.filterwarnings("ignore:[0-9]+ linear layers are rounded to nearest")


class Alone:
    """A group whose ranks never meet."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def load(config: dict[str, Any], part: Part = WHOLE, parallel: TensorParallel | None = None, **keywords: Any) -> Any:
    """The model, or a part of it, of random weights."""
    if part.size > 1 and parallel is None:
        parallel = TensorParallel(Alone(part.rank, part.size))
    tensors = keywords.pop("tensors", None) or random_weights(config)
    return build_model(
        parse_config(config),
        tensors.items(),
        dtype=torch.float32,
        device=CPU,
        part=part,
        parallel=parallel,
        stored=stored_format(config),
        **keywords,
    )


def values_of(model: InternVLModel) -> dict[str, Tensor]:
    """All parameters, those that are quantised by their meaning."""
    found = dict(model.named_parameters())
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    return found | {name: module.dequantize() for name, module in quantized.items()}


def share_in(value: Tensor, share: Share | None) -> Tensor:
    if share is None:
        return value
    if share.columns is not None:
        return value[:, list(share.columns)]
    return value[[row for rows in share.rows for row in rows]]


def assert_split(config: dict[str, Any], size: int, **keywords: Any) -> None:
    """Each rank's parameters are its shares of the whole's, and nothing else."""
    whole = {name: value for name, value in values_of(load(config, **keywords)).items() if name.startswith("language")}
    for rank in range(size):
        part = Part(vision=False, rank=rank, size=size)
        shares = shares_of(parse_config(config).llm, part)
        held = values_of(load(config, part, **keywords))
        assert held.keys() == whole.keys()
        for name, value in held.items():
            share = shares.get(name.removeprefix("language_model."))
            assert torch.equal(value, share_in(whole[name], share)), name


def together(size: int, run: Any, **keywords: Any) -> list[Any]:
    """What `run` gives at each rank, as threads."""
    store = dist.HashStore()

    def rank(number: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=30)
        group = dist.ProcessGroupGloo(store, number, size, options)
        with torch.inference_mode():
            return run(TensorParallel(group, **keywords))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank, range(size)))


# --- who holds what ---


@st.composite
def splits(draw: st.DrawFn) -> tuple[Any, int]:
    """A decoder's sizes, and how many ranks divide them."""
    size, kv_heads, group, wide = (draw(st.integers(1, most)) for most in (8, 4, 5, 9))
    config = replace(
        parse_config(chat_config()).llm,
        vocab_size=draw(st.integers(8 * size * size, 5000)),
        num_key_value_heads=size * kv_heads,
        num_attention_heads=size * kv_heads * group,
        head_dim=2 * draw(st.integers(1, 4)),
        intermediate_size=size * wide,
        num_hidden_layers=1,
    )
    return config, size


@settings(max_examples=60, deadline=None)
@given(splits())
def test_every_row_and_column_falls_to_exactly_one_rank(split: tuple[Any, int]) -> None:
    config, size = split
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    lengths = {
        "layers.0.attention.qkv.weight": heads * config.head_dim,
        "layers.0.attention.qkv.bias": heads * config.head_dim,
        "layers.0.attention.o.weight": config.num_attention_heads * config.head_dim,
        "layers.0.mlp.gate_up.weight": 2 * config.intermediate_size,
        "layers.0.mlp.down.weight": config.intermediate_size,
        "embedding": config.vocab_size,
        "head.weight": config.vocab_size,
    }
    ranks = [shares_of(config, Part(rank=rank, size=size)) for rank in range(size)]
    assert all(shares.keys() == lengths.keys() for shares in ranks)
    for name, length in lengths.items():
        stretches = [rows for shares in ranks for rows in shares[name].rows or (shares[name].columns,)]
        assert sorted(row for rows in stretches for row in rows) == list(range(length))
    for rank, shares in enumerate(ranks):
        share = config_of(config, Part(rank=rank, size=size))
        q, k, v = shares["layers.0.attention.qkv.weight"].rows
        assert (len(q), len(k)) == (
            share.num_attention_heads * share.head_dim,
            share.num_key_value_heads * share.head_dim,
        )
        # Query heads are where the KV head that they attend to is, and their outputs are where they are.
        kv_heads = {(row - k.start) // config.head_dim + rank * share.num_key_value_heads for row in k}
        assert {row // config.head_dim // config.queries_per_kv_head for row in q} == kv_heads
        assert shares["layers.0.attention.o.weight"].columns == q
        assert v.start - k.start == config.num_key_value_heads * config.head_dim
        assert len(shares["embedding"].rows[0]) == share.vocab_size


def test_a_vocabulary_is_shared_in_multiples_of_8_but_for_the_last() -> None:
    shares = [vocabulary_share(92553, rank, 8) for rank in range(8)]
    assert [len(share) for share in shares] == [11576] * 7 + [11521]
    assert shares[-1].stop == 92553


@pytest.mark.parametrize("rows", [(range(4, 8), range(12, 14), range(20, 22))])
def test_the_rows_of_a_piece_go_where_those_of_the_pieces_before_it_end(rows: tuple[range, ...]) -> None:
    share, whole = Share(rows), torch.arange(24)
    expected = torch.tensor([row for stretch in rows for row in stretch])
    found = torch.zeros(len(expected), dtype=torch.int64)
    for start, count in ((0, 5), (5, 8), (13, 11)):  # no stretch ends where a piece does
        kept, place = share.rows_within(start, count)
        found[place : place + len(kept)] = whole[start : start + count][kept]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (2, -1), (0, 0)])
def test_a_part_is_one_of_those_there_are(size: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not one of {size}"):
        Part(rank=rank, size=size)
    with pytest.raises(ValueError, match="one of its halves"):
        Part(vision=False, language=False)


@pytest.mark.parametrize(
    ("llm", "size", "message"),
    [
        ({}, 3, "tensor_parallel_size=3 does not divide the language half's num_key_value_heads 2; .*: 1, 2"),
        (
            {"intermediate_size": 114, "num_key_value_heads": 4},
            4,
            "tensor_parallel_size=4 does not divide the language half's intermediate_size 114; .*: 1, 2",
        ),
        ({"vocab_size": 8}, 2, "tensor_parallel_size=2 is too much for a vocabulary of 8"),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused_with_the_numbers(
    llm: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(chat_config(llm=llm), Part(size=size))


def test_a_share_needs_the_group_of_its_rank() -> None:
    with pytest.raises(ValueError, match="rank 1 of 2 needs a TensorParallel of its own"):
        InternVLModel(parse_config(chat_config()), part=Part(rank=1, size=2), parallel=TensorParallel(Alone(0, 2)))


# --- loading ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_load_their_shares_of_every_architecture(architecture: str) -> None:
    assert_split(chat_config(architecture), 2)
    assert_split(chat_config(architecture, llm={"num_key_value_heads": 4}), 4)


def test_ranks_load_tied_weights() -> None:
    tied = chat_config("Qwen2ForCausalLM", llm={"tie_word_embeddings": True})
    assert_split(tied, 2)
    model = load(tied, Part(vision=False, rank=1, size=2))
    assert model.language_model.head.weight is model.language_model.embedding


@pytest.mark.parametrize("method", METHODS)
def test_ranks_round_weights_to_what_the_whole_would_have(method: str) -> None:
    if method in ("nf4", "bnb-int8"):
        pytest.importorskip("bitsandbytes")
    for symmetric in (True, False) if method == "int4" else (True,):
        quantization = QuantizationConfig(llm=method, group_size=16, symmetric=symmetric)
        assert_split(chat_config(llm=WIDE), 2, quantization=quantization, pack=False)


@pytest.mark.parametrize("name", [name for name in FORMATS if "act-order" not in name])
@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
def test_ranks_load_their_shares_of_what_others_quantised(name: str, architecture: str) -> None:
    if "bitsandbytes" in name:
        pytest.importorskip("bitsandbytes")
    section, pack, _ = FORMATS[name]
    config, tensors, _ = quantised(chat_config(architecture, llm=WIDE), section, pack)
    assert_split(config, 2, tensors=tensors, pack=False)


@pytest.mark.parametrize("name", [name for name in FORMATS if "act-order" in name])
def test_groups_from_all_over_the_inputs_are_refused(name: str) -> None:
    section, pack, _ = FORMATS[name]
    config, tensors, _ = quantised(chat_config("LlamaForCausalLM", llm=WIDE), section, pack)
    message = (
        r"(o|down)_proj, split over 2 ranks: groups of 16 of its 128 inputs, ordered .*\(act-order\), cannot be cut"
    )
    with pytest.raises(ConfigError, match=message):
        load(config, Part(vision=False, size=2), tensors=tensors)


def test_groups_that_do_not_divide_a_share_are_refused() -> None:
    config = chat_config(llm={"num_key_value_heads": 4, "intermediate_size": 128})
    with pytest.raises(
        ConfigError, match=r"attention\.o: groups of 32 do not divide its 16 inputs; group_size=16 would"
    ):
        load(config, Part(size=4), quantization=QuantizationConfig(llm="int4", group_size=32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
def test_some_columns_of_a_quantised_weight_are_those_of_its_value(method: str, order: list[int] | None) -> None:
    if method in ("nf4", "bnb-int8"):
        pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    whole = quantize_weight(
        torch.randn(6, 256, generator=generator),
        method,
        group_size=32,
        symmetric=False,
        input_scales=torch.rand(256, generator=generator) + 0.5,
    )
    if order is not None:  # of its stretches of 64 inputs: each lies in one half or the other
        inputs = torch.arange(256).view(4, 64)[order].flatten()
        codes, scales, zeros = whole.canonical()
        whole = WEIGHTS[method](codes, scales, zeros, input_scales=whole.input_scales, order=inputs)
    for start in (0, 128):
        assert torch.equal(
            whole.columns(range(start, start + 128)).dequantize(), whole.dequantize()[:, start : start + 128]
        )


def test_a_stretch_that_tears_a_group_apart_is_refused() -> None:
    weight = quantize_weight(torch.randn(4, 96), "int4", group_size=32)
    with pytest.raises(ValueError, match="groups of 32 of its 96 inputs cannot be cut into stretches of 48"):
        weight.columns(range(48))


@pytest.mark.parametrize("stored", [False, True])
def test_the_half_that_is_not_here_is_not_read_and_still_checked(
    stored: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = chat_config(), random_weights(chat_config())
    if stored:
        section, pack, _ = FORMATS["awq"]
        config, tensors, _ = quantised(chat_config(llm=WIDE), section, pack)
    write_checkpoint(tmp_path, config, tensors)
    read: set[str] = set()
    opened = weights.open_safetensors

    class Recorded:
        def __init__(self, path: Any) -> None:
            self.file = opened(path)

        def __enter__(self) -> "Recorded":
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            read.add(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr(weights, "open_safetensors", Recorded)
    whole = values_of(load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU))
    assert read == tensors.keys()
    for part, half in (
        (Part(language=False), re.compile("vision_model|mlp1")),
        (Part(vision=False), re.compile("language_model")),
    ):
        read.clear()
        model = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU, part=part)
        held = values_of(model)
        assert read == {name for name in tensors if half.match(name)}
        assert held.keys() == {name for name in whole if part.holds(name)}
        assert all(torch.equal(value, whole[name]) for name, value in held.items())
        assert next(model.parameters()).device == CPU
    monkeypatch.undo()
    absent = next(name for name in tensors if name.startswith("vision_model."))
    for broken, message in (
        ({name: tensor for name, tensor in tensors.items() if name != absent}, f"1 tensors missing: {absent}"),
        (tensors | {absent: torch.zeros(3)}, rf"{absent} has shape \(3,\)"),
        (tensors | {"vision_model.extra": torch.zeros(3)}, "1 tensors unexpected: vision_model.extra"),
    ):
        write_checkpoint(tmp_path, config, broken)
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU, part=Part(vision=False))


def test_options_for_the_half_that_is_not_here_are_read_all_the_same() -> None:
    quantization = QuantizationConfig(llm="int8", vision="int8")
    for part, here in ((Part(vision=False), "language_model."), (Part(language=False), "vision_model.")):
        model = load(chat_config(), part, quantization=quantization)
        names = [name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]
        assert names
        assert all(name.startswith(here) for name in names)
        with pytest.raises(ConfigError, match="'nothing' matches no linear layer"):
            load(chat_config(), part, quantization=QuantizationConfig(overrides={"nothing": "int8"}))


def test_a_model_of_version_1_0_can_be_apart_and_a_contrastive_one_cannot() -> None:
    for qllama in (False, True):
        config = llava_config(qllama=qllama)
        whole = values_of(load(config))
        vision, language = (values_of(load(config, part)) for part in (Part(language=False), Part(vision=False)))
        assert vision.keys() | language.keys() == whole.keys()
        assert not vision.keys() & language.keys()
    with pytest.raises(UnsupportedError, match="only chat models have two halves"):
        build_model(
            weights.load_any_config(contrastive_config()), (), dtype=torch.float32, device=CPU, part=Part(vision=False)
        )


# --- what ranks compute ---


def forward(decoder: Any, x: Tensor) -> Tensor:
    inv_freq = inverse_frequencies(decoder.config, len(IDS))
    with torch.inference_mode():
        logits: Tensor = decoder.logits(decoder(x[None], torch.arange(len(x))[None], inv_freq))
    return logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_together_compute_what_one_does(architecture: str) -> None:
    size = 4 if architecture == "InternLM2ForCausalLM" else 2
    config = chat_config(architecture, llm={"num_key_value_heads": 4} if size == 4 else {})
    visual = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    whole = load(config).language_model
    x = whole.embed(IDS, [(2, visual[:2]), (7, visual[2:])])
    assert torch.equal(x[[2, 3, 7]], visual)
    text = [0, 1, 4, 5, 6, 8, 9]
    assert torch.equal(x[text], whole.embed(IDS)[text])

    def run(parallel: TensorParallel) -> tuple[Tensor, Tensor]:
        part = Part(vision=False, rank=parallel.rank, size=size)
        decoder = load(config, part, parallel).language_model
        here = visual if parallel.rank == 0 else torch.zeros(3, 1)
        x = decoder.embed(IDS, [(2, here[:2]), (7, here[2:])])
        return x, forward(decoder, x)

    found = together(size, run)
    assert all(torch.equal(embedded, x) for embedded, _ in found)  # a sum with zeros is exact
    torch.testing.assert_close(found[0][1], forward(whole, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["int4", "int8-weight", "int8"])
def test_quantised_ranks_together_compute_what_one_does(method: str) -> None:
    config, quantization = chat_config(llm=WIDE), QuantizationConfig(llm=method, group_size=16)
    exact, whole = load(config).language_model, load(config, quantization=quantization).language_model

    def run(parallel: TensorParallel) -> Tensor:
        decoder = load(config, Part(vision=False, rank=parallel.rank, size=2), parallel, quantization=quantization)
        return forward(decoder.language_model, decoder.language_model.embed(IDS))

    found, expected = together(2, run)[0], forward(whole, whole.embed(IDS))
    if method == "int4":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    # Each rank rounds the inputs that it has by the largest of them, which is no coarser than by the largest of all.
    true = forward(exact, exact.embed(IDS))
    assert (found - true).norm() <= 1.1 * (expected - true).norm()


def test_a_bias_behind_a_sum_is_added_once() -> None:
    config = chat_config("InternLMForCausalLM")  # whose attention ends in one
    weights_ = random_weights(config)
    for name, weight in weights_.items():
        if name.endswith("o_proj.weight"):
            weight.zero_()
    bias = weights_["language_model.model.layers.1.self_attn.o_proj.bias"]

    def run(parallel: TensorParallel) -> Tensor:
        part = Part(vision=False, rank=parallel.rank, size=2)
        output = load(config, part, parallel, tensors=weights_).language_model.layers[1].attention.o
        result: Tensor = output(torch.ones(1, 32))
        return result

    assert all(torch.equal(found[0], bias) for found in together(2, run))


def test_sums_in_the_order_of_ranks_are_the_same_wherever_a_row_stands() -> None:
    sizes = torch.tensor([1e4, 1.0, 1e-3, 1e4])[:, None]
    rows = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * sizes

    def run(parallel: TensorParallel) -> list[Tensor]:
        return [parallel.all_reduce(_placed(rows[parallel.rank], at))[at] for at in range(5)]

    sums = [one for found in together(4, run, ordered=True) for one in found]
    assert all(torch.equal(one, sums[0]) for one in sums)
    torch.testing.assert_close(sums[0], rows.double().sum(0).float(), rtol=1e-3, atol=1e-2)


def _placed(row: Tensor, at: int) -> Tensor:
    """A row at a place among others, of as many as there always are."""
    batch = torch.ones(5, len(row))
    batch[at] = row
    return batch
