"""The documentation says what the code does: the README's loop runs, the guide names every option and every field."""

import re
import subprocess
import sys
from pathlib import Path

from qstar import analyze, conversation, data, merge, plan, report
from qstar.arguments import make_parser, make_score_parser, make_serve_parser
from qstar.decode import FIELDS
from qstar.experiments import __main__ as experiments

ROOT = Path(__file__).parents[1]


def test_the_loop_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(.+ α [01]\.\d{3} KL \d+\.\d{4}\n)+", done.stdout)


def test_the_calls_of_generate_in_the_guide_run(demo_pair):
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    code = re.search(r"### Inside transformers' `generate`\n\n```python\n(.*?)```", guide, re.S).group(1)
    tokenizer = demo_pair.tokenizer_theta
    tokenizer.padding_side = "left"
    names = {"tokenizer": tokenizer, "policy": demo_pair.theta, "teacher": demo_pair.t}
    exec(code, names | {"prompts": ["What is 2 + 3?", "Hi.", "How many pens are 3 pens and 4 pens?"]})


def test_the_guide_names_every_option():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    modules = analyze, report, merge, plan, experiments
    parsers = [make_parser(), make_score_parser(), make_serve_parser(), *(module.make_parser() for module in modules)]
    options = {a.option_strings[0] for parser in parsers for a in parser._actions if a.option_strings} - {"-h"}
    assert {o for o in options if f"`{o}`" not in guide and f"`{o} " not in guide} == set()
    others = {"--help", "--x", "--benchmark", "--pair", "--port"}  # the last ones are those of bench/ and of vLLM
    assert set(re.findall(r"(?<!\S)`?(--[a-z][a-z0-9-]*)", guide)) - options <= others


def test_the_guide_names_every_field():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    others = ("prompt_ids_theta", "finish_reason", "kl_gap_max", "status", "normalised_weight_theta")
    assert all(f"`{name}`" in guide for name in (*FIELDS, *others))


def test_the_guide_names_what_rows_are_read_for():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").split("### Schemas")[1].split("## Files")[0]
    columns = (*data.SYSTEM_COLUMNS, *data.TEMPLATE_COLUMNS, *(name for name, _ in data.PROMPT_COLUMNS))
    turns = (*conversation.ROLE_KEYS, *conversation.CONTENT_KEYS, *conversation.BESIDE_CONTENT)
    names = {*columns, *turns, *conversation.ROLES, *conversation.REASONING_PARTS, *sum(data.PAIRS, ()), "history"}
    assert {name for name in names if f"`{name}`" not in guide} == set()


def test_the_guide_links_to_files_that_are_there():
    for page in (
        ROOT / "docs" / "guide.md",
        ROOT / "README.md",
        *ROOT.glob("theory/*.md"),
        *ROOT.glob("qstar/*/README.md"),
    ):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_help_is_grouped_and_shows_defaults():
    text = " ".join(make_parser().format_help().split())
    for group in ("models:", "data in:", "prompts:", "rule for α", "sampling:", "decoding:", "data out:"):
        assert group in text
    assert "(default: kl_symmetry)" in text
