"""A checked command line: everything that a run needs but the models, and what its output depends on."""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qstar.backends import BACKENDS
from qstar.data.answers import DatasetAnswers
from qstar.data.files import title_of
from qstar.data.prompts import PromptSource, load_prompts
from qstar.demo import PROMPTS
from qstar.prompting import PromptError, PromptFormat
from qstar.run.checkpoints import fingerprint, revision
from qstar.run.options import settings_of
from qstar.run.output import Output, OutputError
from qstar.run.parts import Parts
from qstar.run.records import RunAnswers
from qstar_kernels.types import BUDGETS, Settings

Data = PromptSource | DatasetAnswers | RunAnswers


@dataclass(frozen=True)
class Job:
    """A checked command line: everything but the models is loaded."""

    args: argparse.Namespace
    settings: Settings
    format_theta: PromptFormat
    format_t: PromptFormat
    prompts: Data
    output: Output | Parts

    def of_run(self) -> "Job":
        """The job as its run sees it, once the output is open: templates show the moment of the run's first start."""
        theta, t = (replace(f, moment=self.output.moment) for f in (self.format_theta, self.format_t))
        return replace(self, format_theta=theta, format_t=t)


def open_prompts(args: argparse.Namespace) -> PromptSource:
    return load_prompts(
        args.dataset or [str(PROMPTS)],
        args.dataset_split,
        args.dataset_config,
        args.prompt_field,
        args.num_samples,
        bool(args.continue_final_message),
        bool(args.use_request_parameters),
        args.samples_per_prompt if getattr(args, "output_format", None) == "openai-batch" else None,
    )


def data_source(args: argparse.Namespace) -> str:
    """What rows of verl that name no source of their own come from: the files or datasets, without extensions."""
    return "+".join(title_of(name) for name in args.dataset or [str(PROMPTS)])


def make_job(
    args: argparse.Namespace, open_data: Callable[[], Data], output_format: str = "jsonl", save_diagnostics: bool = True
) -> Job:
    """What both commands open, of arguments that `options.check_run` has passed; raises ValueError or OSError with one
    line where something is wrong."""
    if args.device is not None and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this machine or this build of torch has no CUDA; try --device cpu")
    on_ray = getattr(args, "engine", None) == "ray"
    settings = settings_of(args)
    format_theta, format_t = (prompt_format(args, side) for side in ("theta", "t"))
    data = open_data()
    if args.t_hint_field is not None and args.t_hint_field not in data.columns:
        raise ValueError(
            f"--t-hint-field {args.t_hint_field!r} is no column; the columns are {', '.join(data.columns)}"
        )
    settings_of_run = run_settings(args, data)
    diagnostics_format = getattr(args, "diagnostics_format", None) or "jsonl"
    if on_ray:
        settings_of_run["--batch-size"] = args.batch_size  # a part is so many batches long
        output = Parts(args.output, output_format, save_diagnostics, settings_of_run, diagnostics_format)
    else:
        settings_of_run["output file"] = Path(args.output).name
        output = Output(Path(args.output), output_format, save_diagnostics, settings_of_run, diagnostics_format)
    before = None
    with suppress(OutputError, OSError, ValueError, ImportError):  # said when the output is opened
        before = output.before()
    # the samples of a run are scored by the models that drew them
    drawn = data.files.settings if isinstance(data, RunAnswers) else {}
    output.settings |= weights_of_run(args, before or drawn)
    if isinstance(data, RunAnswers):
        output.answers = data.whose(output.settings)
    for part in parts_of(args):
        setattr(args, f"revision_{part}", revision(output.settings.get(f"weights of {part}", "")))
    return Job(args, settings, format_theta, format_t, data, output)


def prompt_format(args: argparse.Namespace, side: str) -> PromptFormat:
    """How one side sees prompts.

    Raises:
        ValueError: an option cannot be used.
    """
    of_side = {name: getattr(args, f"{side}_{name}") for name in ("chat_template", "system_prompt")}
    of_side["template_kwargs"] = getattr(args, f"{side}_template_kwargs") or {}
    try:
        return PromptFormat(
            **of_side, hint_template=args.t_hint_template, continue_final_message=bool(args.continue_final_message)
        )
    except PromptError as error:
        raise ValueError(f"--{side}-template-kwargs: {error}") from None


def run_settings(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Everything the output depends on, by the names of the command line."""
    # where it runs, how much at once and where it writes is no part of what it writes
    free = {"output", "device", "device_map", "batch_size", "backend", "speculate", "draft", "clip", "quiet", "verbose"}
    free |= {"cuda_graphs", "engine", "num_workers", "gpus_per_worker", "ray_address"}
    if args.alpha_method not in BUDGETS:  # and not even there in runs that an earlier version began
        free.add("kl_budget")
    settings = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in free}
    if args.dataset is not None and len(args.dataset) == 1:
        settings["--dataset"] = args.dataset[0]
    for name, backend in BACKENDS.items():
        if said := settings.get(option := f"--{name}-options"):
            settings[option] = {k: v for k, v in said.items() if k not in backend.placement}
    settings["dataset content"] = data.fingerprint
    for template in ("theta_chat_template", "t_chat_template"):
        path = Path(getattr(args, template))
        if path.is_file():
            settings[f"content of --{template.replace('_', '-')}"] = path.read_text(encoding="utf-8")
    return json.loads(json.dumps(settings))


def parts_of(args: argparse.Namespace) -> dict[str, str | None]:
    """What a pair is loaded from: the name or folder of each model, and of each adapter, None where there is none."""
    return {"theta": args.model_theta, "t": args.model_t} | {
        f"adapter_{side}": getattr(args, f"adapter_{side}") for side in ("theta", "t")
    }


def option_of(part: str) -> str:
    """The option that names one of `parts_of`."""
    return f"--{part.replace('_', '-')}" if part.startswith("adapter") else f"--model-{part}"


def weights_of_run(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, str]:
    """The fingerprints of models and adapters, as settings of the run; `before` are those of its first start.

    Those of the hub stay at the commit of the first start, where the backend can load it; else another is refused.
    """
    parts, found = {part: name for part, name in parts_of(args).items() if name is not None}, {}
    for part, name in parts.items():
        is_adapter = part.startswith("adapter")
        known = str(before.get(f"weights of {part}"))
        of_hub = not Path(name).expanduser().is_dir()
        stays = of_hub and BACKENDS[args.backend].pins and before.get(option_of(part)) == name and revision(known)
        if (name, is_adapter) not in found:
            found[name, is_adapter] = known if stays else fingerprint(name, is_adapter)
    return {f"weights of {part}": found[name, part.startswith("adapter")] for part, name in parts.items()}
