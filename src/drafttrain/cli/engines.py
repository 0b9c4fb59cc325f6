"""`engines`: the environments of serving engines."""

from typing import Annotated

import typer

from drafttrain.cli.app import Debug, exit_codes
from drafttrain.core.console import say, table
from drafttrain.environments.environment import install as install_environment
from drafttrain.environments.known import environments_of

app = typer.Typer(help="Install and list the serving engines that verify an export.", no_args_is_help=True)


@app.command()
def install(
    names: Annotated[list[str], typer.Argument(metavar="ENGINE...", help="Serving engines.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Install a serving engine into an environment of its own, in the user's cache."""
    with exit_codes(debug=debug):
        for environment in environments_of(names):
            say(f"{environment.name}: ready in {install_environment(environment)}")


@app.command(name="list")
def list_engines() -> None:
    """List the serving engines that can verify an export, and where their environments are."""
    from drafttrain.serving.engines import table_rows

    table(table_rows(), columns=["engine", "pins", "kinds", "formats", "where"])
