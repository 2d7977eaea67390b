"""One HTML file to look at samples with, every token shaded by its numbers.

The page loads nothing: plots are inside as PNG, and the samples as gzip in base64, in blocks of some thousand tokens
that the browser unpacks when it shows them. The files are read sample by sample; what stays in memory is a few float32
numbers a token. Samples are hostile input: their text reaches the page only inside those blocks and is set as
text, never as HTML, and a content security policy runs the page's own script alone.
"""

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from transformers import AutoTokenizer

from qstar.diagnostics.statistics import Numbers, analysis, plotted, read_numbers
from qstar.run.output import replacing
from qstar.run.records import NULL, Record, RunFiles
from qstar.weights import WEIGHT, derived
from qstar_kernels.types import FIELDS, OF_ROW, OF_TOKEN

CHUNK_TOKENS, CHUNK_CHARACTERS = 8192, 1 << 18  # a block ends at either: unpacked in a few milliseconds
SHOWN_DIGITS = 4
STATISTICS = {
    "tokens": "tokens",
    "alpha": "mean α",
    "kl": "mean KL",
    "kl_max": "max KL",
    "ess_ratio": "mean ESS ratio",
    "weight_theta": "log weight π_θ/q*",
    "weight_t": "log weight π_t/q*",
    "disagreement": "max disagreement",
}
# control characters but tab and newline, what reorders or hides text, and lone surrogates, which UTF-8 cannot write
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


class ReportError(RuntimeError):
    """The report cannot be made; the message is one line."""


def reveal(text: str) -> str:
    """The text with every character that would hide, reorder or break it shown by its code point."""
    return UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


class TokenTexts:
    """The text of each token of a sequence; together they are the text of the sequence.

    A token is decoded behind a letter, because decoders treat the start of a text differently. Where a character's
    bytes are spread over several tokens, the last of them gets the character and the others the empty text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = sorted(set(tokenizer.all_special_ids))
        self.vocab_size = len(tokenizer)
        self.anchor = tokenizer.encode("a", add_special_tokens=False)
        self.start = len(self._decode([]))
        self.known: dict[int, str] = {}

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(self.anchor + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def of(self, ids: list[int]) -> list[str]:
        """One text a token."""
        pieces, pending = [], []
        for i in ids:
            pending.append(i)
            if len(pending) > 1:
                text = self._decode(pending)[self.start :]
            elif (text := self.known.get(i)) is None:
                text = self.known[i] = self._decode(pending)[self.start :]
            incomplete = text.endswith("\ufffd") and len(pending) < 8
            pieces.append("" if incomplete else text)
            if not incomplete:
                pending = []
        if pending:
            pieces[-1] = self._decode(pending)[self.start :]
        return pieces


def load_tokenizer(name: str) -> TokenTexts:
    """The tokenizer of that name or folder.

    Raises:
        ReportError: it cannot be loaded.
    """
    try:
        return TokenTexts(AutoTokenizer.from_pretrained(name))
    except Exception as error:  # whatever a tokenizer's files or the hub can raise
        reason = str(error).strip().splitlines()
        raise ReportError(
            f"the tokenizer {name} cannot be loaded ({reason[0] if reason else type(error).__name__}); "
            "name its folder with --tokenizer"
        ) from None


def token_numbers(record: Record, name: str, vocab_size: int) -> dict[str, np.ndarray]:
    """The tokens' numbers, float64 [tokens] each: `id` (int64), `FIELDS`, what is `derived` of them, `disagreement`.

    Raises:
        ReportError: they are not numbers, or the ids belong to another tokenizer.
    """
    try:
        n = {"id": np.array(record.tokens["id"], dtype=np.int64)}
        for key in FIELDS:
            values = np.array(record.tokens[key], dtype=np.float64)
            n[key] = np.where(np.isnan(values), NULL.get(key, np.nan), values)
        if any(values.ndim != 1 for values in n.values()):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ReportError(f"sample {record.id!r} of {name}: its tokens are not numbers") from None
    beyond = n["id"][(n["id"] < 0) | (n["id"] >= vocab_size)]
    if len(beyond):
        raise ReportError(
            f"sample {record.id!r} of {name} has token id {beyond[0]} and the tokenizer {vocab_size} entries; "
            "name the right one with --tokenizer"
        )
    with np.errstate(invalid="ignore"):
        n |= derived(n) | {"disagreement": disagreement(n)}
    n["position"] = np.arange(len(n["id"]))
    return n


def disagreement(n: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far apart the two models' log-probabilities of each token are, in nats."""
    return np.abs(n["logp_theta"] - n["logp_t"])


