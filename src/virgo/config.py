"""Configuration: defaults, then TOML files, then environment variables.

Files: `/etc/virgo/virgo.toml`, then `$VIRGO_HOME/virgo.toml`, or only the one that `VIRGO_CONFIG` names.
Environment: `VIRGO_<SECTION>_<KEY>`, for example `VIRGO_MEMORY_CAPACITY_BYTES=1073741824`; lists and
tables as JSON. An unknown key is an error, so that a typing mistake is not a silent default.

The reference system's one-line files of comma-separated addresses are read too: `virgo_cloud.conf`
(machines to join) and `virgo_client.conf` (machines that `virgo.connect()` tries), in `$VIRGO_HOME` or
`/etc`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from virgo.errors import BadConfig
from virgo.limits import (
    CALL_GPUS_MAX,
    CALL_MEMORY_BYTES_MAX,
    CALL_MEMORY_BYTES_MIN,
    CALL_TIMEOUT_MS_MAX,
    MEMORY_VALUE_BYTES_MAX,
    PORT_OFFSET_MAX,
    WORKERS_MAX,
    GiB,
)


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The node itself.

    Attributes:
        bind: host at which the ports listen; beyond loopback it needs TLS. "" for no ports at all.
        advertise: host under which other machines reach it, if it is not `bind`.
        port_offset: added to every port.
        join: `HOST[:PORT]` of nodes of a cloud to join; PORT is that of their memory port.
    """

    bind: str = "127.0.0.1"
    advertise: str = ""
    port_offset: int = 0
    join: list[str] = []
    log_level: str = "info"


class MemoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory pool.

    Attributes:
        capacity_bytes: 0 means half of the machine's memory, shared by its nodes.
        evict: whether a full pool forgets the least used keys, also those that are in no cache.
        shared_directory: where shared regions lie; "" for /dev/shm if it is large enough, else with the node.
        memcached: where memcached's protocol is spoken: `HOST:PORT` or `unix:/path`, in which `{node}` is
            the node's name; "" for nowhere.
        memcached_roles: what everybody on this machine may do there by TCP without a login.
        memcached_item_bytes: the largest item that is taken there, its key and head included.
    """

    capacity_bytes: int = 0
    evict: bool = False
    shared_directory: str = ""
    memcached: str = ""
    memcached_roles: list[str] = []
    memcached_item_bytes: int = 1024 * 1024


class CpuConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The processor pool.

    Attributes:
        workers: worker processes of a node; 0 means one per processor, shared by the machine's nodes.
        imports: modules whose @virgo.export functions the node offers.
        programs: allowlist: name to command, e.g. `wc = ["/usr/bin/wc"]`; callers add arguments.
        program_time_s: time limit of a program.
        memory_bytes: what a call may hold that asks for no memory itself; 0 for no limit.
        gpus: GPUs of this node; -1 for those of the machine, on its first node.
        placement: `pressure`, by what is known of the nodes; `random`, by nothing.
        backend: of clients, who runs their callables: "" for VIRGO's workers, `ray`, `dask`.
        backend_address: where that is; "" for what Ray or Dask finds by itself.
    """

    workers: int = 0
    imports: list[str] = []
    programs: dict[str, list[str]] = {}
    program_time_s: float = 300.0
    memory_bytes: int = 0
    gpus: int = -1
    placement: str = "pressure"
    backend: str = ""
    backend_address: str = ""


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Paths that begin with `prefix` live on `node`."""

    prefix: str
    node: str


class FilesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files. `exports`: name to directory, shown as `/NODE/NAME/...`; `read_only`: names among them."""

    exports: dict[str, str] = {}
    read_only: list[str] = []
    placement: list[Placement] = []


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine.

    Attributes:
        url: a NATS server or cluster to use (`nats://host:4222`, `tls://...`); "" for the embedded one.
        credentials: NATS credentials file for `url`.
        monitor: URL of the monitoring port of that NATS (`http://127.0.0.1:8222`), where its settings are
            looked at; without it the engine counts as unsafe, for a client cannot see when it syncs.
        server: path of a nats-server to run instead of the packaged one.
        port: port of the embedded server; 0 picks a free one and keeps it.
        cluster: hosts of a cluster of three or five embedded servers, this machine's among them.
        unsafe: accept settings that can lose acknowledged data.
    """

    url: str = ""
    credentials: str = ""
    monitor: str = ""
    server: str = ""
    port: int = 0
    cluster: list[str] = []
    unsafe: bool = False


class SecurityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may do what.

    Attributes:
        roles: identity to roles: `"uid:1001" = ["read"]`, `"cert:alice" = ["read", "exec"]`,
            `"token:ci" = ["write"]`. The owner of VIRGO_HOME, root and the main token are admin.
        certificate, key, authority: PEM files for TLS; default `$VIRGO_HOME/tls/{node.crt,node.key,ca.crt}`.
    """

    roles: dict[str, list[str]] = {}
    certificate: str = ""
    key: str = ""
    authority: str = ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration; `home` is VIRGO_HOME."""

    home: Path = Path()
    node: NodeConfig = NodeConfig()
    memory: MemoryConfig = MemoryConfig()
    cpu: CpuConfig = CpuConfig()
    files: FilesConfig = FilesConfig()
    engine: EngineConfig = EngineConfig()
    security: SecurityConfig = SecurityConfig()


SECTIONS = ("node", "memory", "cpu", "files", "engine", "security")
MEMORY_CAPACITY_BYTES_MIN = 16 * 1024 * 1024
MEMORY_CAPACITY_BYTES_MAX = 1024 * GiB


class Range(NamedTuple):
    """What a number may be, both ends included; `or_zero` where 0 says "choose for me"."""

    low: float
    high: float
    or_zero: bool = False

    def __str__(self) -> str:
        return f"{'0, or ' if self.or_zero else ''}{self.low} to {self.high}"

    def holds(self, value: float) -> bool:
        """Whether the value is one of them; NaN never is."""
        return self.low <= value <= self.high or (self.or_zero and value == 0)


# Every number of the configuration is here: one without bounds is a mistake that starts.
RANGES: Final[Mapping[tuple[str, str], Range]] = {
    ("node", "port_offset"): Range(0, PORT_OFFSET_MAX),
    ("memory", "capacity_bytes"): Range(MEMORY_CAPACITY_BYTES_MIN, MEMORY_CAPACITY_BYTES_MAX, or_zero=True),
    ("memory", "memcached_item_bytes"): Range(1024, MEMORY_VALUE_BYTES_MAX),
    ("cpu", "workers"): Range(0, WORKERS_MAX),
    ("cpu", "program_time_s"): Range(0.001, CALL_TIMEOUT_MS_MAX // 1000),
    ("cpu", "memory_bytes"): Range(CALL_MEMORY_BYTES_MIN, CALL_MEMORY_BYTES_MAX, or_zero=True),
    ("cpu", "gpus"): Range(-1, CALL_GPUS_MAX),
    ("engine", "port"): Range(0, 65_535),
}
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
PLACEMENTS: Final = ("pressure", "random")
BACKENDS: Final = ("", "dask", "ray")
_WORDS: Final = (
    ("node", "log_level", LOG_LEVELS),
    ("cpu", "placement", PLACEMENTS),
    ("cpu", "backend", BACKENDS),
)


_HINT: Final = "See docs/configuration.md."


def home(environment: Mapping[str, str] | None = None) -> Path:
    """VIRGO_HOME, by default `~/.virgo`."""
    environment = os.environ if environment is None else environment
    return Path(environment.get("VIRGO_HOME") or Path.home() / ".virgo").expanduser().absolute()


def load(environment: Mapping[str, str] | None = None) -> Config:
    """The configuration that files and environment give.

    Raises:
        BadConfig: a file is unreadable, or a key or value is wrong; the message names it.
    """
    environment = os.environ if environment is None else environment
    root = home(environment)
    named = environment.get("VIRGO_CONFIG")
    paths = [Path(named)] if named else [Path("/etc/virgo/virgo.toml"), root / "virgo.toml"]
    merged: dict[str, Any] = {}
    for path in paths:
        if named or _is_there(path):
            _merge(merged, _read_toml(path))
    if "home" in merged:
        raise BadConfig("`home` cannot be set in a file", hint="Set the variable VIRGO_HOME.")
    _merge(merged, _from_environment(environment))
    sources = ", ".join(str(path) for path in paths if _is_there(path)) or "the environment"
    try:
        found = msgspec.structs.replace(msgspec.convert(merged, Config), home=root)
    except msgspec.ValidationError as error:
        raise BadConfig(f"configuration from {sources}: {error}", hint=_HINT) from None
    _check_values(found, environment, f"configuration from {sources}")
    return found


def _check_values(found: Config, environment: Mapping[str, str], source: str) -> None:
    """Raise BadConfig for the first value that is of the right type and makes no sense."""
    for (section, key), allowed in RANGES.items():
        value = getattr(getattr(found, section), key)
        if not allowed.holds(value):
            raise _out_of_range(section, key, value, str(allowed), environment, source)
    for section, key, words in _WORDS:
        value = getattr(getattr(found, section), key)
        if value.lower() not in words:
            allowed_words = ", ".join(word or '""' for word in words)
            raise _out_of_range(section, key, value, allowed_words, environment, source)


def _out_of_range(
    section: str, key: str, value: object, allowed: str, environment: Mapping[str, str], source: str
) -> BadConfig:
    variable = f"VIRGO_{section}_{key}".upper()
    where = f"environment variable {variable}" if variable in environment else source
    return BadConfig(
        f"{where}: {section}.{key} is {value}, but must be {allowed}",
        hint=f"Mend {section}.{key}, or leave it out for the default. {_HINT}",
    )


def reference_addresses(name: str, root: Path) -> list[str]:
    """Addresses in the reference's one-line file `name` (`virgo_cloud.conf`, `virgo_client.conf`)."""
    for path in (root / name, Path("/etc") / name):
        if path.exists():
            words = path.read_text(encoding="utf-8", errors="replace").replace("\n", ",").split(",")
            return [word.strip() for word in words if word.strip()]
    return []


