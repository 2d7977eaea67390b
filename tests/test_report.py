"""The report in a real browser: what it shows is what the files say, it loads nothing, and no sample gets to run."""

import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from transformers import AutoTokenizer

import qstar.generate
import qstar.pair
from qstar.demo import THETA
from qstar.diagnostics.page import STATISTICS, TokenTexts, reveal
from qstar.report import main
from qstar_kernels.types import FIELDS

CHROMIUM = shutil.which("chromium")
ARGUMENTS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
FIELD_LABELS = {
    "log q*": "logq", "log π_θ": "logp_theta", "log π_t": "logp_t", "α": "alpha", "KL(q*‖π_θ)": "kl_theta",
    "KL(q*‖π_t)": "kl_t", "ESS_θ": "ess_theta", "ESS_t": "ess_t",
}  # fmt: skip
HOSTILE = [
    "</script><script>window.__pwned = 1</script>",
    "<img src=x onerror=\"window.__pwned = 2; alert('x')\">",
    "<svg onload=window.__pwned=3><a href='javascript:window.__pwned=4'>go</a>",
    "{{ 7 * 7 }} {% raw %} ${window.__pwned = 5}",
    "&lt;b&gt; <!-- <script> -->",
    "left\u202eright\u2066x\u200b",
    "bell\x07 null\x00 return\r escape\x1b[31m",
    "alone \ud800 and \udfff",
    "w" * 3000,
    "عربي שלום \u2028 日本語 👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA)


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo_pair) -> Path:
    """64 samples of the demo pair, as the command writes them."""
    path = tmp_path_factory.mktemp("run") / "demo.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qstar.pair.Pair, "from_pretrained", classmethod(lambda *_, **__: demo_pair))
        argv = ["--num-samples", "64", "--max-new-tokens", "24", "--save-diagnostics", "--output", str(path)]
        assert qstar.generate.main(argv) == 0
    return path


@pytest.fixture(scope="module")
def demo(run) -> Path:
    output = run.with_name("report.html")
    assert main([str(run), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser):
    """Opens a report; afterwards there must have been no error, no dialog, and no request but for the file."""
    contexts, seen, files = [], [], set()

    def open_report(path: Path, fragment: str = "", **options) -> Page:
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        # what the page's policy stopped has not left the machine; it has complained to the console instead
        page.on("requestfailed", lambda request: files.discard(request.url) if request.failure == "csp" else 0)
        page.on(
            "request", lambda request: files.add(request.url.partition("#")[0]) if request.url[:5] != "data:" else 0
        )
        files.discard(path.as_uri())
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-drawn]")
        assert files == {path.as_uri()}
        return page

    def take_seen() -> list[str]:
        taken, seen[:] = seen[:], []
        return taken

    open_report.take_seen = take_seen
    yield open_report
    for context in contexts:
        context.close()
    assert seen == []
    assert len(files) <= 1  # requests after the first are the same file again, if any
    assert all(url.startswith("file://") for url in files)


def redrawn(page: Page, action) -> None:
    """Do something, and wait until the list has been drawn again."""
    before = page.get_attribute("html", "data-drawn")
    action()
    page.wait_for_function("before => document.documentElement.dataset.drawn !== before", arg=before)


def ids_shown(page: Page) -> list[str]:
    return page.locator("#list h3").all_text_contents()


def tokens_of(page: Page, sample: int):
    return page.locator(f"[id='sample:{sample}'] .token")


def panel(page: Page) -> dict[str, str]:
    """The numbers beside the token, by label."""
    labels, values = page.locator("#panel dt").all_text_contents(), page.locator("#panel dd").all_text_contents()
    return dict(zip(labels, values, strict=True))


def parsed(text: str) -> float:
    return {"−∞": -math.inf, "∞": math.inf, "none": math.nan}.get(text) or float(text.replace("−", "-"))


