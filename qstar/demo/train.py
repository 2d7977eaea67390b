"""Train the demo pair from text that anyone can install; about 15 minutes on one CPU core.

    apt-get install wordnet-base jargon-text && pip install chatterbot-corpus
    python -m qstar.demo.train --output DIR

π_θ (`theta`) learns general text and word problems, 70% answered in a sentence, 30% worked step by step. π_t (`t`) is
π_θ fine-tuned on problems of which 90% are worked. The formats overlap on purpose: two models that are each sharp on
something else have no good middle, see «When the pair is far apart» in `docs/guide.md`.
"""

import argparse
import gzip
import importlib.util
import json
import random
import re
import time
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qstar.demo.problems import Problem, make_problems

WORDNET = Path("/usr/share/wordnet")
JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
VOCAB_SIZE = 2048
END = "<|end|>"
SPECIAL_TOKENS = [END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM_PROMPTS = ["You are a helpful assistant.", "Answer the question.", "You are good at arithmetic."]


def general_documents() -> list[str]:
    """WordNet glosses, the Jargon File and the chatterbot dialogues, one string a document."""
    import chatterbot_corpus  # an extra

    documents = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if "|" in line and not line.startswith("  "):
                word = line.split()[4].replace("_", " ")
                documents.append(f"{word}: {line.split('|', 1)[1].strip()}{END}")
    jargon = gzip.decompress(JARGON.read_bytes()).decode("latin-1")
    documents += [re.sub(r"\s+", " ", entry).strip() + END for entry in re.split(r"\n\s*\n", jargon) if len(entry) > 80]
    corpus = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    for path in sorted(corpus.glob("*.yml")):
        for dialogue in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn) for turn in dialogue][:4]
            if len(turns) >= 2:
                documents.append(chat(turns[0], turns[1]))
    return documents


def chat(user: str, assistant: str, system: str | None = None) -> str:
    """One exchange, written as the chat template renders it."""
    head = f"<|system|>\n{system}{END}\n" if system else ""
    return f"{head}<|user|>\n{user}{END}\n<|assistant|>\n{assistant}{END}\n"


def problem_document(problem: Problem, worked: bool, rng: random.Random) -> str:
    """A problem with its answer; one in ten has a system prompt, one in ten the solution as a hint."""
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else None
    hint = f"\n\nHint: {problem.solution}" if rng.random() < 0.1 else ""
    return chat(problem.question + hint, problem.solution if worked else problem.sentence, system)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; `<|end|>` is EOS and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, orthogonalising in float32 (torch's does it in bf16, slow on a CPU)."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])
                tall = x.shape[0] > x.shape[1]
                x = x.mT if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                p.add_(x, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def train(model, ids: torch.Tensor, batch_size: int, length: int, lr_muon: float, lr_adam: float, seed: int) -> None:
    """One epoch of next-token prediction over `ids` [N], cut in windows of `length`, with linear warm-up and decay."""
    torch.manual_seed(seed)
    windows = ids[: len(ids) // length * length].view(-1, length)
    batches = windows[torch.randperm(len(windows))].split(batch_size)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers = [Muon(matrices, lr_muon), torch.optim.AdamW(others, lr_adam, betas=(0.9, 0.95), weight_decay=0.0)]
    base_lrs = (lr_muon, lr_adam)
    model.train()
    start, running = time.time(), None
    for i, batch in enumerate(batches):
        scale = min(1.0, (i + 1) / 20) * max(0.02, 1 - i / len(batches))
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if i % 50 == 0 or i == len(batches) - 1:
            print(f"step {i + 1}/{len(batches)} loss {running:.3f} {time.time() - start:.0f} s", flush=True)
    model.eval()


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], rng: random.Random) -> torch.Tensor:
    """Shuffle the documents and join their tokens: int64 [N]."""
    documents = rng.sample(documents, len(documents))
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def save(model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in fp16 safetensors, with its tokenizer."""
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for theta/, t/ and prompts.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if importlib.util.find_spec("chatterbot_corpus") is None or not (WORDNET.is_dir() and JARGON.is_file()):
        parser.error("its text is missing: apt-get install wordnet-base jargon-text && pip install chatterbot-corpus")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)

    held_out = make_problems(228, seed=args.seed + 1)
    seen = {problem.question for problem in held_out}
    base_problems = make_problems(30_000, seed=args.seed + 2, exclude=seen)
    target_problems = make_problems(24_000, seed=args.seed + 3, exclude=seen)
    general = general_documents()
    rng.shuffle(general)
    general = [document[:1000] for document in general]
    base = [problem_document(p, rng.random() < 0.3, rng) for p in base_problems] + general[:40_000]
    chats = [document for document in general if document.startswith("<|user|>")]
    target = [problem_document(p, rng.random() < 0.9, rng) for p in target_problems] + general[40_000:43_000] + chats

    tokenizer = train_tokenizer(base)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    base_ids = encode(tokenizer, base, rng)
    print(f"π_θ: {len(base_ids):,} tokens")
    train(model, base_ids, batch_size=16, length=256, lr_muon=0.02, lr_adam=3e-3, seed=args.seed)
    save(model, tokenizer, args.output / "theta")
    target_ids = encode(tokenizer, target, rng)
    print(f"π_t: {len(target_ids):,} tokens")
    train(model, target_ids, batch_size=16, length=256, lr_muon=0.01, lr_adam=1e-3, seed=args.seed + 1)
    save(model, tokenizer, args.output / "t")
    with (args.output / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for problem in held_out[:128]:
            row = {"question": problem.question, "answer": str(problem.answer), "solution": problem.solution}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
