"""The documentation says what the code does: the README's loop runs, the guide names every option and every field."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from qstar import analyze, conversation, generate, merge, pair, plan, prompting, report, score, serve
from qstar.data import answers, batch, files, prompts, rows
from qstar.experiments import __main__ as experiments
from qstar.run import run, scoring
from qstar_kernels.types import FIELDS

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
    parsers = [module.make_parser() for module in (generate, score, serve, analyze, report, merge, plan, experiments)]
    options = {a.option_strings[0] for parser in parsers for a in parser._actions if a.option_strings} - {"-h"}
    assert {o for o in options if f"`{o}`" not in guide and f"`{o} " not in guide} == set()
    # of bench/, vLLM, pip and torchrun
    others = set("--help --x --benchmark --pair --port --no-deps --nproc-per-node --served-model-name".split())
    assert set(re.findall(r"(?<!\S)`?(--[a-z][a-z0-9-]*)", guide)) - options <= others


def test_the_guide_names_every_field():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    others = ("prompt_ids_theta", "finish_reason", "kl_gap_max", "status", "normalised_weight_theta")
    assert all(f"`{name}`" in guide for name in (*FIELDS, *others))


def schemas_in_the_guide() -> str:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    return guide.split("### Schemas")[1].split("## Files\n")[0].replace("\\*", "*")


def test_the_guide_names_every_kind_of_file():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").split("### Files of rows")[1].split("###")[0]
    named = set(re.findall(r"`(\.[a-z0-9]+)`", guide))
    assert named == {*files.TEXT_EXTENSIONS, *files.TABLE_EXTENSIONS, *files.PACKED, files.ARCHIVE}
    assert f"more than {rows.DEEPEST} levels" in guide
    assert guide.count(f"{rows.DOUBT:,} characters") == 2
    assert f"the first {prompts.PEEK_ROWS} rows" in guide


def test_the_guide_has_the_schemas_in_their_order():
    table = schemas_in_the_guide().split("| the prompt |")[1].split("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    requests = ["custom_id", *(f"body.{name}" for name in batch.ENDPOINTS.values())]
    columns = [name for name, _ in prompts.PROMPT_COLUMNS]
    after = columns.index("prompt") + 1
    assert named == requests + columns[:after] + list(sum(prompts.PAIRS, ())) + columns[after:]


def test_the_guide_names_what_rows_are_read_for():
    guide = schemas_in_the_guide()
    columns = (*prompts.SYSTEM_COLUMNS, *prompts.TEMPLATE_COLUMNS, *(name for name, _ in prompts.PROMPT_COLUMNS))
    turns = (*conversation.ROLE_KEYS, *conversation.CONTENT_KEYS, *conversation.BESIDE_CONTENT)
    names = {*columns, *turns, *conversation.ROLES, *conversation.REASONING_PARTS, *sum(prompts.PAIRS, ()), "history"}
    names |= {*conversation.MEDIA, *batch.ENDPOINTS, *batch.ITEMS, *batch.USED, *batch.NEUTRAL}
    assert {name for name in names if f"`{name}`" not in guide} == set()
    roles = dict.fromkeys(conversation.ROLES.values(), ())
    for name, role in conversation.ROLES.items():
        roles[role] += () if name in conversation.CALLS else (name,)
    for role, names in roles.items():
        (listed,) = re.findall(rf"{role}: ((?:`[^`]+`(?: \(and [^)]+\))?(?:, )?)+)", guide.split("| roles,")[1])
        assert re.findall(r"`([^`]+)`", re.sub(r" \(and [^)]+\)", "", listed)) == list(names)
    for name, value in batch.NEUTRAL.items():
        (shown,) = re.findall(rf"`{name}`\s\(`?([^`)]+)`?\)", guide)
        assert shown == (value if isinstance(value, str) else json.dumps(value))


def refusals() -> set[str]:
    """The reasons that the code gives for a row, with … for what varies."""
    found = set()
    for module in (answers, batch, conversation, prompts, pair, prompting, run, scoring):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            # the answers of a dataset have no class of errors of their own
            kinds = {"RowError", "PromptError"} | ({"ValueError"} if module is answers else set())
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds:
                parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else call.args[:1]
                found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts))
    return found - {"…"}


def test_the_guide_names_what_rows_are_refused_for():
    table = schemas_in_the_guide().split("| reason | of |\n|---|---|\n")[1]
    assert {line.split(" | ")[0].removeprefix("| ") for line in table.strip().splitlines()} == refusals()


def test_the_guide_links_to_files_that_are_there():
    for page in (
        ROOT / "docs" / "guide.md",
        *ROOT.glob("*.md"),
        *ROOT.glob("theory/*.md"),
        *ROOT.glob("qstar/*/README.md"),
    ):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_help_is_grouped_and_shows_defaults():
    text = " ".join(generate.make_parser().format_help().split())
    for group in ("models:", "data in:", "prompts:", "rule for α", "sampling:", "decoding:", "data out:"):
        assert group in text
    assert "(default: kl_symmetry)" in text


def test_the_frontier_of_the_guide_runs():
    """As written, and it prints what its comments say."""
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    code = re.search(r"## The whole frontier\n.*?```python\n(.*?)```", guide, re.S).group(1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kl, budget, half, ends, mixed, guided = (
        re.findall(r"tensor\(\[(.*?)\]", done.stdout, re.S)[:1]
        + re.findall(r"^tensor\(\[(.*?)\]\)$", done.stdout, re.S | re.M)[-5:]
    )
    assert {round(float(x), 5) for x in kl.split(",")} == {0.01}
    assert {float(x) for x in ends.split(",")} == {1.0}
    assert [float(x) for x in mixed.split(",")][2:] == [0.3, 1.0]
    assert all(float(x) > 0 for x in guided.split(","))
    assert float(half.split(",")[3]) > float(budget.split(",")[3])
