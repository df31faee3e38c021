"""Configuration: which source wins, and what is an error rather than a silent default."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from virgo import config
from virgo.config import Placement
from virgo.errors import BadArgument, BadConfig
from virgo.limits import PORT_OFFSET_MAX
from virgo.members import PORTS, check_port_offset


def load(home: Path, **variables: str) -> config.Config:
    return config.load({"VIRGO_HOME": str(home), **variables})


def write(home: Path, text: str, name: str = "virgo.toml") -> Path:
    home.mkdir(exist_ok=True)
    (home / name).write_text(text)
    return home / name


def test_without_files_everything_has_its_default(tmp_path: Path) -> None:
    """An empty home gives the defaults: loopback, embedded engine, no roles."""
    loaded = load(tmp_path / "nothing")
    assert loaded.home == tmp_path / "nothing"
    assert (loaded.node.bind, loaded.node.port_offset, loaded.engine.url) == ("127.0.0.1", 0, "")
    assert loaded.security.roles == {}


def test_variables_win_over_the_file_key_by_key(tmp_path: Path) -> None:
    """A variable replaces its own key and leaves its neighbours as the file has them."""
    write(tmp_path, '[node]\nbind = "0.0.0.0"\nport_offset = 5\n[memory]\ncapacity_bytes = 16777216\n')
    loaded = load(tmp_path, VIRGO_NODE_PORT_OFFSET="7")
    assert (loaded.node.bind, loaded.node.port_offset) == ("0.0.0.0", 7)
    assert loaded.memory.capacity_bytes == 16777216


def test_a_named_file_is_the_only_one(tmp_path: Path) -> None:
    """VIRGO_CONFIG replaces the usual files, and must exist."""
    write(tmp_path, "[node]\nport_offset = 5\n")
    named = write(tmp_path, '[node]\nbind = "::1"\n', "other.toml")
    loaded = load(tmp_path, VIRGO_CONFIG=str(named))
    assert (loaded.node.bind, loaded.node.port_offset) == ("::1", 0)
    with pytest.raises(BadConfig, match=r"missing\.toml"):
        load(tmp_path, VIRGO_CONFIG=str(tmp_path / "missing.toml"))


def test_all_kinds_of_values_are_read_from_file_and_variables(tmp_path: Path) -> None:
    """Lists and tables are TOML in the file and JSON in a variable; booleans in any case."""
    write(
        tmp_path,
        '[security.roles]\n"uid:1001" = ["read"]\n[[files.placement]]\nprefix = "/a"\nnode = "n1"\n'
        '[cpu.programs]\nwc = ["/usr/bin/wc"]\n',
    )
    loaded = load(
        tmp_path,
        VIRGO_NODE_JOIN='["10.0.0.1", "10.0.0.2:5"]',
        VIRGO_ENGINE_UNSAFE="True",
        VIRGO_CPU_PROGRAM_TIME_S="2.5",
        VIRGO_FILES_EXPORTS='{"data": "/srv/data"}',
        VIRGO_ENGINE_URL="123",
    )
    assert loaded.security.roles == {"uid:1001": ["read"]}
    assert loaded.files.placement == [Placement("/a", "n1")]
    assert loaded.cpu.programs == {"wc": ["/usr/bin/wc"]}
    assert loaded.node.join == ["10.0.0.1", "10.0.0.2:5"]
    assert loaded.engine.unsafe is True
    assert loaded.cpu.program_time_s == 2.5
    assert loaded.files.exports == {"data": "/srv/data"}
    assert loaded.engine.url == "123"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[node]\nbnid = 1\n", "bnid"),
        ("[nodes]\n", "nodes"),
        ("[node]\nport_offset = '5'\n", r"node\.port_offset"),
        ("[files]\nplacement = [{prefix = '/a'}]\n", "node"),
        ("[cpu]\nworkers = 1.5\n", r"cpu\.workers"),
        ("node = 5\n", "node"),
        ("home = '/elsewhere'\n", "VIRGO_HOME"),
        ("[node\n", r"virgo\.toml"),
        ("a = \udcff", r"virgo\.toml"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    """Unknown keys and sections, wrong types and broken TOML are BadConfig that names the place."""
    (tmp_path / "virgo.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadConfig, match=named) as caught:
        load(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VIRGO_NODE_PORT_OFFSET", "five"),
        ("VIRGO_NODE_PORT_OFFSET", ""),
        ("VIRGO_ENGINE_UNSAFE", "perhaps"),
        ("VIRGO_NODE_JOIN", "10.0.0.1"),
        ("VIRGO_CPU_PROGRAMS", '{"wc": "/usr/bin/wc"}'),
        ("VIRGO_MEMORY_CAPACITY", "1"),
        ("VIRGO_NODE_BNID", "x"),
    ],
)
def test_a_mistake_in_a_variable_is_named(tmp_path: Path, variable: str, value: str) -> None:
    """A variable with a wrong value, or of no setting, is BadConfig that names it."""
    with pytest.raises(BadConfig, match=variable):
        load(tmp_path, **{variable: value})


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("memory", "capacity_bytes", "-5", "0, or 16777216 to 1099511627776"),
        ("memory", "capacity_bytes", "1", "0, or 16777216 to 1099511627776"),
        ("memory", "capacity_bytes", str(2**62), "0, or 16777216 to 1099511627776"),
        ("cpu", "workers", "-1", "0 to 256"),
        ("cpu", "workers", "100000", "0 to 256"),
        ("cpu", "program_time_s", "-1.0", "0.001 to 2678400"),
        ("cpu", "program_time_s", "0.0", "0.001 to 2678400"),
        ("cpu", "program_time_s", "inf", "0.001 to 2678400"),
        ("cpu", "program_time_s", "nan", "0.001 to 2678400"),
        ("node", "port_offset", "-5", "0 to 1535"),
        ("node", "port_offset", "1536", "0 to 1535"),
        ("node", "log_level", "loud", "debug, info, warning, error"),
        ("engine", "port", "-1", "0 to 65535"),
        ("engine", "port", "65536", "0 to 65535"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    tmp_path: Path, section: str, key: str, value: str, allowed: str
) -> None:
    """In a file and in a variable alike the error names the place, the key, the value and what it may be."""
    written = f'"{value}"' if key == "log_level" else value
    file = write(tmp_path / "home", f"[{section}]\n{key} = {written}\n")
    variable = f"VIRGO_{section}_{key}".upper()
    for home, variables, place in (
        (tmp_path / "home", {}, str(file)),
        (tmp_path / "other", {variable: value}, variable),
    ):
        with pytest.raises(BadConfig) as caught:
            load(home, **variables)
        assert f"{section}.{key} is {value}, but must be {allowed}" in caught.value.message
        assert place in caught.value.message
        assert key in caught.value.hint


def test_the_ends_of_each_range_are_accepted(tmp_path: Path) -> None:
    """What is just allowed, and 0 where it means a choice of ours."""
    for section, key, value in (
        ("memory", "capacity_bytes", 0),
        ("memory", "capacity_bytes", 16 * 1024 * 1024),
        ("cpu", "workers", 256),
        ("node", "port_offset", 1535),
        ("engine", "port", 65535),
    ):
        loaded = load(tmp_path, **{f"VIRGO_{section}_{key}".upper(): str(value)})
        assert getattr(getattr(loaded, section), key) == value


def test_every_number_has_its_bounds() -> None:
    """A number that is added to the configuration without a range fails here."""
    numbers = {
        (section, field.name)
        for section in config.SECTIONS
        for field in msgspec.structs.fields(type(getattr(config.Config(), section)))
        if field.type in (int, float)
    }
    assert numbers == set(config.RANGES)
    assert max(PORTS.values()) + PORT_OFFSET_MAX == 65_535


def test_each_node_of_a_machine_needs_its_ports() -> None:
    """The offset leaves room below 65535 for as many ports as there are nodes."""
    check_port_offset(1535, 1)
    check_port_offset(1533, 3)
    for offset, nodes in ((-1, 1), (1536, 1), (1534, 3)):
        with pytest.raises(BadArgument, match=rf"port_offset.* is {offset}, but must be 0 to {1536 - nodes}"):
            check_port_offset(offset, nodes)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """A configuration that is there but cannot be read is not the same as none."""
    (tmp_path / "virgo.toml").mkdir()
    with pytest.raises(BadConfig, match=r"virgo\.toml"):
        load(tmp_path)


def test_home_is_absolute_and_knows_the_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """VIRGO_HOME may be relative or begin with a tilde; without it, it is ~/.virgo."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert config.home({}) == tmp_path / ".virgo"
    assert config.home({"VIRGO_HOME": ""}) == tmp_path / ".virgo"
    assert config.home({"VIRGO_HOME": "~/cloud"}) == tmp_path / "cloud"
    assert config.home({"VIRGO_HOME": "here"}) == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("10.0.0.1,10.0.0.2\n", ["10.0.0.1", "10.0.0.2"]),
        (" 10.0.0.1 , ,10.0.0.2,\n\n", ["10.0.0.1", "10.0.0.2"]),
        ("10.0.0.1\n10.0.0.2", ["10.0.0.1", "10.0.0.2"]),
        ("", []),
        ("host\udcff", ["host\ufffd"]),
    ],
)
def test_the_reference_files_are_read(tmp_path: Path, text: str, addresses: list[str]) -> None:
    """`virgo_cloud.conf` and `virgo_client.conf`: one line of addresses with commas."""
    for name in ("virgo_cloud.conf", "virgo_client.conf"):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        assert config.reference_addresses(name, tmp_path) == addresses
    assert config.reference_addresses("virgo_other.conf", tmp_path) == []
