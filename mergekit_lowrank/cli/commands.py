"""The command line. Nothing heavy is imported here: a command imports the module that does its work when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mergekit_lowrank._version import __version__
from mergekit_lowrank.cli.group import CommandLine, Verbosity, log_option, verbosity_options
from mergekit_lowrank.cli.request import MergeCommand, Request, Shard, split_output

__all__ = ["main"]

PROGRAM = "mergekit-lowrank"
SHELLS = ("bash", "zsh", "fish")
SCHEMAS = ("recipe", "report", "comparison", "diagnosis", "verification", "manifest", "evaluation", "tasks")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def example(*lines: str) -> str:
    """The last paragraph of a help text: commands as they are typed. The first letter keeps click from wrapping it."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def recipe_options(command: Decorated) -> Decorated:
    """What decides the plan: a recipe file, or a method with models and weights; overrides; memory and workers."""
    decorators = (
        click.argument("names", nargs=-1, metavar=""),
        click.option("--method", metavar="NAME", help="Merge MODELs with this method, without a recipe file."),
        click.option(
            "--weights", type=float, multiple=True, metavar="W W ...", help="With --method: a weight for each MODEL."
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the recipe, as in parameters.density=0.5. May be repeated.",
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            help="What the merge may hold, as in 2GiB. [the recipe's; else a quarter of the machine]",
        ),
        click.option(
            "--executor",
            metavar="NAME",
            help="How modules are scheduled: threads, processes, serial or a plugin's. [the recipe's; else threads]",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            metavar="N",
            help="Modules merged at once. [the recipe's; else one for each processor]",
        ),
        click.option("--strict", is_flag=True, help="Treat every warning as an error."),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def rank_options(command: Decorated) -> Decorated:
    """How an adapter is cut, and what that may hold."""
    decorators = (
        click.option(
            "--rank",
            required=True,
            metavar="RANK",
            help="A number, or energy:0.99, error:0.05 or budget:80MB (ranks of their own).",
        ),
        click.option(
            "--uniform-rank/--own-ranks",
            default=True,
            show_default=True,
            help="Pad every module to one rank, as servers need it, or give each its own.",
        ),
        click.option(
            "--memory", "memory", metavar="SIZE", help="What it may hold, as in 2GiB. [a quarter of the machine]"
        ),
        click.option("--overwrite", is_flag=True, help="Replace what a merge has left at OUT."),
        json_option,
        verbosity_options,
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.group(
    epilog=example(
        "mergekit-lowrank init adapters/math adapters/code > recipe.yaml", "mergekit-lowrank merge recipe.yaml merged/"
    ),
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name=PROGRAM)
@verbosity_options
@click.pass_context
def main(ctx: click.Context) -> None:
    """Merge LoRA adapters exactly, one module at a time, in bounded memory."""
    ctx.ensure_object(Verbosity)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


@main.command(
    epilog=example(
        "mergekit-lowrank merge recipe.yaml merged/",
        "mergekit-lowrank merge --method ties math/ code/ --weights 0.6 0.4 -o merged/",
    ),
    cls=MergeCommand,
    options_metavar="RECIPE OUT | --method NAME MODEL... -o OUT  [OPTIONS]",
)
@recipe_options
@click.option("-o", "--output", metavar="OUT", help="The directory to make.")
@click.option("--overwrite", is_flag=True, help="Replace what a merge has left at OUT, once the new one is complete.")
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on from what a merge of the same recipe into OUT had finished when it was cut off.",
)
@click.option(
    "--shard",
    type=Shard(),
    metavar="I/N",
    help="Merge one of N parts, counted from 0, for the command finalize to put together.",
)
@click.option("--vram", metavar="SIZE", help="What it may hold on each GPU. [the recipe's; else what is free]")
@click.option(
    "--device", metavar="NAME", help="auto, cpu, cuda (all GPUs), cuda:1, ... or mps. [the recipe's; else auto]"
)
@click.option("--no-hash", is_flag=True, help="Leave the checksums of the inputs out of the manifest.")
@click.option("--verify", is_flag=True, help="Merge twice and compare; what does not verify is not put in place.")
@click.option(
    "--push",
    metavar="ORG/NAME",
    help="Upload OUT to the Hugging Face Hub, once it is complete; what is made there is private.",
)
@log_option
@verbosity_options
@click.pass_obj
def merge(
    verbosity: Verbosity,
    /,
    names: tuple[str, ...],
    output: str | None,
    method: str | None,
    weights: tuple[float, ...],
    overrides: tuple[str, ...],
    no_hash: bool,
    **settings: Any,
) -> None:
    """Merge adapters or fine-tunes into a directory. It appears when all in it is complete."""
    names, directory = split_output(names, output, method)
    request = Request(names, method, weights, overrides)
    from mergekit_lowrank.cli.merging import run_merge

    run_merge(request, directory, hash_sources=not no_hash, verbosity=verbosity, **settings)


@main.command(epilog=example("mergekit-lowrank finalize merged/"))
@click.argument("output", metavar="OUT")
@click.option("--overwrite", is_flag=True, help="Replace what a merge has left at OUT.")
@click.option("--verify", is_flag=True, help="Merge again and compare; what does not verify is not put in place.")
@log_option
@verbosity_options
@click.pass_obj
def finalize(verbosity: Verbosity, /, output: str, **settings: Any) -> None:
    """Put together what merge --shard has made. All parts are checked first."""
    from mergekit_lowrank.cli.merging import run_finalize

    run_finalize(Path(output), verbosity=verbosity, **settings)


@main.command(
    epilog=example("mergekit-lowrank plan recipe.yaml --set parameters.density=0.5"),
    cls=MergeCommand,
    options_metavar="RECIPE | --method NAME MODEL...  [OPTIONS]",
)
@recipe_options
@click.option("--all", "every", is_flag=True, help="A line for each module, not one for all layers that are alike.")
@json_option
@verbosity_options
def plan(
    names: tuple[str, ...],
    method: str | None,
    weights: tuple[float, ...],
    overrides: tuple[str, ...],
    **settings: Any,
) -> None:
    """Show what a merge would do. Every problem it would meet is named; no tensor is read."""
    request = Request(names, method, weights, overrides)
    from mergekit_lowrank.cli.planning import run_plan

    run_plan(request, **settings)


@main.command(
    epilog=example("mergekit-lowrank diagnose recipe.yaml --html diagnosis.html"),
    cls=MergeCommand,
    options_metavar="RECIPE | --method NAME MODEL...  [OPTIONS]",
)
@recipe_options
@click.option(
    "--device", metavar="NAME", help="auto, cpu, cuda (all GPUs), cuda:1, ... or mps. [the recipe's; else auto]"
)
@json_option
@click.option("--html", metavar="FILE", help="Write a page too.")
@log_option
@verbosity_options
@click.pass_obj
def diagnose(
    verbosity: Verbosity,
    /,
    names: tuple[str, ...],
    method: str | None,
    weights: tuple[float, ...],
    overrides: tuple[str, ...],
    **settings: Any,
) -> None:
    """Show how the inputs stand to each other. Norms, overlaps, conflicts, and what to do; nothing is written.

    Each finding, and the formula of each measure, is in docs/reference/findings.md.
    """
    request = Request(names, method, weights, overrides)
    from mergekit_lowrank.cli.diagnosing import run_diagnose

    run_diagnose(request, reporters=verbosity.reporters(), **settings)


@main.command(epilog=example("mergekit-lowrank init adapters/math adapters/code > recipe.yaml"))
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--method", default="robustmerge", show_default=True, metavar="NAME", help="The method to start from.")
@verbosity_options
def init(models: tuple[str, ...], method: str) -> None:
    """Print a commented recipe for adapters."""
    from mergekit_lowrank.cli.drafting import run_init

    run_init(models, method)


@main.command(epilog=example("mergekit-lowrank inspect adapters/math"))
@click.argument("adapter")
@json_option
@verbosity_options
def inspect(adapter: str, as_json: bool) -> None:
    """Show what a checkpoint holds. Modules, ranks, scaling, the size of its update, and what a merge does with it.

    Stable rank is the squared norm over the squared largest singular value; effective rank is e to the entropy of the
    singular values. Both are at most the rank, and far below it where a few directions hold the update.
    """
    from mergekit_lowrank.cli.inspecting import run_inspect

    run_inspect(adapter, as_json=as_json)


@main.command(epilog=example("mergekit-lowrank convert adapters/math math-kohya/ --format kohya"))
@click.argument("adapter")
@click.argument("output", metavar="OUT")
@click.option(
    "--format",
    "format_name",
    required=True,
    metavar="NAME",
    help="peft, gguf, or what a plugin writes, such as kohya or diffusers.",
)
@click.option("--base", metavar="DIR", help="The base model, whose config.json gguf needs. [what the adapter names]")
@click.option("--overwrite", is_flag=True, help="Replace what a conversion or a merge has left at OUT.")
@json_option
@verbosity_options
@click.pass_obj
def convert(verbosity: Verbosity, /, adapter: str, output: str, **settings: Any) -> None:
    """Write an adapter in another dialect. The result is read again and compared, bit for bit."""
    from mergekit_lowrank.cli.transforming import run_convert

    run_convert(adapter, Path(output), quiet=verbosity.quiet, **settings)


@main.command(epilog=example("mergekit-lowrank resize adapters/math math-8/ --rank 8"))
@click.argument("adapter")
@click.argument("output", metavar="OUT")
@click.option(
    "--base", metavar="DIR", help="The base model, where the adapter needs it (DoRA, VeRA of several modules)."
)
@rank_options
@click.pass_obj
def resize(verbosity: Verbosity, /, adapter: str, output: str, **settings: Any) -> None:
    """Cut an adapter to another rank. Exact: the best approximation, with the error of each module."""
    from mergekit_lowrank.cli.transforming import run_resize

    run_resize(adapter, Path(output), quiet=verbosity.quiet, **settings)


@main.command(epilog=example("mergekit-lowrank extract tuned/ tuned-lora/ --base base/ --rank energy:0.9"))
@click.argument("finetuned")
@click.argument("output", metavar="OUT")
@click.option("--base", required=True, metavar="DIR", help="The model that it was tuned from.")
@click.option(
    "--extras",
    metavar="POLICY",
    help="Of changed norms, biases and other vectors: error, delta or average (saved whole), or base_model (left "
    "out). [error]",
)
@rank_options
@click.pass_obj
def extract(verbosity: Verbosity, /, finetuned: str, output: str, **settings: Any) -> None:
    """Make an adapter of a full fine-tune. What it changed in its base, cut to a rank; neither has to fit in memory."""
    from mergekit_lowrank.cli.transforming import run_extract

    run_extract(finetuned, Path(output), quiet=verbosity.quiet, **settings)


@main.command(epilog=example("mergekit-lowrank check merged/ --target vllm"))
@click.argument("adapter")
@click.option("--target", metavar="SERVER", help="vllm, sglang, llama.cpp, diffusers or comfyui. [all, a line each]")
@json_option
@verbosity_options
def check(adapter: str, target: str | None, as_json: bool) -> None:
    """Show what a server would refuse, drop or misapply. With --target, exit status 2 if there is a problem."""
    from mergekit_lowrank.cli.checking import run_check

    run_check(adapter, target, as_json=as_json)


@main.command(epilog=example("mergekit-lowrank verify merged/"))
@click.argument("output", metavar="OUT")
@click.option(
    "--recompute/--no-recompute",
    default=True,
    show_default=True,
    help="Merge again and compare. Without it hashes and structure are checked, and inputs may be gone.",
)
@click.option("--memory", metavar="SIZE", help="What it may hold, as in 2GiB. [a quarter of the machine]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda (all GPUs), cuda:1, ... or mps. [auto]")
@click.option("--executor", metavar="NAME", help="As of merge. [threads]")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Modules merged at once. [one for each processor]",
)
@json_option
@log_option
@verbosity_options
@click.pass_obj
def verify(verbosity: Verbosity, /, output: str, **settings: Any) -> None:
    """Prove an output. Hashes, structure, and the same merge again; exit status 2 if there is a fault."""
    from mergekit_lowrank.cli.verifying import run_verify

    run_verify(output, reporters=verbosity.reporters(), **settings)


