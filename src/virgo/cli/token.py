"""`virgo token`: named tokens for TCP clients, each with roles of its own.

A token is printed once, when it is made; only its hash is kept. A running node notices at the next login.
"""

from __future__ import annotations

import datetime
import json
from typing import Annotated

import typer

from virgo import config
from virgo.wire.tokens import TokenStore

app = typer.Typer(help="Tokens: who may log in over TCP, and do what.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the token.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    name: Name,
    role: Annotated[list[str], typer.Option(metavar="ROLE", help="read, write, exec or admin; repeatable.")],
    as_json: Json = False,
) -> None:
    """Make a token and print it; it cannot be shown again."""
    secret = TokenStore(config.load().home).create(name, role)
    if as_json:
        typer.echo(json.dumps({"name": name, "roles": sorted(set(role)), "token": secret}, indent=2))
    else:
        typer.echo(secret)


@app.command("list")
def show(as_json: Json = False) -> None:
    """List the tokens with their roles; never their secrets."""
    tokens = TokenStore(config.load().home).all()
    if as_json:
        rows = [
            {"name": token.name, "roles": sorted(token.roles), "created_ms": token.created_ms}
            for token in tokens
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not tokens:
        typer.echo("No tokens besides the main one. `virgo token create NAME --role read` makes one.")
    for token in tokens:
        made = datetime.datetime.fromtimestamp(token.created_ms / 1000, datetime.UTC)
        typer.echo(f"{token.name:<20} {', '.join(sorted(token.roles)):<28} made {made:%F %R} UTC")


@app.command()
def remove(name: Name) -> None:
    """Revoke a token. Connections that it opened before stay until they close."""
    TokenStore(config.load().home).remove(name)
    typer.echo(f"Removed the token {name!r}.")
