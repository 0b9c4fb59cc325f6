"""The command line: arguments in, exit code out. A file a group of commands; the work is in `drafttrain.commands`.

Commands import their work inside the function: `drafttrain --help` and a wrong argument need no torch.
"""

import sys

from drafttrain.cli import (
    advise,
    chat,
    check_server,
    data,
    engines,
    evaluate,
    fit_scaling,
    formats,
    online,
    plan,
    recipes,
    record,
    stages,
    sweep,
    target,
)
from drafttrain.cli.app import app

__all__ = ["app", "main"]

for group in (stages, sweep, fit_scaling, plan, evaluate, advise, chat, formats, check_server, record):
    group.add_to(app)
app.add_typer(data.app, name="data")
app.add_typer(online.app, name="online")
app.add_typer(recipes.app, name="recipe")
app.add_typer(engines.app, name="engines")
app.add_typer(target.app, name="target")


def main() -> None:
    """Run the command line."""
    # DeepSpeed's launcher adds --local_rank, which the environment has too.
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    app()
