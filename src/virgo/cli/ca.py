"""`virgo ca`: the authority of a cloud, and certificates for its machines and users.

It writes files below `$VIRGO_HOME/tls` and says which to copy where; it talks to no node and copies
nothing itself. Nothing that exists is overwritten.
"""

from __future__ import annotations

import json
import socket
from typing import Annotated, Any

import psutil
import typer

from virgo import config
from virgo.cli.options import within
from virgo.errors import BadArgument
from virgo.limits import AUTHORITY_DAYS, CERTIFICATE_DAYS, CERTIFICATE_HOSTS_MAX
from virgo.wire import authority

app = typer.Typer(
    help="Certificates: the authority of a cloud, its machines and users.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", metavar="HOST", help="Name or address of it; repeatable.")
]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="Name of the cloud, shown in the authority's subject.")] = "VIRGO",
    host: Hosts = None,
    as_json: Json = False,
) -> None:
    """Make an authority, and this machine's certificate for all of its names and addresses."""
    directory = config.load().home / "tls"
    root = authority.create_authority(directory, name=name)
    hosts = [*(host or ()), *own_hosts()][: CERTIFICATE_HOSTS_MAX - 1]
    node = authority.issue(directory, _own_name(), hosts=hosts, node=True, into=directory)
    if as_json:
        _print_json({"authority": _described(root), "certificate": _described(node)})
        return
    typer.echo(f"authority    {root.files.certificate} (key {root.files.key}: keep it here, and secret)")
    typer.echo(f"certificate  {node.files.certificate}, valid until {node.expires:%F}")
    typer.echo(f"             for {', '.join(node.hosts)}")
    typer.echo("For another machine: virgo ca issue NAME --node --host ADDRESS")


@app.command()
def issue(
    name: Annotated[str, typer.Argument(help="Name of the machine or user.")],
    host: Hosts = None,
    role: Annotated[
        list[str] | None, typer.Option(metavar="ROLE", help="read, write, exec or admin; repeatable.")
    ] = None,
    node: Annotated[bool, typer.Option("--node", help="It is a machine of the cloud.")] = False,
    days: Annotated[
        int, typer.Option(callback=within(1, AUTHORITY_DAYS), help="How long it is valid.")
    ] = CERTIFICATE_DAYS,
    as_json: Json = False,
) -> None:
    """Make a certificate for a machine (--node) or a user (--role)."""
    if node == bool(role):
        raise BadArgument(
            "a certificate is for a machine or for a user",
            hint="Give --node, or one or more --role read|write|exec|admin.",
        )
    if host and not node:
        raise BadArgument("only a machine has hosts", hint="Leave --host out, or give --node.")
    directory = config.load().home / "tls"
    made = authority.issue(directory, name, hosts=host or (), roles=role or (), node=node, days=days)
    if as_json:
        _print_json(_described(made))
        return
    what = f"machine, for {', '.join(made.hosts)}" if node else f"user, with {', '.join(made.roles)}"
    source = made.files.certificate.parent
    typer.echo(f"certificate  {made.files.certificate} ({what}), valid until {made.expires:%F}")
    typer.echo(f"Copy what is in {source} to $VIRGO_HOME/tls of {name}, for example:")
    typer.echo(f"  scp -p {source}/* {(host or [name])[0]}:.virgo/tls/")


def own_hosts() -> list[str]:
    """Names and addresses of this machine; addresses that only its own links know are left out."""
    addresses = [
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    ]
    return list(dict.fromkeys(["localhost", _own_name(), *addresses]))


def _own_name() -> str:
    return socket.gethostname() or "localhost"


def _described(made: authority.Issued) -> dict[str, Any]:
    return {
        "name": made.name,
        "node": made.node,
        "hosts": list(made.hosts),
        "roles": list(made.roles),
        "expires": made.expires.isoformat(),
        "certificate": str(made.files.certificate),
        "key": str(made.files.key),
        "authority": str(made.files.authority),
    }


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))