def diagnostics(path: Path) -> list[dict]:
    with path.with_suffix(".diagnostics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def statistics(d: dict) -> dict[str, float]:
    """The sample statistics straight from their definitions, in float64."""
    t = {name: np.array([-math.inf if x is None else x for x in d["tokens"][name]]) for name in FIELDS}
    kl = np.maximum(t["kl_theta"], t["kl_t"])
    return {
        "tokens": len(kl),
        "alpha": np.mean(t["alpha"]),
        "kl": np.mean(kl),
        "kl_max": np.max(kl),
        "ess_ratio": np.mean(t["ess_theta"] / t["ess_t"]),
        "weight_theta": np.sum(t["logp_theta"] - t["logq"]),
        "weight_t": np.sum(t["logp_t"] - t["logq"]),
        "disagreement": np.max(np.abs(t["logp_theta"] - t["logp_t"])),
    }


def write_run(path: Path, tokenizer, texts: list[tuple[str, str]], settings=None, seed: int = 0, **changes) -> Path:
    """A run with given prompts and answers and random numbers; `changes` replace fields of every line."""
    rng = np.random.default_rng(seed)
    with path.open("w") as samples, path.with_suffix(".diagnostics.jsonl").open("w") as numbers:
        for i, (prompt, answer) in enumerate(texts):
            ids = [*tokenizer.encode(answer.encode("utf-8", "replace").decode(), add_special_tokens=False), 0]
            key = {"id": f"{i}-0", "prompt_index": i, "sample_index": 0, "num_tokens": len(ids)} | changes
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            samples.write(
                json.dumps(key | {"messages": messages, "finish_reason": "eos", "metadata": {"note": prompt}})
            )
            values = {name: rng.exponential(0.3, len(ids)).round(5).tolist() for name in FIELDS}
            values |= {name: [-x for x in values[name]] for name in ("logq", "logp_theta", "logp_t")}
            values["alpha"] = rng.uniform(0, 1, len(ids)).round(5).tolist()
            numbers.write(json.dumps(key | {"tokens": {"id": ids} | values}))
            samples.write("\n")
            numbers.write("\n")
    path.with_suffix(".run.json").write_text(json.dumps({"--model-theta": str(THETA)} | (settings or {})))
    return path


def test_it_renders_what_the_files_say(opened, demo, run):
    page = opened(demo)
    rows = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
    assert ids_shown(page) == [row["id"] for row in rows[:25]]
    assert page.locator(".pager .found").first.text_content() == "64 samples"
    for i, row in enumerate(rows[:25]):
        *_, prompt, answer = row["messages"]
        assert page.locator(f"[id='sample:{i}'] .text").first.text_content() == prompt["content"]
        plain = tokens_of(page, i).locator(":scope:not(.special)").all_text_contents()
        assert "".join(plain) == answer["content"]
    assert tokens_of(page, 0).last.text_content() == "<|end|>"
    assert page.locator("figure img.for-light").evaluate_all(
        "all => all.every(i => i.complete && i.naturalWidth > 300)"
    )
    said = dict(
        zip(
            page.locator(".summary thead th").all_text_contents(),
            page.locator(".summary b").all_text_contents(),
            strict=True,
        )
    )
    all_tokens = [statistics(d) for d in diagnostics(run)]
    n = sum(s["tokens"] for s in all_tokens)
    assert said["samples"] == "64"
    assert said["tokens"] == f"{n:,}"
    for label, name in (("α", "alpha"), ("KL", "kl")):
        assert parsed(said[label]) == pytest.approx(sum(s[name] * s["tokens"] for s in all_tokens) / n, rel=1e-3)
    for label, name in (("ESS of π_θ/q*", "weight_theta"), ("ESS of π_t/q*", "weight_t")):
        weights = np.exp([s[name] for s in all_tokens])
        assert parsed(said[label]) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-3)
    names, values = (page.locator(f".settings {cell}").all_text_contents() for cell in ("th", "td"))
    assert dict(zip(names, values, strict=True))["--max-new-tokens"] == "24"


