"""One HTML file to look at samples with, every token shaded by its numbers.

The page loads nothing: plots are inside as PNG, and the samples as gzip in base64, in blocks of some thousand tokens
that the browser unpacks when it shows them. The files are read sample by sample, and memory does not grow with them: of
many samples a random part is shown. Samples are hostile input: their text reaches the page only inside those blocks and
is set as text, never as HTML, and a content security policy runs the page's own script alone.
"""

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console
from transformers import AutoTokenizer

from qstar.diagnostics.statistics import OUTLIERS, Numbers, about, analysis, plotted, read_all, reading
from qstar.run.output import replacing
from qstar.run.records import Record, RunFiles, names_of
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
        ReportError: the ids belong to another tokenizer.
    """
    n = {"id": np.array(record.tokens["id"], dtype=np.int64)}
    n |= {field: values.astype(np.float64) for field, values in record.arrays.items()}
    beyond = n["id"][n["id"] >= vocab_size]
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
    """Role and text of each message of a sample, the answer last."""
    pairs = ((message["role"], message["content"]) for message in line["messages"])
    return [
        tuple(reveal(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) for x in pair) for pair in pairs
    ]


def summary_rows(result: dict[str, Any], several_kinds: bool) -> list[tuple[str, str, str]]:
    """What the page says about a file first, by its `analysis`: label, value, and a note on it.

    `several_kinds`: q* drew the answers of some files, and of others not.
    """
    samples, kl = result["samples"], result["fields"]["kl"]["mean"]

    def banded(name: str) -> tuple[str, str, str]:
        verdict = result["verdicts"][name]
        low, high = verdict["low"], verdict["high"]
        band = f"below {high:g}" if low == 0 else f"in {low:g} to {high:g}"
        inside = f"{verdict['tokens_inside']:.1%} {band}"
        if verdict["met"] != verdict["met_without_outliers"]:
            middle = figure(verdict["mean_without_outliers"])
            inside += f"; {middle} without the farthest {OUTLIERS:.0%} of the tokens"
        return name, figure(verdict["mean"]), inside

    rows = [
        ("samples", f"{samples:,}", ""),
        ("tokens", f"{result['tokens']:,}", f"{result['tokens'] / samples:.1f} a sample"),
        banded("α"),
        ("KL", figure(kl), "nats a token"),
        banded("|ΔKL|"),
        banded("ESS ratio"),
    ]
    for side, weight in WEIGHT.items():
        if side in result["weights"]:
            ess = result["weights"][side]["effective_samples"]
            rows.append((f"ESS of {weight}", figure(ess), f"{ess / samples:.1%} of the samples"))
        elif several_kinds:
            rows.append((f"ESS of {weight}", "–", "not drawn from q*"))
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
    """The files of a report: their numbers, the tokenizers' special ids, how many samples are shown, and of every such
    sample its id and statistics."""

    numbers: list[Numbers]
    special: list[list[int]]
    shown: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    statistics: list[dict[str, float]] = field(default_factory=list)

    @property
    def part(self) -> str:
        """Which of the samples are shown."""
        count = sum(len(numbers.samples["num_tokens"]) for numbers in self.numbers)
        return f"{count:,} samples" if count == len(self.ids) else f"{len(self.ids):,} of {count:,} samples at random"


def index_of(files: Files, chunks: Chunks) -> dict[str, Any]:
    """What the page's script knows of every sample before it unpacks any."""
    tokens = [numbers.tokens for numbers in files.numbers]
    with np.errstate(invalid="ignore"):
        apart = [disagreement(t) for t in tokens]
    return {
        "files": [
            {"name": reveal(numbers.name), "special": special, "samples": shown, "drawn": numbers.drawn}
            for numbers, special, shown in zip(files.numbers, files.special, files.shown, strict=True)
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
    several, kinds = len(results) > 1, {result["drawn_from_q"] for result in results}
    chunks.flush()
    chunks.file.seek(0)
    return template.generate(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawn=all(result["drawn_from_q"] for result in results),
        part=files.part if len(files.ids) < sum(result["samples"] for result in results) else "",
        files=[(result["file"], summary_rows(result, len(kinds) > 1)) for result in results],
        plots=plots_of(files.numbers),
        settings=settings_table(files.numbers),
        notes=[f"{r['file']}: {line}" if several else line for r in results for line in [*about(r), *r["warnings"]]],
        statistics=STATISTICS,
        index=Markup(index_block(index_of(files, chunks))),
        blocks=(Markup(line.decode()) for line in chunks.file),
    )


def chosen(numbers: list[Numbers], max_samples: int) -> list[set[int] | None]:
    """Of each file the numbers of the samples that are shown, drawn at random from all together; None for all."""
    counts = [len(n.samples["num_tokens"]) for n in numbers]
    if sum(counts) <= max_samples:
        return [None] * len(counts)
    drawn = np.sort(np.random.default_rng(0).choice(sum(counts), max_samples, replace=False))
    starts = np.cumsum([0, *counts])
    return [set((drawn[(drawn >= a) & (drawn < b)] - a).tolist()) for a, b in pairwise(starts)]


def make_report(
    paths: list[Path | str], output: Path, tokenizer: str | None, console: Console, max_samples: int
) -> str:
    """Write the report on some runs to `output`; returns a line that says what it holds.

    Raises:
        RecordError, ReportError: a file is missing or foreign, or the tokenizer is.
        OSError: the report cannot be written.
    """
    runs = [RunFiles(path) for path in paths]
    if str(output.resolve()) in {str(Path(place.path).resolve()) for run in runs for place in run.places}:
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
    # twice over the files: what the plots and the summary need, then the samples
    numbers = read_all(runs, names, console)
    files = Files(numbers, [t.special for t in texts])
    with (
        TemporaryFile() as spool,
        reading(console, sum(run.size for run in runs), "samples") as bar,
        replacing(output) as file,
    ):
        chunks, before = Chunks(spool), 0
        wanted = chosen(numbers, max_samples)
        for of_file, of_texts, run, shown in zip(numbers, texts, runs, wanted, strict=True):
            count = len(of_file.samples["num_tokens"])  # a run may have gone on meanwhile
            shown = range(count) if shown is None else shown
            for record in islice(run.records(shown.__contains__), len(shown)):
                n = token_numbers(record, of_file.name, of_texts.vocab_size)
                chunks.add(n, of_texts.of(n["id"].tolist()), with_prompt(record, of_texts))
                files.ids.append(reveal(str(record.id)))
                files.statistics.append(sample_statistics(n))
                bar.update(bar.task_ids[0], completed=before + run.read)
            files.shown.append(len(shown))
            before += run.size
        for piece in page(files, chunks):
            file.write(piece.encode("utf-8"))
    for note in (note for of_file in numbers for note in of_file.notes):
        console.print(f"note: {note}", markup=False, highlight=False)
    tokens = sum(of_file.count for of_file in numbers)
    return f"{output}: {files.part}, {tokens:,} tokens, {output.stat().st_size / 1e6:.1f} MB"


def with_prompt(record: Record, texts: TokenTexts) -> dict[str, Any]:
    """The sample's line; where its format has no conversation before the answer, with the prompt as π_θ saw it."""
    line, ids = record.line, record.diagnostics.get("prompt_ids_theta")
    if len(line["messages"]) > 1 or not ids:
        return line
    return line | {"messages": [{"role": "prompt", "content": "".join(texts.of(ids))}, *line["messages"]]}
