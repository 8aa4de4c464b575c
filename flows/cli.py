"""`regrow`: the command line. Each command imports what it needs, so that help is quick."""

from __future__ import annotations

import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from flows.screen import Output
from heal.errors import HealError, InputError

app = typer.Typer(
    name="regrow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
store = typer.Typer(help="The artifact store.", no_args_is_help=True)
app.add_typer(store, name="store")

ParamsFile = Annotated[Path | None, typer.Option("--params", "-p", help="The params file.", show_default="params.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-S", help="Override, such as -S healing.starfish.lr=3e-4.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Name = Annotated[str | None, typer.Argument(help="The registered model.", show_default="registration.name")]


def main() -> None:
    """The entry point: 0 done, 1 the run failed or the gate rejected, 2 the user must change something."""
    _quiet_the_stack()
    sys.path.append(os.getcwd())  # adapters may lie in the working directory; last, so that they hide nothing
    try:
        app()
    except HealError as error:
        sys.exit(_explained(error))


def _say_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"regrow {metadata.version('regrow')}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which regrow this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Recompress trained vision networks: prune, heal without labels, prove, promote."""


@app.command()
def demo(output_json: Json = False, verbose: Verbose = False) -> None:
    """The whole road on scikit-learn's digits: trains a small ViT if the registry has none, then recompresses it.

    `regrow demo`
    """
    from flows import running

    raise typer.Exit(running.run(_demo_params(), [], _output(output_json, verbose), is_demo=True))


@app.command()
def run(
    params: ParamsFile = None, override: Overrides = None, output_json: Json = False, verbose: Verbose = False
) -> None:
    """Recompress the model that the params name; what is cached does not run again.

    `regrow run -S allocation.budget.neurons=0.4`
    """
    from flows import running

    raise typer.Exit(running.run(_params_file(params), override or [], _output(output_json, verbose)))


@app.command()
def plan(params: ParamsFile = None, override: Overrides = None, output_json: Json = False) -> None:
    """What `regrow run` would do: cached or not, stage by stage, and why.

    `regrow plan -S healing.starfish.lr=3e-4`
    """
    from flows import running

    raise typer.Exit(running.show_plan(_params_file(params), override or [], output_json))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's file.")],
    override: Overrides = None,
    only: Annotated[str | None, typer.Option(help="Run the points whose name matches, such as 'digits/*/0'.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only write the tables again, from MLflow.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the tables.", show_default="sweeps/NAME")
    ] = None,
    output_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run models x methods x budgets x seeds; what is cached does not run again, what fails stops nothing else.

    `regrow sweep sweep.yaml --only '*/weights=0.9/*'`
    """
    from flows import sweeping

    work = sweeping.draw if table else sweeping.run
    raise typer.Exit(work(file, override or [], only, output, _output(output_json, verbose)))


@app.command()
def report(
    params: ParamsFile = None,
    override: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("report.html"),
) -> None:
    """Write the report of a finished run to a file.

    `regrow report -o report.html`
    """
    from flows import running

    raise typer.Exit(running.write_report(_params_file(params), override or [], output))


@app.command()
def latency(
    models: Annotated[list[str], typer.Argument(help="Bundles, or models:/NAME@ALIAS; the first is the base.")],
    batch: Annotated[
        list[int] | None, typer.Option("--batch", "-b", min=1, help="Batch size.", show_default="1, 32")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 30,
    allow_adapter: Annotated[
        list[str] | None, typer.Option(help="Adapters whose code may be imported, as package.module:function.")
    ] = None,
    output_json: Json = False,
) -> None:
    """Measure models side by side in this process: median and quartiles, and the ratio to the first.

    `regrow latency models:/digits-vit@dense models:/digits-vit@champion -b 1 -b 32`
    """
    from flows import inspection

    raise typer.Exit(inspection.latency(models, batch or [1, 32], rounds, allow_adapter or [], output_json))


@app.command()
def promote(
    name: Name = None,
    version: Annotated[str | None, typer.Option(help="The version; the challenger by default.")] = None,
    params: ParamsFile = None,
    override: Overrides = None,
) -> None:
    """Ask the gate about a version, and make it champion when it passes.

    `regrow promote digits-vit --version 3 -p digits.yaml`
    """
    from flows import inspection

    raise typer.Exit(inspection.promote(name, version, params, override or []))


@app.command()
def rollback(
    name: Name = None,
    to: Annotated[str | None, typer.Option(help="The version; the previous champion by default.")] = None,
) -> None:
    """Make an earlier version champion again.

    `regrow rollback digits-vit`
    """
    from flows import inspection

    raise typer.Exit(inspection.rollback(name, to))


@app.command()
def history(name: Name = None, output_json: Json = False) -> None:
    """Every move of an alias: who, when, from, to, why.

    `regrow history digits-vit`
    """
    from flows import inspection

    raise typer.Exit(inspection.history(name, output_json))


@app.command()
def doctor() -> None:
    """Say where everything is, and close the MLflow runs that killed processes left open.

    `regrow doctor`
    """
    from flows import inspection

    raise typer.Exit(inspection.doctor())


@app.command()
def ui(port: Annotated[int, typer.Option(min=1024, max=65535)] = 5000) -> None:
    """Serve MLflow's pages on 127.0.0.1 until interrupted.

    `regrow ui --port 5000`
    """
    from flows import inspection

    raise typer.Exit(inspection.ui(port))


@store.command()
def gc(
    keep_runs: Annotated[int, typer.Option(min=0, help="Keep what the last N runs used.")] = 20,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove artifacts that neither a registered version nor one of the last runs refers to.

    `regrow store gc --keep-runs 5`
    """
    from flows import inspection

    raise typer.Exit(inspection.collect_garbage(keep_runs, dry_run))


def _params_file(given: Path | None) -> Path:
    file = given or Path("params.yaml")
    if not file.is_file():
        raise InputError(f"there is no {file} here; give one with --params, or try `regrow demo`")
    return file


def _demo_params() -> Path | None:
    """The params.yaml here, if it is about digits: in a checkout the demo is the canonical experiment."""
    file = Path("params.yaml")
    if not file.is_file():
        return None
    from tasks import params

    source = params.load(file, []).calibration.source
    if source != "digits":
        raise InputError(f"params.yaml here is about {source}, not the demo's digits; `regrow run` runs it")
    return file


def _output(output_json: bool, verbose: bool) -> Output:
    if verbose:
        logging.getLogger("regrow").setLevel(logging.INFO)
    return "json" if output_json else "plain" if verbose else "auto"


def _explained(error: HealError) -> int:
    """What is wrong, where, and what to do, in at most five lines; an error nobody made on purpose is a bug."""
    lines = str(error).splitlines()
    sys.stderr.write("\n".join([f"error: {lines[0]}", *lines[1:5]]) + "\n")
    return 2 if isinstance(error, InputError) else 1


def _quiet_the_stack() -> None:
    """Telemetry off and chatter down for everything below, before any of it is imported."""
    from tasks import state

    for name, value in {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_HOME": str(state.prefect_home()),
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("regrow").addHandler(_Stderr())


class _Stderr(logging.Handler):
    """Warnings of regrow as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.levelname.lower()}: {record.getMessage()}\n")


if __name__ == "__main__":
    main()