def test_shading_follows_the_field(opened, demo, run):
    page, t = opened(demo), diagnostics(run)[0]["tokens"]
    values = {
        "alpha": np.array(t["alpha"]) - 0.5,
        "kl": np.maximum(t["kl_theta"], t["kl_t"]),
        "weight_theta": np.subtract(t["logp_theta"], t["logq"]),
        "weight_t": np.subtract(t["logp_t"], t["logq"]),
        "disagreement": np.abs(np.subtract(t["logp_theta"], t["logp_t"])),
    }
    assert page.locator("#shade option").evaluate_all("all => all.map(o => o.value)") == list(values)
    backgrounds = []
    for name, expected in values.items():
        page.select_option("#shade", name)
        limit = parsed(page.locator(".ticks span").last.text_content().removeprefix("≥ ")) - 0.5 * (name == "alpha")
        amounts = tokens_of(page, 0).evaluate_all("all => all.map(e => Number(e.style.getPropertyValue('--v')))")
        low = tokens_of(page, 0).evaluate_all("all => all.map(e => e.classList.contains('low'))")
        assert amounts == pytest.approx(np.minimum(1, np.abs(expected) / limit), abs=2e-3)
        assert all(x < 1e-4 for x, is_low in zip(expected, low, strict=True) if is_low)
        assert all(x > -1e-4 for x, is_low in zip(expected, low, strict=True) if not is_low)
        strongest = int(np.argmax(amounts))
        colors = tokens_of(page, 0).evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
        assert len(set(colors)) > 1
        backgrounds.append(colors[strongest])
        assert page.locator("#legend-label").text_content() == page.locator("#shade option:checked").text_content()
    assert len(set(backgrounds)) == len(values)


def test_sorting_by_every_statistic(opened, demo, run):
    page, samples = opened(demo), diagnostics(run)
    by_id = {d["id"]: statistics(d) for d in samples}
    assert page.locator("#sort option").evaluate_all("all => all.map(o => o.value)") == ["", *STATISTICS]
    for name in STATISTICS:
        redrawn(page, lambda name=name: page.select_option("#sort", name))
        for direction in (1, -1):
            ordered = sorted((s[name] for s in by_id.values()), reverse=direction < 0)[:25]
            assert [by_id[i][name] for i in ids_shown(page)] == pytest.approx(ordered, rel=1e-4, abs=1e-9)
            label = STATISTICS[name]
            said = (
                page.locator("#list .sorted dt").all_text_contents(),
                page.locator("#list .sorted dd").all_text_contents(),
            )
            assert set(said[0]) == {label}
            assert [parsed(x) for x in said[1]] == pytest.approx(ordered, rel=1e-3, abs=1e-9)
            redrawn(page, lambda: page.click("#direction"))
    redrawn(page, lambda: page.select_option("#sort", ""))
    redrawn(page, lambda: page.click("#direction"))
    assert ids_shown(page) == [d["id"] for d in reversed(samples)][:25]