def sample_statistics(n: dict[str, np.ndarray]) -> dict[str, float]:
    """A sample's value of each of `STATISTICS`; NaN where it has none."""
    ratio, apart = (n[name][~np.isnan(n[name])] for name in ("ess_ratio", "disagreement"))
    return {
        "tokens": len(n["id"]),
        "alpha": n["alpha"].mean(),
        "kl": n["kl"].mean(),
        "kl_max": n["kl"].max(),
        "ess_ratio": ratio.mean() if len(ratio) else math.nan,
        **{f"weight_{side}": n[f"log_weight_{side}"].sum() for side in WEIGHT},
        "disagreement": apart.max() if len(apart) else math.nan,
    }


class Chunks:
    """The samples as the page holds them: blocks of gzipped JSON, numbers and texts apart, since search needs only
    the texts. They go to a temporary file, because what stands above them in the page is known last."""

    def __init__(self, file: IO[bytes]):
        self.file, self.starts, self.count = file, [0], 0
        self.numbers: list[str] = []
        self.texts: list[Any] = []
        self.tokens = self.characters = 0

    def add(self, n: dict[str, np.ndarray], pieces: list[str], line: dict[str, Any]) -> None:
        """Take one sample: its tokens' numbers and texts, and its line of `x.jsonl`."""
        metadata = line.get("metadata")
        shown = json.dumps(metadata, ensure_ascii=False, indent=1) if metadata else ""
        text = [messages_of(line), reveal(str(line.get("finish_reason") or "")), reveal(shown)]
        columns = {name: decimals(np.round(n[name], SHOWN_DIGITS) + 0.0, 9) for name in OF_TOKEN}
        columns |= {name: decimals(n[name]) for name in OF_ROW}
        pairs = zip(columns["kl_theta"], columns["kl_t"], strict=True)
        columns["kl_t"] = ["null" if b == a else b for a, b in pairs]  # the same, as a rule
        heads = [json.dumps(x, ensure_ascii=False) for x in ([reveal(p) for p in pieces], n["id"].tolist())]
        arrays = [*heads, *(f"[{','.join(columns[name])}]" for name in FIELDS)]
        self.numbers.append(f"[{','.join(arrays)}]")
        self.texts.append(text)
        self.count += 1
        self.tokens += len(pieces)
        self.characters += sum(len(content) for _, content in text[0]) + len(shown)
        if self.tokens >= CHUNK_TOKENS or self.characters >= CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """End the block."""
        if not self.texts:
            return
        number = len(self.starts) - 1
        self.file.write(block(f"numbers-{number}", f"[{','.join(self.numbers)}]"))
        self.file.write(block(f"texts-{number}", json.dumps(self.texts, ensure_ascii=False)))
        self.numbers, self.texts, self.tokens, self.characters = [], [], 0, 0
        self.starts.append(self.count)


def block(name: str, content: str) -> bytes:
    """A block of data in the page: a script element that no browser runs, and holds letters and digits only."""
    data = base64.b64encode(gzip.compress(content.encode("utf-8", "replace"), 6, mtime=0))
    return f'<script type="text/plain" id="{name}">'.encode() + data + b"</script>\n"


def decimals(values: np.ndarray, digits: int = SHOWN_DIGITS) -> list[str]:
    """Each number in JSON with that many significant digits; one out of range is read as infinite, null as NaN."""
    texts = map(f"%.{digits}g".__mod__, values.tolist())
    if np.isfinite(values).all():
        return list(texts)
    return [text.replace("inf", "1e999").replace("nan", "null") for text in texts]


