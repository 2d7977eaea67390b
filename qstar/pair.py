"""A policy π_θ and a target π_t with one vocabulary, and text drawn from q* between them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from qstar.adapter_names import base_of
from qstar.adapters import BASE, Adapted, are_one_model, in_evaluation, in_one_pass, is_peft, with_adapters
from qstar.decode import Decoder
from qstar.probe import check_model
from qstar.prompting import PromptError, PromptFormat
from qstar.sample import DecodeOptions, Request, Sample
from qstar_kernels.types import FIELDS


def sample_seed(seed: int, prompt_index: int, sample_index: int, turn: int = 0) -> int:
    """The 64-bit seed of one sample (and turn), as a signed integer: a hash, so that related samples share no noise."""
    digest = hashlib.blake2b(f"{seed}:{prompt_index}:{sample_index}:{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def shared_vocab_size(
    tokenizer_theta, tokenizer_t, rows_theta: int, rows_t: int, other: str = "t"
) -> tuple[int, list[str]]:
    """The vocabulary both sides share: the tokenizer's length, which padded models may exceed; `other` names π_t.

    A pad token at the end of a tokenizer, which the other one or a model lacks, is no part of it.

    Returns:
        its size, and a line for each such pad token.

    Raises:
        ValueError: the tokenizers differ (the first differing entries are shown), or a model has too few rows.
    """
    names, tokenizers, rows = ("theta", other), (tokenizer_theta, tokenizer_t), (rows_theta, rows_t)
    by_id = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    pads, notes = [pad_at_the_end(tokenizer) for tokenizer in tokenizers], []
    same_id = pads[0] == pads[1]
    shared = same_id and len({vocab.get(pad) for vocab, pad in zip(by_id, pads, strict=True)}) == 1
    if not shared or (pads[0] is not None and pads[0] >= min(rows)):
        for side, pad in enumerate(pads):
            if pad is not None and (same_id or pad not in by_id[1 - side]):
                token = by_id[side].pop(pad)
                notes.append(
                    f"the pad token {token!r} of {names[side]} ({pad}) is left out of the vocabulary: it is never drawn"
                )
    by_id_theta, by_id_t = by_id
    if by_id_theta != by_id_t:
        differing = [i for i in sorted(by_id_theta.keys() | by_id_t.keys()) if by_id_theta.get(i) != by_id_t.get(i)]
        shown = ", ".join(f"{i}: {by_id_theta.get(i)!r} / {by_id_t.get(i)!r}" for i in differing[:5])
        raise ValueError(
            f"the tokenizers differ in {len(differing)} entries (id: theta / {other}): {shown}; "
            "q* needs models with one vocabulary"
        )
    vocab_size = max(by_id_theta) + 1
    for name, count in zip(names, rows, strict=True):
        if count < vocab_size:
            raise ValueError(f"model {name} has {count} output rows, fewer than the tokenizer's {vocab_size} entries")
    return vocab_size, notes


@contextmanager
def naming(model: str | Path) -> Iterator[None]:
    """What is raised because a model is not to be had says which one, which transformers does not without a network."""
    try:
        yield
    except OSError as error:
        if str(model) in str(error):
            raise
        raise OSError(f"{model} cannot be loaded: {error}") from error


def pad_at_the_end(tokenizer) -> int | None:
    """The id of a pad token that is the tokenizer's last entry and nothing else, as those are that were added later."""
    pad, others = tokenizer.pad_token_id, (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    is_last = pad is not None and pad == max(tokenizer.get_vocab().values())
    return pad if is_last and pad not in others else None


def eos_ids_of(model, tokenizer) -> set[int]:
    """Ids that end a sequence for this model: its generation config's and its tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {i for i in (*configured, tokenizer.eos_token_id) if i is not None}


def load_sides(load: Callable, sides: list[tuple[str, str | None, tuple[str, str | None] | None]]) -> list:
    """π_θ and π_t, of a base, its revision, and an adapter and its revision each; what they share is loaded once."""
    (base_theta, revision_theta, adapter_theta), (base_t, revision_t, adapter_t) = sides
    adapters = {name: adapter for name, adapter in (("theta", adapter_theta), ("t", adapter_t)) if adapter is not None}
    if sides[0] == sides[1]:
        model = load(base_theta, revision_theta, dict([*adapters.items()][:1]))
        model = Adapted(model, "theta") if adapters else model
        return [model, model]
    if (base_theta, revision_theta) == (base_t, revision_t):
        model = load(base_theta, revision_theta, adapters)
        return [Adapted(model, name if name in adapters else BASE) for name in ("theta", "t")]
    models = [load(base, revision, {"x": adapter} if adapter else {}) for base, revision, adapter in sides]
    return [Adapted(m, "x") if is_peft(m) else m for m in models]


@dataclass
class GenerateOutput:
    """Finished samples in the order of the prompts (and of the samples of each prompt).

    `fields` of each sample holds one number a token; `alpha`, `logq`, … give them for all samples at once.
    """

    samples: list[Sample] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [s.text for s in self.samples]

    @property
    def token_ids(self) -> list[list[int]]:
        return [s.token_ids for s in self.samples]

    @property
    def finish_reasons(self) -> list[str]:
        return [s.finish_reason for s in self.samples]

    def __getattr__(self, name: str) -> list[list[float]]:
        if name in FIELDS:
            return [s.fields[name] for s in self.samples]
        raise AttributeError(f"GenerateOutput has no {name!r}; per-token fields are {', '.join(FIELDS)}")


class Pair:
    """Two causal language models over one vocabulary; the same model twice for one model with two prompts.

    Args:
        theta, t: the models of π_θ and π_t, ready on their devices, in evaluation mode.
        tokenizer_theta, tokenizer_t: their tokenizers; one vocabulary, the chat templates may differ.
        draft: who drafts in speculative decoding: `theta`, `t`, or a third, smaller model with the same vocabulary.
        tokenizer_draft: the third model's.
        live: the models are a trainer's, and may be in training mode: they are in evaluation mode while text is drawn,
            and in their own again afterwards.

    Attributes:
        vocab_size: entries that both tokenizers have; the logits of both models are cut to it.
        notes: a line for each token that is no part of it.

    Raises:
        ValueError: the vocabularies differ, a model is not one whose rows can share a batch (`qstar.probe`), or both
            sides are a model with the same adapter (`with_adapter` is for such pairs).
    """

    def __init__(self, theta, t, tokenizer_theta, tokenizer_t, draft="theta", tokenizer_draft=None, live=False):
        if are_one_model(theta, t):
            raise ValueError(
                "theta and t are one model: an adapter is part of its base once it is loaded onto it; "
                "Pair.with_adapter(peft_model, tokenizer) is the pair of a model with its adapter and without"
            )
        self.theta, self.t, self.draft, self.live = theta, t, draft, live
        with self.in_evaluation():
            check_model(theta, "theta")
            check_model(t, "t")
            self.in_one_pass = in_one_pass(theta, t)
        self.tokenizer_theta, self.tokenizer_t = tokenizer_theta, tokenizer_t
        self.vocab_size, self.notes = shared_vocab_size(
            tokenizer_theta, tokenizer_t, *(m.config.get_text_config().vocab_size for m in (theta, t))
        )
        self.eos_ids = {i for m, tok in ((theta, tokenizer_theta), (t, tokenizer_t)) for i in eos_ids_of(m, tok)}
        if self.notes and max(self.eos_ids, default=0) >= self.vocab_size:
            raise ValueError(f"token {max(self.eos_ids)} would end a sequence, but {self.notes[0]}")
        self.special_ids = {i for i in tokenizer_t.all_special_ids if i < self.vocab_size} | self.eos_ids
        models = [theta, t]
        if not isinstance(draft, str):
            with self.in_evaluation():
                check_model(draft, "draft")
            rows = draft.config.get_text_config().vocab_size
            size, notes = shared_vocab_size(tokenizer_theta, tokenizer_draft, self.vocab_size, rows, "draft")
            if size < self.vocab_size:
                raise ValueError(f"model draft lacks a token that both models have: {notes[0]}")
            models.append(draft)
        elif draft not in ("theta", "t"):
            raise ValueError(f"draft is {draft!r}; it must be 'theta', 't' or a model")
        self.context = min(
            getattr(m.config.get_text_config(), "max_position_embeddings", None) or 1 << 30 for m in models
        )

    @classmethod
    def from_pretrained(
        cls,
        theta: str | Path,
        t: str | Path,
        *,
        adapter_theta: str | Path | None = None,
        adapter_t: str | Path | None = None,
        draft: str | Path = "theta",
        revision_theta: str | None = None,
        revision_t: str | None = None,
        revision_adapter_theta: str | None = None,
        revision_adapter_t: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        trust_remote_code: bool = False,
    ) -> "Pair":
        """Load two models by name or folder; one that both sides have is loaded once, whatever their adapters.

        Args:
            theta, t: hub names or local folders; an adapter's stands for its base with that adapter.
            adapter_theta, adapter_t: adapters on them, by name or folder, for peft (extra `peft`).
            draft: `theta`, `t`, or the name or folder of a third model that drafts in speculative decoding.
            revision_theta, revision_t, revision_adapter_theta, revision_adapter_t: commits (or branches, or tags) of
                what is on the hub; the newest by default.
            dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own, float32 on a CPU.
            device: where both models go; a GPU if there is one by default.
            device_map: placement over several devices instead, passed to transformers (`auto` spreads the layers).
            attn_implementation: passed to transformers (`sdpa`, `eager`, `flash_attention_2`, …).
            load_in_4bit: quantise both with bitsandbytes (extra `4bit`).
            trust_remote_code: run code that a checkpoint brings along.

        Raises:
            ValueError: the models do not form a pair, or an adapter does not fit its base.
            OSError: a model cannot be found.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"trust_remote_code": trust_remote_code, "weights_only": True}
        options["dtype"] = "float32" if dtype == "auto" and device_map is None and device.startswith("cpu") else dtype
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        if load_in_4bit:
            from transformers import BitsAndBytesConfig

            compute = {"auto": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
        options["device_map"] = device_map or device

        def load(name: str | Path, revision: str | None, adapters: dict[str, tuple[str | Path, str | None]]):
            of = {"revision": revision or "main"}
            with naming(name):
                model = AutoModelForCausalLM.from_pretrained(name, **of, **options).eval()
                return with_adapters(model, adapters) if adapters else model

        def tokenizer(name: str | Path, revision: str | None, adapter: tuple[str | Path, str | None] | None):
            # an adapter may bring its own, with the chat template that it was trained with
            own = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            if adapter is not None and cached_file(
                str(adapter[0]), "tokenizer_config.json", revision=adapter[1], **own
            ):
                name, revision = adapter
            with naming(name):
                return AutoTokenizer.from_pretrained(
                    name, revision=revision or "main", trust_remote_code=trust_remote_code
                )

        sides, adapters = [], [(adapter_theta, revision_adapter_theta), (adapter_t, revision_adapter_t)]
        for name, revision, adapter in zip((theta, t), (revision_theta, revision_t), adapters, strict=True):
            adapter = None if adapter[0] is None else (str(adapter[0]), adapter[1])
            if (base := base_of(name)) is not None:
                if adapter is not None:
                    raise ValueError(f"{name} is an adapter itself, and {adapter[0]} another; give the base of both")
                name, revision, adapter = base, None, (str(name), revision)
            folder = Path(name).expanduser()  # by its whole path, as an adapter may call its base by another
            sides.append((str(folder.resolve() if folder.is_dir() else name), revision, adapter))
        models, of_side = load_sides(load, sides), {side: tokenizer(*side) for side in sides}
        of_them = draft in ("theta", "t")
        drafting = (draft, None) if of_them else (load(draft, None, {}), tokenizer(draft, None, None))
        return cls(*models, *(of_side[side] for side in sides), *drafting)

    @classmethod
    def with_adapter(
        cls, model, tokenizer, *, adapter_theta: str | None = None, adapter_t: str | None = None
    ) -> "Pair":
        """A peft model as it is, in a trainer's hands or not, as π_θ, and its own base as π_t: one set of weights.

        What the adapters become while they are trained is what the next call samples with. Training mode, what is
        trained and gradients stay as they are.

        Args:
            model: a `peft.PeftModel` of a causal language model.
            tokenizer: of both sides.
            adapter_theta: π_θ's adapter; the active one by default.
            adapter_t: π_t's; none by default, which is the base. The same as π_θ's for two prompts of one model.

        Raises:
            ValueError: it is no peft model, an adapter is not there, is merged or trains the base's own biases, or the
                model is not one whose rows can share a batch.
        """
        if not is_peft(model):
            raise ValueError(f"{type(model).__name__} is no peft model; give one, as peft.get_peft_model makes it")
        active = model.active_adapters
        if adapter_theta is None and len(active) != 1:
            raise ValueError(f"{len(active)} adapters are active; name one as adapter_theta")
        theta = Adapted(model, adapter_theta or active[0])
        t = theta if (adapter_t or BASE) == theta.names[0] else Adapted(model, adapter_t or BASE)
        return cls(theta, t, tokenizer, tokenizer, live=True)

    def in_evaluation(self) -> AbstractContextManager:
        """Inside, the models of a live pair are in evaluation mode, and in their own again afterwards."""
        models = [model for model in (self.theta, self.t, self.draft) if not isinstance(model, str)]
        return in_evaluation(*models) if self.live else nullcontext()

    def request(
        self,
        key,
        messages: list[dict[str, str]],
        seed: int,
        max_new_tokens: int,
        format_theta: PromptFormat,
        format_t: PromptFormat,
        t_hint: str | None = None,
        messages_t: list[dict[str, str]] | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Request:
        """Encode one conversation for both sides; π_t sees `messages_t` if given, and `t_hint`.

        `tools` and `template_kwargs` are for both templates, see `PromptFormat.encode`.

        Raises:
            PromptError: a template refuses it, the prompt has a token that is not in both vocabularies, or it leaves no
                room for one.
        """
        ids_theta = format_theta.encode(self.tokenizer_theta, messages, None, tools, template_kwargs)
        ids_t = format_t.encode(self.tokenizer_t, messages_t or messages, t_hint, tools, template_kwargs)
        if (largest := max(*ids_theta, *ids_t)) >= self.vocab_size:
            raise PromptError(
                f"the prompt has token {largest}; accepted: those of both models, up to {self.vocab_size - 1}"
            )
        longest = max(len(ids_theta), len(ids_t))
        if longest >= self.context:
            raise PromptError(f"the prompt has {longest} tokens and the smaller context of the pair is {self.context}")
        return Request(key, ids_theta, ids_t, seed, min(max_new_tokens, self.context - longest))

    def decoder(self, options: DecodeOptions) -> Decoder:
        """The decoding loop for this pair; that of a live one runs inside of `in_evaluation`."""
        both = self.in_one_pass
        if both is not None and isinstance(self.draft, str) and options.speculate not in (0, "auto"):
            both = None  # one side of the two drafts by itself
        return Decoder(
            both or self.theta,
            both or self.t,
            self.vocab_size,
            self.eos_ids,
            self.special_ids,
            self.tokenizer_theta,
            options,
            self.context,
            self.draft,
        )

    def stream(
        self,
        prompts: Iterable[str | list[dict[str, str]]],
        *,
        prompts_t: Sequence[str | list[dict[str, str]]] | None = None,
        samples_per_prompt: int = 1,
        max_new_tokens: int = 256,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        t_hints: Sequence[str | None] | None = None,
        format_theta: PromptFormat | None = None,
        format_t: PromptFormat | None = None,
        **options,
    ) -> Iterator[Sample]:
        """Samples as they finish; `sample.request.key` is (prompt index, sample index).

        Args:
            prompts: strings (one user message each) or conversations.
            prompts_t: what π_t sees instead, one for each prompt; the same as `prompts` by default.
            samples_per_prompt: independent samples of each prompt.
            max_new_tokens: token limit of a sample; the context of the smaller model limits it too.
            seed: the run's seed; each sample's own is a hash of it, the prompt's index and the sample's index.
            seeds: one seed a prompt in place of `seed`, so that a prompt's samples do not depend on its place.
            t_hints: text that only π_t sees, one for each prompt (None for no hint).
            format_theta, format_t: how each side sees the prompts.
            **options: how to draw: fields of `qstar.sample.DecodeOptions` (`batch_size`, `stop`, `speculate`, …), and
                settings of `qstar_kernels.qstar_sample` (`method`, `alpha`, `temperature`, `top_p`, …).

        Raises:
            ValueError: a setting is outside its range, or a prompt cannot be encoded (`PromptError`).
        """
        format_theta, format_t = format_theta or PromptFormat(), format_t or PromptFormat()

        def conversation(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
            return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

        requests = (
            self.request(
                (i, j),
                conversation(prompt),
                sample_seed(seed, i, j) if seeds is None else sample_seed(seeds[i], 0, j),
                max_new_tokens,
                format_theta,
                format_t,
                t_hint=t_hints[i] if t_hints else None,
                messages_t=conversation(prompts_t[i]) if prompts_t else None,
            )
            for i, prompt in enumerate(prompts)
            for j in range(samples_per_prompt)
        )
        with self.in_evaluation():
            yield from self.decoder(DecodeOptions.of(**options)).run(requests)

    def generate(self, prompts: Iterable[str | list[dict[str, str]]], **options) -> GenerateOutput:
        """All samples at once, in the order of the prompts; arguments and errors as `stream`."""
        return GenerateOutput(sorted(self.stream(prompts, **options), key=lambda s: s.request.key))
