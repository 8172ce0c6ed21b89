"""The `graft` command: what can be typed. Each command reads its arguments and calls one module.

graft up                     cli.stack      the local stack, until Ctrl-C
graft train, job, jobs, …    cli.training   fine-tune jobs
graft predict, models        cli.serving    what is served
graft export                 cli.export     a model as files of its own
graft demo                   cli.demo       all of it, once, with data of its own
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cli import serving, training
from cli.client import Client
from cli.demo import run_demo
from cli.export import export_model
from cli.failures import CommandError, explain
from cli.stack import Stack, StackOptions

DEFAULT_URL = "http://127.0.0.1:3000"

out = Console()
err = Console(stderr=True)


@dataclass(frozen=True)
class Connection:
    """The global options."""

    url: str
    api_key: str | None

    def open(self) -> Client:
        """Return a client; close it after use."""
        return Client(self.url, self.api_key)


class _Commands(TyperGroup):
    """Ends what was foreseen with a sentence and an exit code; a bug still shows its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough, as `graft jobs | head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            url = ctx.obj.url if isinstance(ctx.obj, Connection) else DEFAULT_URL
            message = explain(error, url)
            if message is None:
                raise
            err.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    help="Fine-tune pretrained models on small data sets and serve them.",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="GRAFT_URL", help="Where the service answers.")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GRAFT_API_KEY", help="Bearer key.", show_default=False),
    ] = None,
) -> None:
    """Read the options that all commands share."""
    if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).hostname:
        raise typer.BadParameter(f"{url} is not a URL such as {DEFAULT_URL}", param_hint="--url")
    context.obj = Connection(url, api_key)


@app.command()
def up(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 3000,
    data: Annotated[
        Path, typer.Option(file_okay=False, help="Directory of the stack's data and logs.")
    ] = Path("graft-data"),
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Service processes.", show_default="1")
    ] = None,
) -> None:
    """Run Redis, the training worker and the service until Ctrl-C."""
    stop_on_signals()
    out.print("starting…")
    try:
        with Stack(StackOptions(data, port, dict(os.environ), workers)) as stack:
            out.print(f"Graft is ready at [bold]{stack.url}[/]; logs are in {data / 'logs'}")
            out.print("Ctrl-C stops it.")
            while True:
                stack.check()
                time.sleep(0.2)
    except KeyboardInterrupt:
        out.print("stopped")


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(help="A .csv, .jsonl, .parquet or .zip file, or a folder of class folders."),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model.", show_default="the data's name")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="minilm, efficientnet-lite0, …", show_default="by the kind of data"),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Rows to validate on.", show_default="a split of the data")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="feature_extraction, gradual, full, auto", show_default="the service's"),
    ] = None,
    max_seconds: Annotated[
        int | None, typer.Option(min=1, help="Longest run.", show_default="the service's")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all chance.")] = None,
    order: Annotated[
        str | None,
        typer.Option(help="All classes from the lowest to the highest, as bad,fair,good."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job until the model is served.")
    ] = True,
) -> None:
    """Fine-tune a backbone on a data set and serve the model."""
    request = training.TrainRequest(
        data, name, backbone, validation, seed, strategy, max_seconds, order
    )
    with context.obj.open() as client:
        training.train(client, request, wait=wait, console=out)


@app.command()
def jobs(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most jobs to list.")] = 20,
) -> None:
    """List the newest jobs."""
    with context.obj.open() as client:
        training.show_jobs(client, limit, out)


@app.command()
def job(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    follow: Annotated[bool, typer.Option("--follow", help="Show events until it ends.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write its report to this .html or .json file."),
    ] = None,
) -> None:
    """Show or follow one job."""
    with context.obj.open() as client:
        if report is None:
            training.show_job(client, job_id, follow=follow, console=out)
        else:
            training.save_report(client, job_id, report, out)


@app.command()
def cancel(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Keep the best checkpoint so far.")
    ] = False,
) -> None:
    """Cancel a job."""
    with context.obj.open() as client:
        training.steer(client, job_id, "cancel", out, keep_best=keep_best)


@app.command()
def pause(context: typer.Context, job_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Pause a job; its worker is free for others meanwhile."""
    with context.obj.open() as client:
        training.steer(client, job_id, "pause", out)


@app.command()
def resume(context: typer.Context, job_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Let a paused job go on where it was."""
    with context.obj.open() as client:
        training.steer(client, job_id, "resume", out)


@app.command()
def predict(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="name, name@3 or name:alias")],
    inputs: Annotated[
        list[str],
        typer.Argument(help="Texts, image files, or - for one text per line of standard input."),
    ],
    top_k: Annotated[int | None, typer.Option(min=1, help="Labels to show for each input.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per input.")] = False,
) -> None:
    """Predict the labels of texts and images."""
    with context.obj.open() as client:
        failed = serving.predict(client, model, inputs, top_k=top_k, as_json=as_json, console=out)
    if failed:
        raise CommandError(f"{failed} of the inputs got no prediction")


@app.command()
def models(context: typer.Context) -> None:
    """List what can be used for predictions and for training."""
    with context.obj.open() as client:
        serving.show_models(client, out)


@app.command()
def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="name, name@3 or name:alias")],
    folder: Annotated[Path, typer.Argument(help="A new folder.", file_okay=False)],
) -> None:
    """Write a model as one ONNX file that needs no Graft, with what makes its inputs."""
    with context.obj.open() as client:
        reference = export_model(client, model, folder)
    out.print(f"{reference} is in [bold]{escape(str(folder))}[/]")


@app.command()
def demo(
    data: Annotated[
        Path, typer.Option(file_okay=False, help="The demo works in the folder demo of this one.")
    ] = Path("graft-data"),
) -> None:
    """Start a stack, train a text and an image model, check them, stop."""
    stop_on_signals()
    run_demo(data / "demo", out)


def stop_on_signals() -> None:
    """Make SIGTERM and a closed terminal end a stack as Ctrl-C does; `nohup` still holds."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    app()