@main.command(epilog=example("mergekit-lowrank evaluate merged/ --tasks tasks.yaml -o results.json"))
@click.argument("target", metavar="RECIPE_OR_DIR")
@click.option("--tasks", required=True, metavar="FILE", help="What to judge by: tasks and their evaluators.")
@click.option("--against", metavar="DIR", help="The output of another merge, to compare with example by example.")
@click.option("--keep", metavar="OUT", help="Leave the merge of RECIPE there. [it is deleted]")
@click.option(
    "-o", "--output", metavar="FILE", help="Results as JSON, from the first run on; runs that it has are not repeated."
)
@click.option(
    "--resamples", type=click.IntRange(min=1), default=10_000, show_default=True, metavar="N", help="Of the bootstrap."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of its draws.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="What one command may take. [what FILE says]",
)
@json_option
@log_option
@verbosity_options
@click.pass_obj
def evaluate(verbosity: Verbosity, /, target: str, tasks: str, **settings: Any) -> None:
    """Judge base, experts and merge. Any evaluator; intervals say which differences are more than noise."""
    from mergekit_lowrank.cli.evaluating import run_evaluate

    run_evaluate(target, tasks, reporters=verbosity.reporters(), **settings)


@main.command(epilog=example("mergekit-lowrank strategies ties"))
@click.argument("name", required=False)
@json_option
@verbosity_options
def strategies(name: str | None, as_json: bool) -> None:
    """List the merge methods. With NAME, its parameters."""
    from mergekit_lowrank.cli.methods import run_strategies

    run_strategies(name, as_json=as_json)