def messages_of(line: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and text of each message of a sample, the answer last.

    Raises:
        ReportError: that is not what `messages` holds.
    """
    try:
        messages = [(message["role"], message["content"]) for message in line["messages"]]
        if not messages:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise ReportError(f"the messages of sample {line['id']!r} are not a list of role and content") from None
    return [
        tuple(reveal(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) for x in pair) for pair in messages
    ]


def summary_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the page says about a file first, by its `analysis`: label, value, and a note on it."""
    samples, kl = result["samples"], result["fields"]["kl"]["mean"]

    def banded(name: str) -> tuple[str, str, str]:
        verdict = result["verdicts"][name]
        low, high = verdict["low"], verdict["high"]
        band = f"below {high:g}" if low == 0 else f"in {low:g} to {high:g}"
        return name, figure(verdict["mean"]), f"{verdict['tokens_inside']:.1%} {band}"

    rows = [
        ("samples", f"{samples:,}", ""),
        ("tokens", f"{result['tokens']:,}", f"{result['tokens'] / samples:.1f} a sample"),
        banded("α"),
        ("KL", figure(kl), "nats a token"),
        banded("|ΔKL|"),
        banded("ESS ratio"),
    ]
    for side, weight in WEIGHT.items():
        ess = result["weights"][side]["effective_samples"]
        rows.append((f"ESS of {weight}", figure(ess), f"{ess / samples:.1%} of the samples"))
    return rows


def figure(value: float | None) -> str:
    """A number for people, with the minus sign of typography."""
    return "none" if value is None else f"{value:.{SHOWN_DIGITS}g}".replace("-", "−").replace("inf", "∞")


def plots_of(numbers: list[Numbers]) -> list[dict[str, str]]:
    """The plots as PNG in base64, for a light and a dark page, each with a caption."""
    from qstar.diagnostics.plots import all_plots, png  # matplotlib is an extra

    return [
        {"caption": caption}
        | {theme: base64.b64encode(png(draw(theme == "dark"))).decode() for theme in ("light", "dark")}
        for _, caption, draw in all_plots(plotted(numbers))
    ]


def scale_limit(values: list[np.ndarray]) -> float:
    """Where a colour scale ends: the 99th percentile of the finite sizes, rounded up to 1, 2 or 5 · 10^k."""
    sizes = np.abs(np.concatenate(values))
    sizes = sizes[np.isfinite(sizes)]
    high = float(np.quantile(sizes, 0.99)) if len(sizes) else 0.0
    if high <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(high))
    return float(f"{next(step for step in (1, 2, 5, 10) if high <= step * power * (1 + 1e-9)) * power:.1g}")


@dataclass
class Files:
    """The files of a report: their numbers, the tokenizers' special ids, and of every sample its id and statistics."""

    numbers: list[Numbers]
    special: list[list[int]]
    ids: list[str] = field(default_factory=list)
    statistics: list[dict[str, float]] = field(default_factory=list)


def index_of(files: Files, chunks: Chunks) -> dict[str, Any]:
    """What the page's script knows of every sample before it unpacks any."""
    tokens = [numbers.tokens for numbers in files.numbers]
    with np.errstate(invalid="ignore"):
        apart = [disagreement(t) for t in tokens]
    return {
        "files": [
            {"name": reveal(numbers.name), "special": special, "samples": len(numbers.samples["num_tokens"])}
            for numbers, special in zip(files.numbers, files.special, strict=True)
        ],
        "fields": FIELDS,
        "starts": chunks.starts,
        "ids": files.ids,
        "statistics": {name: np.array([sample[name] for sample in files.statistics]) for name in STATISTICS},
        "limits": {
            "alpha": min(0.5, scale_limit([t["alpha"] - 0.5 for t in tokens])),
            "kl": scale_limit([t["kl"] for t in tokens]),
            "weight": scale_limit([t[f"log_weight_{side}"] for t in tokens for side in WEIGHT]),
            "disagreement": scale_limit(apart),
        },
    }


def index_block(index: dict[str, Any]) -> str:
    statistics = ",".join(
        f"{json.dumps(name)}:[{','.join(decimals(values, 6))}]" for name, values in index.pop("statistics").items()
    )
    return block("index", json.dumps(index, ensure_ascii=False)[:-1] + f',"statistics":{{{statistics}}}}}').decode()


