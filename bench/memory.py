"""Peak memory of whole jobs, each measured in a process of its own."""

import resource

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qstar.decode import Decoder
from qstar.forced import Scorer
from qstar.sample import DecodeOptions, Request, Sample


def score_peak(tokens: int, vocab_size: int = 32000) -> int:
    """Bytes that scoring one answer of so many tokens takes at its peak, beyond two small random models."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, max_position_embeddings=1 << 16,
    )  # fmt: skip
    torch.manual_seed(0)
    theta, t = (LlamaForCausalLM(config).eval() for _ in range(2))

    def run(count: int) -> None:
        ids = torch.randint(vocab_size, (count,)).tolist()
        decoder = Decoder(theta, t, vocab_size, {0}, set(), None, DecodeOptions(batch_size=1))
        (sample,) = Scorer(decoder).run([Sample(Request(0, [1], [1], 0, count), ids)])
        assert len(sample.fields["logq"]) == count

    run(8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(tokens)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
