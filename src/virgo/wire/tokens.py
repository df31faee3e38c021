"""Tokens: the secrets that open a TCP port, kept as files below VIRGO_HOME.

The main token is the text in `token`, made when it is absent; who reads the file is an administrator.
Further ones are `tokens/NAME.json`, which hold only the SHA-256 of the token and its roles: a token is
shown once, when it is made. Files are 0600 and appear whole or not at all, also when two processes make
one at once; one that others may read is refused. A file is read again when it changes, so a removed
token opens no new connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from virgo.clock import wall_ms
from virgo.context import ROLES
from virgo.errors import BadArgument, BadConfig
from virgo.limits import (
    NAME_CHARS_MAX,
    TOKEN_CHARS_MIN,
    TOKEN_FILE_BYTES_MAX,
    TOKEN_RANDOM_BYTES,
    TOKENS_MAX,
)

MAIN = "main"
# Names under which the main token is meant; Redis clients say "default".
MAIN_NAMES = frozenset({"", "default", MAIN})
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")

Value = TypeVar("Value")


class Token(msgspec.Struct, frozen=True):
    """One named token, without its secret."""

    name: str
    roles: frozenset[str]
    sha256: str
    created_ms: int = 0


class TokenStore:
    """The tokens of one VIRGO_HOME."""

    def __init__(self, home: Path) -> None:
        self._main = home / "token"
        self._directory = home / "tokens"
        self._seen: dict[Path, tuple[tuple[int, ...], bytes]] = {}

    def __repr__(self) -> str:
        return f"<TokenStore {self._directory}>"

    def main(self) -> str:
        """The main token, made if it is absent. Raises BadConfig."""
        if not self._main.exists():
            self._main.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Another process may have been first: then its token is the token.
            with contextlib.suppress(FileExistsError):
                write_new(self._main, secrets.token_urlsafe(TOKEN_RANDOM_BYTES).encode() + b"\n")
        token = self._read(self._main).strip().decode("ascii", "replace")
        if len(token) < TOKEN_CHARS_MIN or not token.isascii() or not token.isprintable():
            raise BadConfig(
                f"{self._main} holds no token of at least {TOKEN_CHARS_MIN} printable characters",
                hint="Remove the file; the next start makes a new token.",
            )
        return token

    def is_main(self, token: str) -> bool:
        """Whether it is the main token; never makes one. Raises BadConfig."""
        return self._main.exists() and hmac.compare_digest(_digest(self.main()), _digest(token))

    def find(self, token: str, name: str = "") -> Token | None:
        """The named token with this secret, among all if no name is given.

        Raises:
            BadConfig: none fits, and a file among those asked cannot be used.
        """
        if name and not _NAME.fullmatch(name):
            return None
        digest = _digest(token)
        broken: BadConfig | None = None
        for path in [self._path(name)] if name else self._paths():
            try:
                kept = self._load(path)
            except FileNotFoundError:  # removed this moment
                continue
            except BadConfig as error:
                broken = error
                continue
            if hmac.compare_digest(kept.sha256, digest):
                return kept
        if broken is not None:
            raise broken
        return None

    def create(self, name: str, roles: Iterable[str]) -> str:
        """Make a token and return it; it cannot be shown again.

        Raises:
            BadArgument: the name or a role is not one, or the name is in use.
        """
        chosen = check_roles(roles)
        if not _NAME.fullmatch(name) or name in MAIN_NAMES:
            raise BadArgument(
                f"{name!r} cannot name a token",
                hint=f"Up to {NAME_CHARS_MAX} letters, digits, '.', '_' and '-'; not 'main' or 'default'.",
            )
        if sum(1 for _ in self._paths()) >= TOKENS_MAX:
            raise BadArgument(f"there are {TOKENS_MAX} tokens already", hint="Remove some first.")
        secret = secrets.token_urlsafe(TOKEN_RANDOM_BYTES)
        token = Token(name=name, roles=chosen, sha256=_digest(secret), created_ms=wall_ms())
        make_private(self._directory)
        try:
            write_new(self._path(name), msgspec.json.encode(token) + b"\n")
        except FileExistsError:
            raise BadArgument(
                f"there is a token {name!r} already", hint=f"`virgo token remove {name}` revokes it."
            ) from None
        return secret

    def all(self) -> list[Token]:
        """The named tokens, by name. Raises BadConfig."""
        found = []
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):
                found.append(self._load(path))
        return sorted(found, key=lambda token: token.name)

    def remove(self, name: str) -> None:
        """Revoke a token; connections that it opened before stay. Raises BadArgument if there is none."""
        try:
            if not _NAME.fullmatch(name):
                raise FileNotFoundError
            self._path(name).unlink()
        except FileNotFoundError:
            raise BadArgument(f"there is no token {name!r}", hint="`virgo token list` shows them.") from None

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _paths(self) -> Iterator[Path]:
        if self._directory.exists() and not os.access(self._directory, os.R_OK | os.X_OK):
            raise BadConfig(f"{self._directory} cannot be read by this user", hint="Only its owner can.")
        return self._directory.glob("[A-Za-z0-9]*.json")

    def _load(self, path: Path) -> Token:
        try:
            token = msgspec.json.decode(self._read(path), type=Token)
        except msgspec.DecodeError as error:
            raise BadConfig(f"{path}: {error}", hint="Remove the file and make the token anew.") from None
        if token.name != path.stem or not token.roles <= ROLES:
            raise BadConfig(f"{path}: its name or a role is wrong", hint="Make the token anew.")
        return token

    def _read(self, path: Path) -> bytes:
        """The bytes of a secret file, from memory while it is unchanged."""
        try:
            with path.open("rb") as file:
                info = os.fstat(file.fileno())
                _check_private(path, info)
                signature = (info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_size)
                known = self._seen.get(path)
                if known is not None and known[0] == signature:
                    return known[1]
                data = file.read(TOKEN_FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            self._seen.pop(path, None)
            raise
        except OSError as error:
            raise BadConfig(f"{path}: {error.strerror}", hint="Only its owner can read it.") from None
        if len(data) > TOKEN_FILE_BYTES_MAX:
            raise BadConfig(f"{path} has over {TOKEN_FILE_BYTES_MAX} bytes; that is no token")
        self._seen[path] = (signature, data)
        return data


def check_roles(roles: Iterable[str]) -> frozenset[str]:
    """The roles as a set. Raises BadArgument if one is not a role."""
    chosen = frozenset(roles)
    if not chosen or not chosen <= ROLES:
        wrong = ", ".join(sorted(chosen - ROLES)) or "none"
        raise BadArgument(f"not a role: {wrong}", hint=f"Roles are {', '.join(sorted(ROLES))}.")
    return chosen


def make_private(directory: Path) -> None:
    """Make a directory for its owner only, if it is not there: the owner of the one in which it lies."""
    if directory.exists():
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0:
        above = directory.parent.stat()
        os.chown(directory, above.st_uid, above.st_gid)


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Create a file whole: it is there with all of its bytes, or not at all.

    Raises:
        FileExistsError: there is one already; it is left as it is.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask took or left
            if os.geteuid() == 0:  # what root puts into a service's directory is for the service
                above = path.parent.stat()
                os.fchown(file.fileno(), above.st_uid, above.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    finally:
        draft.unlink()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _check_private(path: Path, info: os.stat_result) -> None:
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise BadConfig(f"{path} may be read by others", hint=f"chmod 600 {path}, and make a new token.")