def test_search_and_pages(opened, demo, run):
    page, rows = opened(demo), [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
    assert page.locator(".pages").first.text_content() == "of 3"
    assert page.locator(".previous").first.is_disabled()
    redrawn(page, lambda: page.locator(".next").last.click())
    assert ids_shown(page) == [row["id"] for row in rows[25:50]]
    redrawn(page, lambda: (page.locator(".pager input").first.fill("3"), page.keyboard.press("Enter")))
    assert ids_shown(page) == [row["id"] for row in rows[50:]]
    assert page.locator(".next").first.is_disabled()
    word = rows[60]["messages"][0]["content"].split()[0]
    matching = [r["id"] for r in rows if any(word.lower() in m["content"].lower() for m in r["messages"])]
    assert 0 < len(matching) < 64
    redrawn(page, lambda: page.fill("#search", word.upper()))
    assert ids_shown(page) == matching[:25]
    assert page.locator(".found").first.text_content() == f"{len(matching)} of 64 samples contain “{word.upper()}”"
    assert page.evaluate("CSS.highlights.get('found').size") >= min(25, len(matching))
    redrawn(page, lambda: page.fill("#search", "no such text"))
    assert ids_shown(page) == []
    redrawn(page, lambda: page.fill("#search", ""))
    assert len(ids_shown(page)) == 25


def test_a_link_leads_to_its_sample(opened, demo, run):
    page = opened(demo, "#40-0")
    assert page.locator(".sample.linked h3").text_content() == "40-0"
    assert page.locator(".sample.linked").evaluate("e => e.getBoundingClientRect().top < innerHeight")
    redrawn(page, lambda: page.fill("#search", "no such text"))
    redrawn(page, lambda: page.evaluate("location.hash = '#3-0'"))
    assert page.locator(".sample.linked h3").text_content() == "3-0"
    assert page.locator(".sample.linked h3 a").get_attribute("href") == "#3-0"


def test_the_numbers_of_a_token(opened, demo, run):
    page, d = opened(demo), diagnostics(run)[1]
    t = d["tokens"]

    def check(k: int) -> None:
        said = panel(page)
        assert (said["id"], said["position"]) == (str(t["id"][k]), str(k))
        for label, name in FIELD_LABELS.items():
            assert parsed(said[label]) == pytest.approx(t[name][k], rel=6e-4, abs=6e-5), label
        assert parsed(said["log π_θ/q*"]) == pytest.approx(t["logp_theta"][k] - t["logq"][k], rel=6e-4, abs=2e-4)
        assert parsed(said["log π_t/q*"]) == pytest.approx(t["logp_t"][k] - t["logq"][k], rel=6e-4, abs=2e-4)

    for k in (0, 3, len(t["id"]) - 1):
        tokens_of(page, 1).nth(k).hover()
        check(k)
    page.locator("h1").hover()
    assert page.locator("#panel").is_hidden()
    page.locator("[id='sample:1'] .token").first.focus()
    for k in (1, 2):
        page.keyboard.press("ArrowRight")
        check(k)
    page.keyboard.press("End")
    check(len(t["id"]) - 1)
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    page.locator("h1").hover()
    tokens_of(page, 1).nth(2).click()
    page.locator("h1").hover()
    check(2)  # a click keeps it


def test_a_phone(opened, demo, run):
    page = opened(demo, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tokens_of(page, 0).nth(2).tap()
    assert panel(page)["id"] == str(diagnostics(run)[0]["tokens"]["id"][2])
    box = page.locator("#panel").bounding_box()
    assert box["x"] == 0
    assert box["width"] == 360
    assert box["y"] + box["height"] == pytest.approx(740, abs=1)
    page.locator("#panel button").tap()
    assert page.locator("#panel").is_hidden()
    page.locator("details.settings summary").tap()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_light_and_dark(opened, demo):
    def background(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def contrast(page: Page) -> float:
        """The least contrast of text on a fully shaded token, over all fields and both sides."""
        script = """() => {
            const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const rgb = (...colors) => {
                for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
                return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255);
            };
            const luminance = (c) => c.map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
                .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
            const token = document.querySelector(".token"), shade = document.getElementById("shade"), all = [];
            for (const { value } of shade.options) {
                shade.value = value;
                shade.dispatchEvent(new Event("change"));
                for (const low of [false, true]) {
                    token.style.setProperty("--v", "1");
                    token.classList.toggle("low", low);
                    const style = getComputedStyle(token), surface = getComputedStyle(token.closest(".sample"));
                    const colors = [rgb(surface.backgroundColor, style.backgroundColor), rgb(style.color)];
                    const [a, b] = colors.map(luminance);
                    all.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
                }
            }
            return Math.min(...all);
        }"""
        return page.evaluate(script)

    light, dark = opened(demo, color_scheme="light"), opened(demo, color_scheme="dark")
    assert background(light) != background(dark)
    for page, name in ((light, "light"), (dark, "dark")):
        assert page.locator(f"img.for-{name}").first.is_visible()
        assert contrast(page) >= 4.5  # WCAG AA
    before = background(light)
    light.click("#theme")
    assert background(light) == background(dark)
    assert light.locator("img.for-dark").first.is_visible()
    assert light.locator("img.for-light").first.is_hidden()
    light.click("#theme")
    assert background(light) == before


def test_a_hostile_sample_runs_nothing(opened, tmp_path, tokenizer):
    texts = [(f"{text} prompt", f"{text} answer") for text in HOSTILE]
    settings = {"--model-t": HOSTILE[0], HOSTILE[1]: HOSTILE[7], "--seed": 0}
    write_run(tmp_path / "bad.jsonl", tokenizer, texts, settings)
    odd = write_run(tmp_path / "<img src=x onerror=alert(1)>.jsonl", tokenizer, texts[:2], settings, id=HOSTILE[0])
    output = tmp_path / "report.html"
    assert main([str(tmp_path / "bad.jsonl"), str(odd), "--output", str(output)]) == 0
    page = opened(output)
    for _ in range(2):
        page.wait_for_timeout(200)
        assert page.evaluate("window.__pwned") is None
        page.locator(".token").first.hover()
        page.locator("summary").first.click()
    for i, (prompt, answer) in enumerate(texts):
        shown = page.locator(f"[id='sample:{i}'] .text").first
        if len(prompt) > 1200:
            page.locator(f"[id='sample:{i}'] .more").first.click()
        assert shown.text_content() == reveal(prompt)
        sent = answer.encode("utf-8", "replace").decode()  # what a tokenizer can be given of a lone surrogate
        for more in page.locator(f"[id='sample:{i}'] .more").all():
            more.click()
        assert "".join(tokens_of(page, i).all_text_contents()) == reveal(sent) + "<|end|>"
        metadata = json.dumps({"note": prompt}, ensure_ascii=False, indent=1)
        assert page.locator(f"[id='sample:{i}'] pre").text_content() == reveal(metadata)
    assert not page.evaluate(r"/[\u202e\u2066\u200b\0\x1b\ufeff]/.test(document.documentElement.textContent)")
    assert reveal("a\u202eb\x00\ud800\n\t") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩\n\t"
    assert page.locator("#list h3").last.text_content() == HOSTILE[0]
    assert page.locator(".settings td").filter(has_text=HOSTILE[0]).count() == 2
    redrawn(page, lambda: page.fill("#search", HOSTILE[1]))
    assert len(ids_shown(page)) == 2
    assert page.evaluate("document.querySelectorAll('#list :is(script, img, svg, [onerror], [onload])').length") == 0
    assert set(page.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href')[0])")) == {"#"}
    # the whole file holds one script that runs, and the second wall stands: what is let in still cannot run or load
    assert re.findall(r"<script(?! type=\"text/plain\" id=\"[a-z0-9-]+\">)", output.read_text(encoding="utf-8")) == [
        "<script"
    ]
    blocked = """async () => {
        const violations = [];
        addEventListener("securitypolicyviolation", (event) => violations.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.__pwned = 9";
        const image = new Image();
        image.src = "https://example.org/x.png";
        document.body.append(script, image);
        await fetch("https://example.org/").catch(() => 0);
        await new Promise((resolve) => setTimeout(resolve, 100));
        return violations.sort();
    }"""
    assert page.evaluate(blocked) == ["connect-src", "img-src", "script-src-elem"]
    assert page.evaluate("window.__pwned") is None
    complaints = opened.take_seen()
    assert complaints
    assert all("Content Security Policy" in complaint for complaint in complaints)


def test_a_hostile_page_does_not_widen_a_phone(opened, tmp_path, tokenizer):
    texts = [(text, text) for text in HOSTILE]
    path = write_run(tmp_path / ("n" * 150 + ".jsonl"), tokenizer, texts, {"--stop": "w" * 500}, id="i" * 400)
    assert main([str(path), "--output", str(tmp_path / "r.html")]) == 0
    page = opened(tmp_path / "r.html", viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_several_files(opened, tmp_path, tokenizer):
    for name, count, seed in (("a", 3, 1), ("b", 2, 2)):
        texts = [(f"question {i} {name}", f"answer {i}") for i in range(count)]
        write_run(tmp_path / f"{name}.jsonl", tokenizer, texts, {"--seed": seed}, seed=seed)
    assert (
        main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.diagnostics.jsonl"), "--output", str(tmp_path / "r.html")])
        == 0
    )
    page = opened(tmp_path / "r.html", "#b/1-0")
    assert page.locator(".summary tbody th").all_text_contents() == ["a", "b"]
    assert page.locator("tr.differs").all_text_contents() == ["--seed12"]
    assert page.locator(".sample.linked .text").first.text_content() == "question 1 b"
    redrawn(page, lambda: page.select_option("#file", label="b"))
    assert page.locator(".sample .text:not(.tokens)").all_text_contents() == ["question 0 b", "question 1 b"]
    redrawn(page, lambda: page.select_option("#file", ""))
    assert len(ids_shown(page)) == 5


def test_numbers_that_json_has_not(opened, tmp_path, tokenizer):
    path = write_run(tmp_path / "x.jsonl", tokenizer, [("q", "one two"), ("q", "one two")])
    lines = diagnostics(path)
    lines[0]["tokens"]["logp_t"][0] = lines[0]["tokens"]["kl_t"][0] = None
    lines[0]["tokens"]["ess_t"] = [0.0] * len(lines[0]["tokens"]["ess_t"])
    path.with_suffix(".diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(path), "--output", str(tmp_path / "r.html")]) == 0
    page = opened(tmp_path / "r.html")
    tokens_of(page, 0).first.hover()
    said = panel(page)
    assert (said["log π_t"], said["log π_t/q*"], said["KL(q*‖π_t)"], said["disagreement"]) == ("−∞", "−∞", "∞", "∞")
    assert page.locator("[id='sample:0'] dd").all_text_contents().count("none") == 1  # the ESS ratio
    redrawn(page, lambda: page.select_option("#sort", "weight_t"))
    assert ids_shown(page) == ["0-0", "1-0"]  # −∞ is the lowest
    redrawn(page, lambda: page.select_option("#sort", "ess_ratio"))
    assert ids_shown(page) == ["1-0", "0-0"]  # none comes last


@pytest.mark.slow
def test_ten_thousand_samples(opened, tmp_path, tokenizer):
    words = "the quick brown fox jumps over a lazy dog and so on until there are some forty tokens in it".split()
    rng = np.random.default_rng(7)
    base = write_run(tmp_path / "base.jsonl", tokenizer, [("p", " ".join(rng.permutation(words))) for _ in range(50)])
    tokens = [
        line.partition('"tokens": ')[2] for line in base.with_suffix(".diagnostics.jsonl").read_text().splitlines()
    ]
    answers = [json.loads(line)["messages"][1] for line in base.read_text().splitlines()]
    with (tmp_path / "x.jsonl").open("w") as samples, (tmp_path / "x.diagnostics.jsonl").open("w") as numbers:
        for i in range(10_000):
            key = f'"id": "{i}-0", "prompt_index": {i}, "sample_index": 0'
            prompt = {"role": "user", "content": f"This is question number {i} of many"}
            samples.write(f'{{{key}, "messages": {json.dumps([prompt, answers[i % 50]])}}}\n')
            numbers.write(f'{{{key}, "tokens": {tokens[i % 50]}\n')
    output = tmp_path / "r.html"
    assert main([str(tmp_path / "x.jsonl"), "--tokenizer", str(THETA), "--output", str(output)]) == 0
    start = time.monotonic()
    page = opened(output)
    seconds = time.monotonic() - start
    print(f"{output.stat().st_size / 1e6:.1f} MB, first page after {seconds:.2f} s")
    assert seconds < 8
    assert page.locator(".found").first.text_content() == "10,000 samples"
    start = time.monotonic()
    redrawn(page, lambda: page.fill("#search", "NUMBER 9876 "))
    print(f"search after {time.monotonic() - start:.2f} s")
    assert ids_shown(page) == ["9876-0"]
    redrawn(page, lambda: page.fill("#search", ""))
    redrawn(page, lambda: page.select_option("#sort", "kl"))
    assert len(ids_shown(page)) == 25


def test_of_many_a_random_part_is_shown_and_the_summary_is_of_all(opened, tmp_path, tokenizer, capsys):
    """Of two files of one name, one of them scored."""
    for name, count, settings in (("a", 30, {}), ("b", 10, {"--no-eos": False})):
        (tmp_path / name).mkdir()
        write_run(
            tmp_path / name / "x.jsonl", tokenizer, [(f"question {i}", "one two") for i in range(count)], settings
        )
    paths = [str(tmp_path / name / "x.jsonl") for name in ("a", "b")]
    for _ in range(2):
        assert main([*paths, "--max-samples", "12", "--output", str(tmp_path / "r.html")]) == 0
        assert "12 of 40 samples at random" in capsys.readouterr().out
    page = opened(tmp_path / "r.html")
    assert len(set(ids_shown(page))) >= 8
    assert len(ids_shown(page)) == 12
    assert "12 of 40 samples at random" in page.locator("main").text_content()
    assert page.locator(".summary tbody th").all_text_contents() == ["a/x", "b/x"]
    assert page.locator(".summary td[data-label=samples] b").all_text_contents() == ["30", "10"]
    assert "b/x: q* did not draw these answers" in page.locator(".notes").text_content()
    assert page.locator(".summary td[data-label='ESS of π_t/q*'] b").all_text_contents()[1] == "–"
    roles = page.locator(".sample .message:nth-last-of-type(1) .role").all_text_contents()
    assert set(roles) == {"q*", "answer"}


def test_all_that_is_listed_is_printed(opened, demo, run):
    page = opened(demo)
    page.wait_for_timeout(500)
    page.emulate_media(media="print")
    redrawn_later = page.get_attribute("html", "data-drawn")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(ids_shown(page)) == 64
    assert "64 samples, tokens shaded by α" in page.locator("#printed").text_content()
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".controls").is_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_function("before => document.documentElement.dataset.drawn !== before", arg=redrawn_later)
    assert len(ids_shown(page)) == 25


def test_pieces_make_up_the_text(tokenizer):
    texts = TokenTexts(tokenizer)
    for text in ("Tom has 3 pens.\n\n#### 5", "naïve café 👩‍👩‍👧 日本", " leading", "", "\ufffd odd"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = texts.of(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
    half = tokenizer.encode("é", add_special_tokens=False)[:1]
    assert texts.of([*half, *tokenizer.encode("a")]) == ["", "\ufffda"]
    assert texts.of(half) == ["\ufffd"]
    assert texts.of([0]) == ["<|end|>"]


@pytest.mark.parametrize(
    "case", ["missing", "no tokenizer", "unloadable", "foreign", "ids", "twice", "folder", "messages"]
)
def test_one_line_for_what_is_wrong(tmp_path, capsys, tokenizer, case):
    path = write_run(tmp_path / "x.jsonl", tokenizer, [("q", "a b c")])
    argv, said, status = [str(path)], "", 1
    if case == "missing":
        argv, said = [str(tmp_path / "no.jsonl")], "does not exist"
    elif case == "no tokenizer":
        path.with_suffix(".run.json").unlink()
        said = "name the --tokenizer"
    elif case == "unloadable":
        argv, said = [*argv, "--tokenizer", str(tmp_path)], "name its folder with --tokenizer"
    elif case == "foreign":
        path.write_text('{"a": 1}\n')
        said = "is not what qstar.generate or qstar.score writes"
    elif case == "ids":
        d = diagnostics(path)[0]
        d["tokens"]["id"][0] = 10**6
        path.with_suffix(".diagnostics.jsonl").write_text(json.dumps(d) + "\n")
        said = "has token id 1000000 and the tokenizer"
    elif case == "twice":
        argv, said = [*argv, str(path)], "is given twice"
    elif case == "folder":
        argv, said, status = [*argv, "--output", str(tmp_path)], "is a folder", 2
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"messages": ["<b>"]}) + "\n")
        said = "line 1 of"
    if "--output" not in argv:
        argv += ["--output", str(tmp_path / "r.html")]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == status
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.glob("r.html*")) == []


def test_what_is_torn_is_left_out_and_said(opened, tmp_path, capsys, tokenizer):
    path = write_run(tmp_path / "x.jsonl", tokenizer, [("q", "one"), ("q", "two")])
    path.write_bytes(path.read_bytes()[:-20])
    assert main([str(path), "--output", str(tmp_path / "r.html")]) == 0
    assert "is torn and left out" in capsys.readouterr().err
    page = opened(tmp_path / "r.html")
    assert ids_shown(page) == ["0-0"]
    assert "is torn and left out" in page.locator(".notes").text_content()