@main.command(epilog=example("mergekit-lowrank plugins"))
@json_option
@verbosity_options
def plugins(as_json: bool) -> None:
    """List the plugins. What each registers, and why one failed to load."""
    from mergekit_lowrank.cli.plugins import run_plugins

    run_plugins(as_json=as_json)


@main.command(
    epilog=example(
        "mergekit-lowrank report merged/ --interactive --png figures/",
        "mergekit-lowrank report merged-a/ merged-b/ -o comparison.html",
    ),
    options_metavar="OUT | A B  [OPTIONS]",
)
@click.argument("outputs", nargs=-1, metavar="")
@click.option("-o", "--output", "page", metavar="FILE", help="The page to write. [OUT/report.html; of A and B none]")
@click.option("--interactive", is_flag=True, help="Draw with Plotly, inside the page: zoom, and lines to switch off.")
@click.option("--png", metavar="DIR", help="Write each figure as a PNG file too.")
@click.option("--pdf", metavar="DIR", help="Write each figure as a PDF file too.")
@click.option("--overwrite", is_flag=True, help="Replace FILE, and images in DIR.")
@json_option
@verbosity_options
@click.pass_obj
def report(verbosity: Verbosity, /, outputs: tuple[str, ...], **settings: Any) -> None:
    """Make the page of a merge again, or compare two merges. What they did, as figures for a page or a paper.

    Of A and B: what their recipes say differently, and how far the updates are apart, exactly, from the factors.
    """
    if not 1 <= len(outputs) <= 2:
        raise click.UsageError(f"expected one output or two, found {len(outputs)}")
    from mergekit_lowrank.cli.reporting import run_report

    run_report(outputs, quiet=verbosity.quiet, **settings)


@main.command(epilog=example("mergekit-lowrank schema > recipe.schema.json"))
@click.argument("kind", type=click.Choice(SCHEMAS), default="recipe")
@verbosity_options
def schema(kind: str) -> None:
    """Print the JSON Schema of recipes, or of another kind of file."""
    from mergekit_lowrank.cli.schemas import run_schema

    run_schema(kind)


@main.command(
    epilog=example("mergekit-lowrank completion bash > ~/.local/share/bash-completion/completions/mergekit-lowrank")
)
@click.argument("shell", type=click.Choice(SHELLS))
@verbosity_options
def completion(shell: str) -> None:
    """Print a shell's completion script."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is not None:
        variable = f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()
        click.echo(kind(main, {}, PROGRAM, variable).source())
