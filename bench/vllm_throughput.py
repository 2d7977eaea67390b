"""`python -m bench.vllm_throughput`: tokens per second of the vLLM backend, beside vLLM on one model and transformers.

Wants the environment of requirements-vllm.txt. All contenders take the same 512 prompts in turns; what is written to
`bench/results/vllm.md` is the median of the rounds with their range. Both backends must have drawn the same samples.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import vllm
from vllm import EngineArgs, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from qstar import Pair
from qstar.data.prompts import load_prompts
from qstar.demo import PROMPTS, THETA, T
from qstar.pair import sample_seed
from qstar.prompting import PromptFormat
from qstar.sample import DecodeOptions, Request
from qstar.vllm.engine import EnginePair, engine_options

IN_FLIGHT = 64
SAMPLES_PER_PROMPT = 4
NEW_TOKENS = 64
ROUNDS = 3
RESULTS = Path(__file__).with_name("results") / "vllm.md"


def all_requests(pair: Pair) -> list[Request]:
    prompts = [prompt.messages for prompt in load_prompts(str(PROMPTS), None, None, None, None)]
    plain = PromptFormat()
    return [
        pair.request((i, j), messages, sample_seed(0, i, j), NEW_TOKENS, plain, plain)
        for j in range(SAMPLES_PER_PROMPT)
        for i, messages in enumerate(prompts)
    ]


def draw(pair: Pair, requests: list[Request], batch_size: int) -> dict:
    """Token ids by key."""
    options = DecodeOptions(batch_size=batch_size)
    return {sample.request.key: sample.token_ids for sample in pair.decoder(options).run(requests)}


def draw_alone(engine: LLMEngine, requests: list[Request], eos_ids: list[int]) -> dict:
    """vLLM's own sampling from one model."""
    params = SamplingParams(
        max_tokens=NEW_TOKENS, stop_token_ids=eos_ids, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    for i, request in enumerate(requests):
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=request.ids_theta), params)
    drawn = {}
    while engine.has_unfinished_requests():
        drawn |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
    return drawn


def rate(run: Callable[..., dict], *args) -> float:
    """Tokens per second of a call that returns them."""
    start = time.perf_counter()
    drawn = run(*args)
    return sum(map(len, drawn.values())) / (time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(1)
    reference = Pair.from_pretrained(THETA, T, device="cpu")
    requests, eos_ids = all_requests(reference), sorted(reference.eos_ids)
    pair = EnginePair(THETA, T, max_num_seqs=IN_FLIGHT)
    # an engine that waits keeps a core busy, so that only one of them lives at a time
    own = {"skip_tokenizer_init": True, "disable_log_stats": True, "generation_config": "vllm"}
    own |= {k: v for k, v in engine_options(pair).items() if k in ("dtype", "kv_cache_memory_bytes", "enforce_eager")}
    own |= {"max_model_len": reference.context, "max_num_seqs": IN_FLIGHT}
    rates: dict[str, list[float]] = {}
    expected = draw(reference, requests, IN_FLIGHT)
    for _ in range(ROUNDS):
        pair.start()
        assert draw(pair, requests, IN_FLIGHT) == expected
        rates.setdefault("q* by vLLM", []).append(rate(draw, pair, requests, IN_FLIGHT))
        pair.stop()
        for name, folder in (("π_θ alone by vLLM", THETA), ("π_t alone by vLLM", T)):
            alone = EnginePair(folder, folder)
            alone.engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), **own))
            draw_alone(alone.engine, requests, eos_ids)
            rates.setdefault(name, []).append(rate(draw_alone, alone.engine, requests, eos_ids))
            alone.stop()
        for batch in (16, 64, 128):
            name = f"q* by transformers, batch {batch}"
            rates.setdefault(name, []).append(rate(draw, reference, requests, batch))
    alone = zip(rates["π_θ alone by vLLM"], rates["π_t alone by vLLM"], strict=True)
    both = [1 / (1 / theta + 1 / t) for theta, t in alone]
    rates["both models by vLLM, one after the other"] = both
    shown = [
        "# The vLLM backend on the demo pair",
        f"{len(requests)} samples of up to {NEW_TOKENS} tokens, {IN_FLIGHT} in flight; medians of {ROUNDS} rounds and "
        f"their range. vLLM {vllm.__version__}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} "
        "cores, float32.",
        "\n".join(
            ["| | tokens/s | of q* by vLLM |", "| :-- | --: | --: |"]
            + [
                f"| {name} | {statistics.median(of):.0f} ({min(of):.0f}–{max(of):.0f}) | "
                f"{statistics.median(x / y for x, y in zip(of, rates['q* by vLLM'], strict=True)):.2f} |"
                for name, of in rates.items()
            ]
        ),
    ]
    RESULTS.write_text("\n\n".join(shown) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
