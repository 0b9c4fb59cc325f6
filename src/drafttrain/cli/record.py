"""`record`: the recorder in front of a server."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, exit_codes
from drafttrain.recorder.settings import RecorderSettings


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(record)


def record(
    upstream: Annotated[
        str,
        typer.Option(
            "--upstream", metavar="URL", help="The server, such as http://127.0.0.1:8000.", show_default=False
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="Port that clients use from now on. 0: a free port.", min=0)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the records.", show_default=False)],
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on. Anything but loopback exposes the proxy to the network."),
    ] = "127.0.0.1",
    logprobs: Annotated[
        int,
        typer.Option(
            "--logprobs", metavar="K", help="Request the K largest log-probabilities. Clients do not see them.", min=0
        ),
    ] = 0,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Request token ids from vLLM. Clients do not see them.")
    ] = False,
    redact: Annotated[
        bool,
        typer.Option(
            "--redact/--no-redact",
            help="Replace keys, passwords, e-mail addresses, and telephone, card and account numbers before writing.",
        ),
    ] = True,
    redact_with: Annotated[
        str | None,
        typer.Option("--redact-with", metavar="NAME", help="Dotted name of a function (text) -> text of your own."),
    ] = None,
    rotate_mb: Annotated[
        int, typer.Option("--rotate-mb", metavar="MB", help="Start a new file of records at this size.", min=1)
    ] = 256,
    record_mb: Annotated[
        int,
        typer.Option(
            "--record-mb", metavar="MB", help="Largest request with its answer that is recorded, decompressed.", min=1
        ),
    ] = 32,
    max_clients: Annotated[
        int, typer.Option("--max-clients", metavar="N", help="Most connections at a time. Further ones get 503.", min=1)
    ] = 8192,
    request_seconds: Annotated[
        float,
        typer.Option(
            "--request-seconds", metavar="S", help="Time limit for the head of a request, and for a pause in its body."
        ),
    ] = 60.0,
    grace_seconds: Annotated[
        float, typer.Option("--grace-seconds", metavar="S", help="Time limit for open requests after SIGTERM.")
    ] = 30.0,
    debug: Debug = False,
) -> None:
    """Run a proxy in front of an OpenAI-compatible server and record its answers, for {kind: serving_logs, path: DIR}."""
    with exit_codes(debug=debug):
        from drafttrain.recorder.proxy import record as serve

        serve(
            RecorderSettings(
                upstream=upstream,
                out=out,
                port=port,
                host=host,
                logprobs=logprobs,
                token_ids=token_ids,
                redact=redact,
                redact_with=redact_with,
                rotate_bytes=rotate_mb * 2**20,
                record_bytes=record_mb * 2**20,
                max_clients=max_clients,
                request_seconds=request_seconds,
                grace_seconds=grace_seconds,
            )
        )
