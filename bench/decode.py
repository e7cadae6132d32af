"""Decoding with InternLM2-20B at real size: CUDA graphs against eager launches and eager transformers.

    python bench/decode.py [--batch 1 8 32] [--context 2048] [--out DIR]

`share` is of the time that reading the weights and the keys and values once would take at this GPU's copy bandwidth,
measured in the same run: the roof of decoding.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from vitrail.bench.harness import Ceilings, ceilings, compare, require_gpu, results_path, write_results
from vitrail.bench.models import INTERNVL_CHAT_V1_5, language_only, random_model
from vitrail.bench.peer import transformers_model
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.layers.kv_cache import BLOCK_SIZE
from vitrail.runtime.layers.rotary import inverse_frequencies


def measure_batch(
    runners: dict[str, Runner], peer: Any, batch: int, context: int, ceiling: Ceilings
) -> list[dict[str, Any]]:
    """One step of `batch` sequences that have `context` tokens each, the new one among them."""
    model = runners["graphs"].model
    llm = model.config.llm
    blocks = -(-context // BLOCK_SIZE)
    tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(batch)]
    inv_freq = inverse_frequencies(llm, context).cuda().expand(batch, -1)
    tokens = torch.randint(0, llm.vocab_size, (batch,), device="cuda")
    ids = tokens.tolist()
    past: Any = StaticCache(config=peer.config.text_config, max_cache_len=context)
    positions = torch.full((batch, 1), context - 1, device="cuda")

    def theirs() -> Tensor:
        past.reset()  # it counts its tokens and would run full; the whole length is attended to at any count
        out = peer.model.language_model(
            input_ids=tokens[:, None], position_ids=positions, past_key_values=past, use_cache=True
        )
        return peer.lm_head(out.last_hidden_state[:, -1])

    def ours(runner: Runner) -> Tensor:
        return runner.decode(ids, [context] * batch, inv_freq, tables)

    timings = compare(
        {
            "transformers, eager, static cache": theirs,
            "vitrail, eager": lambda: ours(runners["eager"]),
            "vitrail, CUDA graph": lambda: ours(runners["graphs"]),
        }
    )
    weights = sum(p.nbytes for p in model.language_model.parameters()) - model.language_model.embedding.nbytes
    floor_ms = (weights + batch * context * llm.kv_bytes_per_token) / ceiling.copy_bytes * 1e3
    return [
        {
            "batch": batch,
            "context": context,
            "path": name,
            **timing.row(),
            "tokens_per_s": batch / timing.median * 1e3,
            "roof_ms": floor_ms,
            "share": floor_ms / timing.median,
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    require_gpu()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        ceiling = ceilings()
        model = random_model(language_only(INTERNVL_CHAT_V1_5), torch.bfloat16, "cuda")
        peer = transformers_model(model, image_token_id=0)
        limits = {"max_num_seqs": max(arguments.batch), "max_model_len": arguments.context}
        runners = {name: Runner(model, **limits, enforce_eager=name == "eager") for name in ("eager", "graphs")}
        blocks = max(arguments.batch) * -(-arguments.context // BLOCK_SIZE)
        for runner in runners.values():
            runner.allocate(blocks, keep=False)
        for batch in arguments.batch:
            rows += measure_batch(runners, peer, batch, arguments.context, ceiling)
            path = write_results(
                results_path("decode", arguments.out),
                rows,
                title="Decoding, InternLM2-20B, bf16",
                notes=str(ceiling),
            )
    for row in rows:
        print(
            f"batch {row['batch']:3} context {row['context']:5}  {row['path']:34} {row['ms']:8.2f} ms "
            f"{row['tokens_per_s']:8.1f} tok/s  {row['share']:5.2f} of the roof"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
