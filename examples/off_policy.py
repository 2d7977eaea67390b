"""Policy-gradient steps on samples of q*, off-policy, with importance weights.

The samples were drawn from q*, the gradient is wanted under π_θ as it is by now: each sample is weighted by π_θ/q*,
with the log q* that was written when it was drawn. That needs the diagnostics:

    python -m qstar.generate --model-theta ./policy --model-t ./teacher --dataset train.jsonl \\
        --samples-per-prompt 8 --save-diagnostics --output samples.jsonl
    python examples/off_policy.py samples.jsonl ./policy ./trained
"""

import argparse

import torch
from reward import reward
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar.run.records import Record, RunFiles
from qstar.weights import effective_sample_size, log_weights, weights


def logprobs(model: torch.nn.Module, records: list[Record]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π_θ of the answers' tokens now, log q* when they were drawn, and where there are tokens: [B, T] each."""
    device = model.get_input_embeddings().weight.device
    rows = [torch.tensor(r.diagnostics["prompt_ids_theta"] + r.tokens["id"]) for r in records]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, L], padded on the right
    logits = model(ids).logits[:, :-1].float()  # padding on the right is never looked at
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B, L − 1], of the next token
    logq, mask = torch.zeros_like(logp), torch.zeros_like(logp, dtype=torch.bool)
    for i, record in enumerate(records):
        start = len(record.diagnostics["prompt_ids_theta"]) - 1
        answer = slice(start, start + len(record.tokens["id"]))
        logq[i, answer] = torch.tensor(record.tokens["logq"], device=device)
        mask[i, answer] = True
    return logp, logq, mask


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="Off-policy policy gradient on samples of q*.")
    parser.add_argument("samples", help="x.jsonl of qstar.generate --save-diagnostics")
    parser.add_argument("model", help="the policy to train: a folder or a hub name")
    parser.add_argument("output", help="folder for the trained model")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--clip", type=float, default=5.0, help="upper bound of the weights")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    records, losses = list(RunFiles(args.samples)), []
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), args.batch_size):
        batch = [records[i] for i in order[start : start + args.batch_size]]
        rewards = torch.tensor([reward(r.line) for r in batch], device=model.device)
        logp, logq, mask = logprobs(model, batch)
        log_w = log_weights(logp.detach(), logq, mask)  # [B], of whole answers
        w = weights(log_w, high=args.clip)
        advantage = rewards - (w * rewards).sum() / w.sum()  # the weighted mean is π_θ's own
        loss = -(w * advantage * (logp * mask).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        ess = effective_sample_size(log_w)
        print(f"loss {loss.item():.4f}  reward under π_θ {((w * rewards).sum() / w.sum()).item():.3f}  ESS {ess:.1f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return losses


if __name__ == "__main__":
    main()
