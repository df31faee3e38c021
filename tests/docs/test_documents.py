"""What the documents show is what happens: their blocks are run, their tables compared with the code."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from conftest import RunningCloud
from docs.blocks import Block, Surroundings, fits, parse, run, shift
from virgo import config as configuration
from virgo import errors
from virgo.members import PORTS
from virgo.memory.verbs import BY_NAME

_ROOT = Path(__file__).parents[2]
_DOCUMENTS = [_ROOT / "README.md", _ROOT / "ARCHITECTURE.md", *sorted((_ROOT / "docs").glob("*.md"))]
_RUN = [path for path in _DOCUMENTS if any("run" in block.flags for block in parse(path))]


@pytest.fixture
def around(cloud3: RunningCloud, tmp_path: Path) -> Surroundings:
    directory = Path(sys.executable).parent
    environment = {
        **cloud3.environment,
        "PATH": f"{directory}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "error",
    }
    offset = cloud3.ports("n1")["memory"] - PORTS["memory"]
    return Surroundings(tmp_path, environment, cloud3.token, offset)


@pytest.mark.parametrize("path", _RUN, ids=lambda path: path.name)
def test_blocks_of_documents_do_what_they_show(path: Path, around: Surroundings) -> None:
    """Every block marked `run` succeeds, in order, and prints what the document shows."""
    assert shutil.which("redis-cli"), "redis-cli is missing; the Debian package is redis-tools"
    for block in parse(path):
        if "run" in block.flags:
            run(block, around)


def test_toml_blocks_are_configurations(tmp_path: Path) -> None:
    """Every TOML block below docs/ is read as a configuration without complaint."""
    paths = (_ROOT / "docs").glob("*.md")
    blocks = [block for path in paths for block in parse(path) if block.language == "toml"]
    assert blocks
    for block in blocks:
        (tmp_path / "virgo.toml").write_text("\n".join(block.lines))
        configuration.load({"VIRGO_HOME": str(tmp_path), "VIRGO_CONFIG": str(tmp_path / "virgo.toml")})


def test_configuration_table_has_every_key_and_default() -> None:
    """The table of docs/configuration.md is the configuration's keys and defaults, all and no others."""
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| `(.*?)` \|", _text("docs/configuration.md"), re.MULTILINE)
    expected = [
        (
            section,
            field.name,
            _toml(field.default_factory() if field.default is msgspec.NODEFAULT else field.default),
        )
        for section in configuration.SECTIONS
        for field in msgspec.structs.fields(type(getattr(configuration.Config(), section)))
    ]
    assert rows == expected


def test_error_table_has_every_code() -> None:
    """The table of docs/wire.md is the error tree's codes and classes, all and no others."""
    rows = re.findall(r"^\| `([A-Z]+)` \| `(\w+)` \|", _text("docs/wire.md"), re.MULTILINE)
    kinds = [errors.VirgoError, *errors.VirgoError.__subclasses__()]
    expected = {(kind.code, kind.__name__) for kind in kinds if kind.__module__ == "virgo.errors"}
    assert set(rows) == expected
    assert len(rows) == len(expected)


def test_every_command_that_wire_md_names_is_served(cloud3: RunningCloud) -> None:
    """Every command in the tables of docs/wire.md is served; the nine calls need the role that it says."""
    tables = "\n".join(line for line in _text("docs/wire.md").splitlines() if line.startswith("| `"))
    roles = dict(re.findall(r"^\| `(VIRGO_[A-Z]+)[^|]*` \| (\w+)", tables, re.MULTILINE))
    named = {*roles, *re.findall(r"\bFILES\.[A-Z]+\b", tables)}
    keys = re.search(r"^`(GET SET [A-Z\s]+)`$", _text("docs/wire.md"), re.MULTILINE)
    assert keys is not None
    assert len(roles) == 9
    with cloud3.connect() as cloud:
        served = {name.decode().upper() for name in cloud.client.execute("COMMAND", "LIST")}
        found = {
            entry[0].decode().upper(): entry[6][0].decode()[1:] for entry in cloud.client.execute("COMMAND")
        }
    aliases = {"UNLINK", "FLUSHALL"}
    assert named | set(keys[1].split()) - aliases <= served
    redis = {name for name in BY_NAME if not name.startswith("MEMORY.")}
    assert redis <= set(keys[1].split())
    assert {name: found[name] for name in roles} == roles


def test_links_between_documents_lead_somewhere() -> None:
    """Every relative link of the documents leads to a file, and its anchor to a heading of it."""
    for path in _DOCUMENTS:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            found = (path.parent / target).resolve() if target else path
            assert found.exists(), f"{path.name}: {target} is not there"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
                assert anchor in [_slug(heading) for heading in headings], f"{path.name}: #{anchor}"


def test_runner_notices_a_wrong_output(tmp_path: Path) -> None:
    """A block that prints something else, or fails, fails its test; so the tests above can fail."""
    around = Surroundings(tmp_path, dict(os.environ), "", 100)
    run(Block("x:1", "python", ["run"], ["print(1)"], ["1"]), around)
    run(Block("x:1", "console", ["run"], ["$ echo one two", "one ..."]), around)
    for block in (
        Block("x:1", "python", ["run"], ["print(2)"], ["1"]),
        Block("x:1", "python", ["run"], ["1/0"]),
        Block("x:1", "console", ["run"], ["$ echo two", "one"]),
        Block("x:1", "console", ["run"], ["$ false"]),
    ):
        with pytest.raises(AssertionError, match="x:1"):
            run(block, around)
    assert fits(["a...z"], ["abc", "xyz"])
    assert not fits(["a...z"], ["abc"])
    assert shift("redis-cli -p 30000 VIRGO_MALLOC 30000", around) == "redis-cli -p 30100 VIRGO_MALLOC 30000"


def _text(name: str) -> str:
    return (_ROOT / name).read_text()


def _toml(value: object) -> str:
    """A default as the table writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
