"""Which kernels a model launches: its halves run on tensors without memory, and every launch is noted down.

Nothing is computed and no weights are needed, only a config: this works for a 40B model on any machine. Counts (tiles,
tokens, sequences) decide which implementation a launcher takes, hardly ever what is compiled: a few of them stand for
all. Quantised, a half has weights of the right types and sizes, packed for the GPU, and no values either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from ..kernels import dispatch
from ..kernels.dispatch import Target
from ..kernels.sampling import greedy_tokens, sample_tokens
from ..kernels.signature import Launch
from .config import ContrastiveConfig, DecoderConfig, InternVLConfig, ModelConfig, VisionConfig, load_any_config
from .engine.graphs import BATCH_SIZES, TILE_COUNTS
from .errors import CheckpointError
from .layers.kv_cache import BLOCK_SIZE, KVBatch, KVCache
from .layers.linear import replace_weight
from .models.contrastive import ContrastiveModel
from .models.decoder import Decoder
from .models.intern_vit import InternViT
from .models.internvl import InternVLModel
from .models.qllama import QLLaMACache
from .quantization.config import QuantizationConfig
from .quantization.formats.detect import stored_format
from .quantization.formats.vitrail import VitrailFormat
from .quantization.methods import WEIGHTS
from .quantization.model import connect, linear_layers, plan
from .weights import resolve_checkpoint

PROMPT_LENGTHS = (37, 256, 512, 1024, 2048, 3456, 8192)
CONTEXT_LENGTHS = (64, 128, 256, 300, 1024, 2048, 4096, 32768)
# Of the encoders: pixels along a side, images in a batch, tokens of a text.
IMAGE_SIZES = (224, 336, 448)
IMAGE_BATCHES = (1, 16, 128)
TEXT_LENGTH = 80
# Layers are alike; the second is there because an addition and the norm of the next layer are one kernel.
NUM_LAYERS = 2

INTERNVIT_6B = VisionConfig(
    hidden_size=3200,
    num_attention_heads=25,
    intermediate_size=12800,
    num_hidden_layers=45,
    image_size=448,
    patch_size=14,
    qkv_bias=False,
    qk_normalization=True,
    norm_type="rms_norm",
    layer_norm_eps=1e-6,
)
INTERNVIT_300M = VisionConfig(
    hidden_size=1024,
    num_attention_heads=16,
    intermediate_size=4096,
    num_hidden_layers=24,
    image_size=448,
    patch_size=14,
    qkv_bias=True,
    qk_normalization=False,
    norm_type="layer_norm",
    layer_norm_eps=1e-6,
)
INTERNLM2_20B = DecoderConfig(
    architecture="InternLM2ForCausalLM",
    vocab_size=92553,
    hidden_size=6144,
    intermediate_size=16384,
    num_hidden_layers=48,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    rope_scaling=None,
    max_position_embeddings=32768,
    qkv_bias=False,
    output_bias=False,
    qk_norm=False,
    tie_word_embeddings=False,
)
INTERNLM2_7B = replace(
    INTERNLM2_20B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)
QWEN2_0_5B = replace(
    INTERNLM2_20B,
    architecture="Qwen2ForCausalLM",
    vocab_size=151674,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    qkv_bias=True,
)


def _chat(vision: VisionConfig, llm: DecoderConfig) -> InternVLConfig:
    return InternVLConfig(
        vision=vision,
        llm=llm,
        template="internlm2-chat",
        system_message=None,
        select_layer=-1,
        downsample_ratio=0.5,
        ps_version="v2",
        tile_size=448,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        pad2square=False,
    )


# Shapes known without a checkpoint. Other official models share the vision half of one of them.
GEOMETRIES = {
    "InternVL-Chat-V1-5": _chat(INTERNVIT_6B, INTERNLM2_20B),
    "InternVL2_5-8B": _chat(INTERNVIT_300M, INTERNLM2_7B),
    "InternVL2_5-1B": _chat(INTERNVIT_300M, QWEN2_0_5B),
}
DEFAULT_MODELS = (*GEOMETRIES, "nano")


def find_config(model: str) -> ModelConfig:
    """The config of a known shape (also by its hub id), of a folder, or of a hub id; no weights are downloaded."""
    known = GEOMETRIES.get(model.removeprefix("OpenGVLab/"))
    if model == "nano" or Path(model).expanduser().is_dir():
        return load_any_config(resolve_checkpoint(model))
    if known is not None:
        return known
    try:
        return load_any_config(Path(hf_hub_download(model, "config.json")).parent)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{model}: no local folder, no known shape ({', '.join(DEFAULT_MODELS)}), "
            f"and no config.json of that name on the hub or in its cache ({type(error).__name__})"
        ) from None


def find_quantization(model: str) -> QuantizationConfig | None:
    """How a checkpoint folder of our own layout is quantised; None for all others."""
    folder = Path(model).expanduser()
    stored = stored_format(resolve_checkpoint(model)) if model == "nano" or folder.is_dir() else None
    return stored.config if isinstance(stored, VitrailFormat) else None


def record_launches(
    config: ModelConfig,
    target: Target,
    dtype: torch.dtype,
    *,
    tuned: bool = False,
    quantization: QuantizationConfig | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[Launch]:
    """Every launch of the model on that GPU, each once, in the order of a request.

    tuned: with the choices of the user's own table for that GPU, if there is one. quantization: of a chat model, int8
    and fp8 for the vision half both with and without scales known beforehand. cache_dtype: of its keys and values.
    """
    quantization = quantization or QuantizationConfig()
    launches: list[Launch] = []
    with torch.inference_mode(), torch.device("meta"), dispatch.simulate(target, launches, tuned=tuned):
        if isinstance(config, InternVLConfig):
            _chat_vision(config, dtype, quantization)
            _decoder(config.llm, dtype, quantization, cache_dtype or dtype)
            _sampling(config.llm.vocab_size)
        elif isinstance(config, ContrastiveConfig):
            _contrastive(config, dtype)
        else:
            _encoder(config, dtype)
    return list({launch.key: launch for launch in launches}.values())


def _quantize(model: nn.Module, quantization: QuantizationConfig, *, calibrated: bool = False) -> None:
    """Give the linear layers weights without values, packed for the simulated GPU."""
    layers = linear_layers(model)
    for name, method in plan(model, quantization).items():
        out_features, in_features = layers[name].weight.shape
        codes = torch.empty(out_features, in_features, dtype=torch.int8)
        scales, zeros, input_scales = torch.empty(out_features), None, None
        if method == "int4":
            codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            scales = torch.empty(out_features, in_features // quantization.group_size)
            zeros = None if quantization.symmetric else scales.to(torch.uint8)
        elif method == "fp8":
            codes = codes.to(torch.float8_e4m3fn)
        if method in ("int8", "fp8") and calibrated and name.endswith("mlp.fc2"):
            input_scales = torch.empty(in_features)
        weight = WEIGHTS[method](codes, scales, zeros, input_scales=input_scales)
        replace_weight(layers[name], weight)
        weight.pack()
    connect(model)


def _chat_vision(config: InternVLConfig, dtype: torch.dtype, quantization: QuantizationConfig) -> None:
    skipped = config.vision.num_hidden_layers - config.vision_depth
    vision = replace(config.vision, num_hidden_layers=skipped + NUM_LAYERS)
    # Of the language half only its width matters, which is the projector's.
    llm = replace(config.llm, num_hidden_layers=1, intermediate_size=1, vocab_size=1)
    for calibrated in (False, True) if quantization.vision in ("int8", "fp8") else (False,):
        model = InternVLModel(replace(config, vision=vision, llm=llm)).to(dtype)
        _quantize(model, replace(quantization, llm=None, overrides={}), calibrated=calibrated)
        for count in TILE_COUNTS:
            model.encode_tiles(_tiles(count, config.tile_size))


def _decoder(
    config: DecoderConfig, dtype: torch.dtype, quantization: QuantizationConfig, cache_dtype: torch.dtype
) -> None:
    config = replace(config, num_hidden_layers=NUM_LAYERS)
    decoder = Decoder(config).to(dtype)
    _quantize(nn.ModuleDict({"language_model": decoder}), replace(quantization, vision=None, overrides={}))
    for contexts, new in _batches(config.max_model_len):
        num_blocks = -(-max(contexts) // BLOCK_SIZE)
        cache = KVCache(config, num_blocks, dtype=cache_dtype, device=torch.device("meta"))
        kv = KVBatch.of(cache, [range(num_blocks)] * len(contexts), contexts, new)
        token_ids = torch.empty(sum(new), dtype=torch.int64)
        hidden = decoder(decoder.embed(token_ids), token_ids, torch.empty(config.head_dim // 2), kv)
        decoder.logits(hidden[-len(new) :])


def _sampling(vocab_size: int) -> None:
    logits, settings = torch.empty(2, vocab_size), torch.empty(5, 2, dtype=torch.float64)
    greedy_tokens(logits)
    sample_tokens(logits, *settings)


def _batches(max_model_len: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Contexts and new tokens of each sequence: whole prompts, then steps of one token.

    The context decides into how many parts a sequence is split, of which a sequence alone gets the most.
    """
    for length in PROMPT_LENGTHS:
        if length <= max_model_len:
            yield (length,), (length,)
    contexts = [length for length in CONTEXT_LENGTHS if length <= max_model_len]
    for context in contexts:
        yield (context,), (1,)
    for size in BATCH_SIZES:
        yield (contexts[-1],) * size, (1,) * size


