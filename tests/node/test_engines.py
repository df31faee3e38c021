"""Which engine a machine uses: by the reference's address file, and in what order servers are tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from virgo.node.engines import reference_joins

OWN = frozenset({"127.0.0.1", "localhost", "10.0.0.2"})


@pytest.mark.parametrize(
    ("line", "joins"),
    [
        ("", []),
        ("127.0.0.1,127.0.0.1\n", []),
        ("10.0.0.2,10.0.0.1\n", []),
        ("10.0.0.1,10.0.0.2,10.0.0.3\n", ["10.0.0.1", "10.0.0.3"]),
        ("10.0.0.1:30010, localhost", ["10.0.0.1:30010"]),
    ],
)
def test_the_first_machine_of_virgo_cloud_conf_begins_and_the_others_join(
    tmp_path: Path, line: str, joins: list[str]
) -> None:
    """The first address starts a cloud; every other machine joins those that it lists beside itself."""
    (tmp_path / "virgo_cloud.conf").write_text(line)
    assert reference_joins(tmp_path, OWN) == joins
