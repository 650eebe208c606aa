"""`minillm`: the command line. Imports happen inside the commands, so that `minillm --help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

MODEL = "smollm2-135m-instruct"
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LLM inference, read in one sitting.",
)
exercises = typer.Typer(no_args_is_help=True, help="The exercise notebooks, generated from solutions/.")
app.add_typer(exercises, name="exercises")


def _fail(error: Exception) -> None:
    """Print what went wrong, without a traceback: the messages are written for the user."""
    typer.secho(f"minillm: {error}", fg="red", err=True)
    raise typer.Exit(1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Is everything here that the curriculum needs? Exit status 1 when something is not."""
    from .learn.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([f.as_dict() for f in findings], indent=1))
    else:
        colors = {"OK": "green", "FAIL": "red", "SKIP": "yellow"}
        for f in findings:
            print(typer.style(f"{f.status:4}", fg=colors[f.status]), f"{f.name:16} {f.detail}")
            if f.status == "FAIL":
                print(f"     → {f.remedy}")
    if any(f.status == "FAIL" for f in findings):
        raise typer.Exit(1)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A known model.")] = MODEL,
    again: Annotated[bool, typer.Option("--again", help="Replace what is there.")] = False,
) -> None:
    """Download a known model and convert it into a Hugging Face directory in the user's cache."""
    import shutil

    from .model import fetch as fetching

    try:
        if again and name in fetching.KNOWN:
            shutil.rmtree(fetching.cache_dir() / name, ignore_errors=True)
        print(fetching.fetch(name))
    except (ValueError, OSError, RuntimeError) as e:
        _fail(e)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='What to ask, or to continue with --raw. "-" reads standard input.')],
    model: Annotated[str, typer.Option(help="A known name, a Hugging Face directory or id.")] = MODEL,
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that hold this share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens already seen less likely.")] = 1.1,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer a question, streamed; then print tokens per second."""
    from . import LLM, SamplingParams

    try:
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        llm = LLM(model, device=device)
        text = sys.stdin.read() if prompt == "-" else prompt
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        stream = llm.stream(text if raw else llm.chat_prompt(messages), params)
        for piece in stream:
            print(piece, end="", flush=True)
    except (ValueError, FileNotFoundError, OSError, RuntimeError) as e:
        _fail(e)
    m = stream.output.metrics
    rate = f"{m.num_generated_tokens} tokens in {m.total_time:.1f} s: {m.tokens_per_second:.1f} tokens/s"
    more = f"first after {m.time_to_first_token:.2f} s, finished by {stream.output.finish_reason}"
    typer.secho(f"\n[{rate}, {more}]", dim=True, err=True)


@app.command()
def check(
    chapter: Annotated[str, typer.Argument(help="A chapter, as 2, 02 or 02_transformer.")],
    file: Annotated[
        Path | None, typer.Option(help="Another notebook or Python file than exercises/NN_stem.ipynb.")
    ] = None,
) -> None:
    """Check your exercise notebook. Exit status 1 while anything is open."""
    from .learn import checker as checking

    try:
        results = checking.check_chapter(chapter, file)
    except (ValueError, FileNotFoundError) as e:
        _fail(e)
    for number, outcomes in results.items():
        print(checking.report(number, outcomes))
    done = sum(all(o.status == "passed" for o in outcomes) for outcomes in results.values())
    print(f"{done} of {len(results)} exercises done")
    if done < len(results):
        raise typer.Exit(1)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="kernels, engine, or tune: find the kernels' sizes for this GPU.")],
    quick: Annotated[bool, typer.Option("--quick", help="A minute's worth, nothing recorded.")] = False,
    only: Annotated[str, typer.Option(help="engine: these parts, for example workload,stream.")] = "",
    shapes: Annotated[str, typer.Option(help="engine: these models, for example smollm2,qwen3.")] = "",
) -> None:
    """Measure against peers, floors and ceilings; on a GPU the result is recorded under benchmarks/results/."""
    import subprocess

    from .learn.paths import root

    suites = ("kernels", "engine", "tune")
    if suite not in suites:
        _fail(ValueError(f"suite: expected one of {', '.join(suites)}, got {suite!r}"))
    if suite == "tune":
        import torch

        if not torch.cuda.is_available():
            _fail(ValueError("suite: tune needs a GPU; on a CPU the torch paths run, which have nothing to tune"))
    if suite != "engine" and (only or shapes):
        _fail(ValueError(f"--only and --shapes: the suite {suite!r} has none; expected with engine"))
    command = [sys.executable, str(root() / "benchmarks" / f"{suite}.py"), *(["--quick"] if quick else [])]
    command += [part for name, value in (("--only", only), ("--shapes", shapes)) if value for part in (name, value)]
    raise typer.Exit(subprocess.run(command).returncode)


@app.command()
def progress(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, for an instructor.")] = False,
) -> None:
    """What is done, by chapter, from the record of checks passed."""
    from .learn.progress import summary

    try:
        rows = summary()
    except FileNotFoundError as e:
        _fail(e)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("chapter", "exercise", "", "passed")
    for row in rows:
        table.add_row(
            row["chapter"],
            f"{row['number']} {row['title']}",
            "✓" if row["passed_at"] else "·",
            (row["passed_at"] or "")[:10],
        )
    done = sum(bool(row["passed_at"]) for row in rows)
    Console().print(table)
    filled = round(30 * done / max(1, len(rows)))
    print(f"{'█' * filled}{'░' * (30 - filled)} {done} of {len(rows)} exercises")


@exercises.command("build")
def build(
    check_only: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 when a notebook is not what its source gives.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite notebooks that a learner has worked in.")] = False,
) -> None:
    """Write exercises/*.ipynb from solutions/*.py."""
    from .learn import exercises as generator

    try:
        if check_only:
            stale = generator.stale()
            for path in stale:
                print(f"{path}: differs from its source in solutions/; `minillm exercises build` writes it")
            if stale:
                raise typer.Exit(1)
            return
        written, kept = generator.build(force)
    except (ValueError, FileNotFoundError) as e:
        _fail(e)
    for path in written:
        print(f"wrote {path}")
    for path in kept:
        print(f"kept {path}: it holds somebody's work (--force overwrites it)")


if __name__ == "__main__":
    app()