def _encoder(config: VisionConfig, dtype: torch.dtype) -> None:
    model = InternViT(config, NUM_LAYERS).to(dtype)
    for side, count in product(IMAGE_SIZES, IMAGE_BATCHES):
        model(_tiles(count, side))


def _contrastive(config: ContrastiveConfig, dtype: torch.dtype) -> None:
    vision = replace(config.vision, num_hidden_layers=NUM_LAYERS)
    llm = replace(config.llm, num_hidden_layers=max(NUM_LAYERS, config.cross_attention_frequency))
    model = ContrastiveModel(replace(config, vision=vision, llm=llm)).to(dtype)
    for count in IMAGE_BATCHES:
        token_ids = torch.empty(count, TEXT_LENGTH, dtype=torch.int64)
        model.embed_texts(token_ids, token_ids, token_ids[:, 0])
        for side in IMAGE_SIZES:
            model.embed_images(_tiles(count, side), "g")
            features = torch.empty(count, 1 + (side // vision.patch_size) ** 2, vision.hidden_size, dtype=dtype)
            model.match(features, token_ids)
            length = config.num_query_tokens + TEXT_LENGTH + 1
            cache = QLLaMACache(llm, count, length, dtype=dtype, device=torch.device("meta"))
            model.begin_caption(features, token_ids, cache)
            cache.used = length - 1
            model.continue_caption(token_ids[:, 0], cache)
    _sampling(llm.vocab_size)  # captions


def _tiles(count: int, side: int) -> Tensor:
    return torch.empty(count, side, side, 3, dtype=torch.uint8)