def settings_table(numbers: list[Numbers]) -> list[tuple[str, list[str], bool]]:
    """Each setting with its value in every file, and whether the files differ in it."""
    names = dict.fromkeys(name for n in numbers for name in n.settings)
    rows = []
    for name in names:
        values = [n.settings.get(name) for n in numbers]
        shown = [v if isinstance(v, str) else "" if v is None else json.dumps(v, ensure_ascii=False) for v in values]
        rows.append((name, shown, len(set(shown)) > 1))
    return rows


def page(files: Files, chunks: Chunks) -> Iterator[str]:
    """The page in pieces, the blocks of samples one at a time."""
    environment = Environment(
        loader=PackageLoader("qstar.diagnostics", "."),
        autoescape=True,
        finalize=lambda value: reveal(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.jinja")
    script = "".join(template.blocks["script"](template.new_context()))
    results = [analysis(numbers) for numbers in files.numbers]
    several = len(results) > 1
    chunks.flush()
    chunks.file.seek(0)
    return template.generate(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        files=[(result["file"], summary_rows(result)) for result in results],
        plots=plots_of(files.numbers),
        settings=settings_table(files.numbers),
        notes=[f"{r['file']}: {line}" if several else line for r in results for line in r["warnings"]],
        statistics=STATISTICS,
        index=Markup(index_block(index_of(files, chunks))),
        blocks=(Markup(line.decode()) for line in chunks.file),
    )


def names_of(runs: list[RunFiles]) -> list[str]:
    """A short name a file, no two alike."""
    short = [run.name for run in runs]
    names = [str(run.samples) if short.count(name) > 1 else name for name, run in zip(short, runs, strict=True)]
    if len(set(names)) < len(names):
        raise ReportError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return names


def make_report(paths: list[Path], output: Path, tokenizer: str | None, console: Console) -> str:
    """Write the report on some runs to `output`; returns a line that says what it holds.

    Raises:
        RecordError, ReportError: a file is missing or foreign, or the tokenizer is.
        OSError: the report cannot be written.
    """
    runs = [RunFiles(path) for path in paths]
    if output.resolve() in {path.resolve() for run in runs for path in (run.samples, run.diagnostics)}:
        raise ReportError(f"--output {output} is one of the files to report on")
    names, texts, loaded = names_of(runs), [], {}
    for name, run in zip(names, runs, strict=True):
        source = tokenizer or run.settings.get("--model-theta")
        if not isinstance(source, str):
            raise ReportError(f"{name} has no x.run.json that names its models; name the --tokenizer")
        if source not in loaded:
            loaded[source] = load_tokenizer(source)
        texts.append(loaded[source])
    output.parent.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("samples"), TextColumn("{task.completed:,}"))
    with (
        TemporaryFile() as spool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        chunks, task = Chunks(spool), progress.add_task("", total=None)
        # twice over the files: what the plots and the summary need, then the samples
        numbers = [replace(read_numbers(path), name=name) for path, name in zip(paths, names, strict=True)]
        files = Files(numbers, [t.special for t in texts])
        for of_file, of_texts, run in zip(numbers, texts, runs, strict=True):
            for record in islice(run, len(of_file.samples["num_tokens"])):  # a run may have gone on meanwhile
                n = token_numbers(record, of_file.name, of_texts.vocab_size)
                chunks.add(n, of_texts.of(n["id"].tolist()), record.line)
                files.ids.append(reveal(str(record.id)))
                files.statistics.append(sample_statistics(n))
                progress.advance(task)
        with replacing(output) as file:
            for piece in page(files, chunks):
                file.write(piece.encode("utf-8"))
    for note in (note for of_file in numbers for note in of_file.notes):
        console.print(f"note: {note}", markup=False, highlight=False)
    tokens = sum(len(of_file.tokens["alpha"]) for of_file in numbers)
    return f"{output}: {len(files.ids):,} samples, {tokens:,} tokens, {output.stat().st_size / 1e6:.1f} MB"
