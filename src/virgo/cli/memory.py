"""`virgo memory`: the pool as a whole, once or as it changes, and the end of a namespace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virgo.cli import render
from virgo.cli.options import Home, Json, connected, within

if TYPE_CHECKING:
    from rich.console import RenderableType

    from virgo.memory.figures import NodePool, Pool

app = typer.Typer()
_NUMBERS = ("CAPACITY", "USED", "FREE", "REGIONS", "KEYS", "HIT RATE", "FRAGMENTED", "EVICTED")
_RATES = ("USED", "KEYS", "GETS/S", "HIT RATE", "CHANGES/S", "EVICTED/S", "READERS")
_SPACE_NUMBERS = ("KEYS", "BYTES", "DROPS")


@app.command()
def show(as_json: Json = False, _home: Home = None) -> None:
    """Show what each node gives to the pool and what is in it, and the namespaces."""
    with connected() as cloud:
        pool = cloud.memory.pool()
    if as_json:
        render.print_json(pool)
        return
    render.table(("NODE", *_NUMBERS), [_row(node) for node in pool.nodes], right=_NUMBERS)
    for node in pool.nodes:
        if node.figures.get("slots_kept_once"):
            render.note(f"{node.name}: no node can take copies now of keys that are kept on two nodes")
    if pool.namespaces:
        render.say()
        rows = [
            (
                space.name,
                space.keys,
                render.size(space.key_bytes or 0),
                space.generation - 1,
                "may be evicted" if space.cache else "",
            )
            for space in pool.namespaces
        ]
        render.table(("NAMESPACE", *_SPACE_NUMBERS, ""), rows, right=_SPACE_NUMBERS)


@app.command()
def drop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the namespace, without its colon.")],
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Delete all keys of a namespace at once."""
    with connected() as cloud:
        cloud.memory.drop(name)
    if as_json:
        render.print_json({"dropped": name})
    else:
        render.say(f"Dropped the keys that begin with {render.printable(name)}:")


@app.command()
def top(
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", help="Between looks.", callback=within(0.1, 3600)),
    ] = 1.0,
    count: Annotated[
        int, typer.Option("--count", metavar="N", help="End after so many looks; 0: until Ctrl-C.", min=0)
    ] = 0,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Show what the pool is doing, again and again; with --json a line for each look.

    Changes that programs make by mapping are among the changes; their reads are in no figure.
    """
    with connected() as cloud:
        before, began = cloud.memory.pool(), time.monotonic()
        shown = _Shown(as_json)
        with shown:
            looks = 0
            while not count or looks < count:
                time.sleep(interval)
                now, ended = cloud.memory.pool(), time.monotonic()
                shown.show(rates(before, now, ended - began))
                before, began = now, ended
                looks += 1


def rates(before: Pool, now: Pool, seconds: float) -> list[dict[str, Any]]:
    """What each node did between two looks."""
    then = {node.name: node.figures for node in before.nodes}
    found: list[dict[str, Any]] = []
    for node in now.nodes:
        old, new = then.get(node.name) or node.figures, node.figures
        if not new:
            found.append({"node": node.name, "error": node.error})
            continue
        # A node that has restarted counts from nothing.
        per_s: dict[str, float] = {
            key: max(0, new[key] - old.get(key, 0)) / seconds
            for key in ("hits", "misses", "transactions", "keys_evicted")
        }
        gets = per_s["hits"] + per_s["misses"]
        found.append(
            {
                "node": node.name,
                "used_bytes": new["used_bytes"],
                "keys": new["keys"],
                "gets_per_s": gets,
                "hit_rate": per_s["hits"] / gets if gets else None,
                "changes_per_s": per_s["transactions"],
                "evicted_per_s": per_s["keys_evicted"],
                "readers": new["readers"],
            }
        )
    return found


class _Shown:
    """Where looks are shown: one place of a terminal, or lines."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._live: Any = None

    def __enter__(self) -> None:
        to = render.console()
        if not self._as_json and to.is_terminal:
            from rich.live import Live

            self._live = Live(console=to, auto_refresh=False)
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, found: list[dict[str, Any]]) -> None:
        """One look."""
        if self._as_json:
            render.print_json_line(found)
        elif self._live is not None:
            self._live.update(_table(found), refresh=True)
        else:
            render.table(("NODE", *_RATES), [_cells(node) for node in found], right=_RATES)


def _table(found: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("NODE", *_RATES):
        shown.add_column(column, justify="left" if column == "NODE" else "right")
    for node in found:
        shown.add_row(*(str(cell) for cell in _cells(node)))
    return shown


def _cells(node: dict[str, Any]) -> tuple[object, ...]:
    if "error" in node:
        return (node["node"], "no answer", *["-"] * (len(_RATES) - 1))
    return (
        node["node"],
        render.size(node["used_bytes"]),
        node["keys"],
        f"{node['gets_per_s']:.0f}",
        _percent(node["hit_rate"]),
        f"{node['changes_per_s']:.0f}",
        f"{node['evicted_per_s']:.0f}",
        node["readers"],
    )


def _row(node: NodePool) -> tuple[object, ...]:
    figures = node.figures
    if not figures:
        return (node.name, "no answer", *["-"] * (len(_NUMBERS) - 1))
    gets = figures["hits"] + figures["misses"]
    file_bytes = max(1, figures["file_bytes"])
    return (
        node.name,
        render.size(figures["capacity_bytes"]),
        render.size(figures["used_bytes"]),
        render.size(max(0, figures["capacity_bytes"] - figures["used_bytes"])),
        figures["regions"],
        figures["keys"],
        _percent(figures["hits"] / gets if gets else None),
        _percent(figures["reusable_bytes"] / file_bytes),
        figures["keys_evicted"],
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