def _is_there(path: Path) -> bool:
    """Whether there is such a file. Raises BadConfig if that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BadConfig(
            f"{path}: {error.strerror}",
            hint="Let this user read it, or choose another directory with VIRGO_HOME or --home.",
        ) from None
    return True


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path}: {error}", hint="Mend the file, or remove it for the defaults.") from None


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for section, values in other.items():
        if isinstance(values, dict) and isinstance(into.get(section), dict):
            into[section].update(values)
        else:
            into[section] = values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    known: set[str] = set()
    for section in SECTIONS:
        kind = Config.__annotations__[section]
        fields = {field.name: field.type for field in msgspec.structs.fields(globals()[kind])}
        for key, field_type in fields.items():
            variable = f"VIRGO_{section}_{key}".upper()
            known.add(variable)
            if variable in environment:
                found.setdefault(section, {})[key] = _convert(variable, environment[variable], field_type)
    prefixes = tuple(f"VIRGO_{section}_".upper() for section in SECTIONS)
    for variable in environment:
        if variable.startswith(prefixes) and variable not in known:
            raise BadConfig(
                f"environment variable {variable}: there is no such setting",
                hint=_HINT,
            )
    return found


def _convert(variable: str, value: str, kind: Any) -> Any:
    try:
        if kind is str:
            return value
        if kind in (bool, int, float):
            return msgspec.convert(value.lower() if kind is bool else value, kind, strict=False)
        return msgspec.json.decode(value.encode(), type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise BadConfig(
            f"environment variable {variable}: {error}", hint="Lists and tables are JSON."
        ) from None
