"""What programs may expect of a file system, on a mount: of this machine, through the server, and afar."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c"]


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    """The block must fail with one of these errors of the kernel."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in codes, errno.errorcode.get(caught.value.errno or 0)


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- content --------------------------------------------------------------------------------------


def test_what_is_written_is_read(tree: Path) -> None:
    """At any position, of any size, by any descriptor; a hole reads as zeros."""
    with opened(tree / "file", os.O_RDWR | os.O_CREAT) as first, opened(tree / "file", os.O_RDONLY) as second:
        assert os.pwrite(first, b"x" * 300_000, 5) == 300_000
        assert os.pread(second, 10, 0) == b"\0" * 5 + b"x" * 5
        assert os.pwrite(first, b"end", 3_000_000) == 3
        assert os.fstat(second).st_size == 3_000_003
        assert os.pread(second, 100, 2_999_990) == b"\0" * 10 + b"end"
        assert os.pread(second, 100, 4_000_000) == b""


def test_a_file_can_be_opened_only_to_be_written_and_then_to_be_read(tree: Path) -> None:
    """Whoever reads is not hindered by who came first and only writes."""
    with opened(tree / "file", os.O_WRONLY | os.O_CREAT) as first:
        os.write(first, b"one")
        assert (tree / "file").read_bytes() == b"one"
        with refused(errno.EBADF):
            os.read(first, 1)
    with opened(tree / "file", os.O_RDONLY) as second, refused(errno.EBADF):
        os.write(second, b"two")


def test_appending_writes_at_the_end(tree: Path) -> None:
    """Two that append do not write over each other, whatever the order."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with opened(tree / "log", flags) as first, opened(tree / "log", flags) as second:
        for turn in range(20):
            os.write(first if turn % 3 else second, b"%02d\n" % turn)
    assert (tree / "log").read_text().split() == [f"{turn:02d}" for turn in range(20)]


def test_a_file_is_cut_and_made_longer(tree: Path) -> None:
    """By path, by descriptor and by O_TRUNC."""
    file = tree / "file"
    file.write_bytes(b"0123456789")
    os.truncate(file, 4)
    assert file.read_bytes() == b"0123"
    with opened(file, os.O_RDWR) as descriptor:
        os.ftruncate(descriptor, 6)
        assert os.pread(descriptor, 10, 0) == b"0123\0\0"
    with opened(file, os.O_WRONLY | os.O_TRUNC):
        assert file.stat().st_size == 0


def test_a_sparse_file_of_a_terabyte(tree: Path) -> None:
    """It takes no room, and its holes and data are found."""
    file, size = tree / "sparse", 1 << 40
    with opened(file, os.O_RDWR | os.O_CREAT) as descriptor:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, b"here", size // 2)
        assert file.stat().st_size == size
        assert file.stat().st_blocks * 512 < 1 << 20
        assert os.pread(descriptor, 4, size // 2) == b"here"
        data = os.lseek(descriptor, 0, os.SEEK_DATA)
        assert size // 2 - 65_536 <= data <= size // 2
        assert os.lseek(descriptor, size // 2, os.SEEK_HOLE) <= size // 2 + 65_536


def test_room_is_set_aside_and_given_back(tree: Path) -> None:
    """fallocate(2): allocated without being written, and a hole punched."""
    with opened(tree / "file", os.O_RDWR | os.O_CREAT) as descriptor:
        os.posix_fallocate(descriptor, 0, 1 << 20)
        assert os.fstat(descriptor).st_size == 1 << 20
        assert os.fstat(descriptor).st_blocks * 512 >= 1 << 20
        os.pwrite(descriptor, b"x" * 8192, 0)
        subprocess.run(["fallocate", "-p", "-o", "0", "-l", "4096", tree / "file"], check=True)
        assert os.pread(descriptor, 8192, 0) == b"\0" * 4096 + b"x" * 4096


def test_a_range_is_copied_from_file_to_file(tree: Path) -> None:
    """copy_file_range(2), which `cp` uses."""
    (tree / "source").write_bytes(bytes(range(256)) * 1000)
    with (
        opened(tree / "source", os.O_RDONLY) as source,
        opened(tree / "sink", os.O_RDWR | os.O_CREAT) as sink,
    ):
        left, position = 200_000, 0
        while left:
            count = os.copy_file_range(source, sink, left, 56 + position, position)
            assert count > 0
            left, position = left - count, position + count
        os.fsync(sink)
    assert (tree / "sink").read_bytes() == (tree / "source").read_bytes()[56:200_056]


def test_a_file_is_mapped(tree: Path) -> None:
    """What is stored through a shared map is in the file, and the other way round."""
    (tree / "file").write_bytes(b"a" * 10_000)
    with opened(tree / "file", os.O_RDWR) as descriptor, mmap.mmap(descriptor, 10_000) as mapped:
        assert mapped[9_990:] == b"a" * 10
        mapped[100:105] = b"hello"
        mapped.flush()
        assert os.pread(descriptor, 7, 99) == b"ahelloa"
    assert (tree / "file").read_bytes()[99:106] == b"ahelloa"


def test_a_program_is_run_from_there(tree: Path) -> None:
    """A script and a binary."""
    (tree / "script").write_text("#!/bin/sh\necho ran $1\n")
    (tree / "script").chmod(0o755)
    assert subprocess.run([tree / "script", "well"], capture_output=True, text=True).stdout == "ran well\n"
    subprocess.run(["cp", "/bin/true", tree / "true"], check=True)
    assert subprocess.run([tree / "true"]).returncode == 0


def test_a_removed_file_lives_until_it_is_closed(tree: Path) -> None:
    """It is read, written, measured, and its attributes are set, without any name."""
    with opened(tree / "file", os.O_RDWR | os.O_CREAT) as descriptor:
        os.write(descriptor, b"still")
        (tree / "file").unlink()
        assert list(tree.iterdir()) == []
        assert os.fstat(descriptor).st_nlink == 0
        os.write(descriptor, b" here")
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, 8)
        os.fsync(descriptor)
        assert os.pread(descriptor, 20, 0) == b"still he"
        assert (os.fstat(descriptor).st_size, os.fstat(descriptor).st_mode & 0o777) == (8, 0o600)
        with opened(Path(f"/proc/self/fd/{descriptor}"), os.O_RDONLY) as again:
            assert os.read(again, 20) == b"still he"
        (tree / "file").write_bytes(b"another")
        assert os.pread(descriptor, 20, 0) == b"still he"


# --- names ----------------------------------------------------------------------------------------


def test_names_are_of_any_bytes(tree: Path) -> None:
    """255 bytes, invalid UTF-8 and spaces are names; 256 bytes are not."""
    names = [b"x" * 255, b"\xff\xfe-not-utf8", b" \n\t", "grün".encode(), b"..."]
    for name in names:
        (tree / os.fsdecode(name)).write_bytes(name)
    assert {os.fsencode(path.name): path.read_bytes() for path in tree.iterdir()} == {
        name: name for name in names
    }
    with refused(errno.ENAMETOOLONG):
        (tree / ("x" * 256)).touch()
    with refused(errno.ENOENT):
        (tree / "absent").read_bytes()


def test_renaming(tree: Path) -> None:
    """Over an open file, of directories with what is in them, without replacing, and both ways at once."""
    (tree / "old").write_bytes(b"old")
    (tree / "new").write_bytes(b"new")
    with opened(tree / "new", os.O_RDONLY) as descriptor:
        (tree / "old").rename(tree / "new")
        assert os.read(descriptor, 9) == b"new"
    assert [path.name for path in tree.iterdir()] == ["new"]
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_bytes(b"deep")
    (tree / "a").rename(tree / "c")
    assert (tree / "c" / "b" / "file").read_bytes() == b"deep"
    with refused(errno.EINVAL):
        (tree / "c").rename(tree / "c" / "b" / "c")
    with refused(errno.EISDIR, errno.ENOTEMPTY):
        (tree / "new").rename(tree / "c")
    done = subprocess.run(
        ["mv", "--no-clobber", tree / "new", tree / "c" / "b" / "file"], capture_output=True
    )
    assert (tree / "c" / "b" / "file").read_bytes() == b"deep", done
    if subprocess.run(["mv", "--exchange", "--version"], capture_output=True).returncode == 0:
        subprocess.run(["mv", "--exchange", tree / "new", tree / "c"], check=True)
        assert (tree / "c").read_bytes() == b"old"


def test_links(tree: Path) -> None:
    """A further name is the same file; a symbolic link says what it was given, wherever that leads."""
    (tree / "file").write_bytes(b"one")
    os.link(tree / "file", tree / "second")
    assert (tree / "file").stat().st_nlink == 2
    assert os.path.samestat((tree / "file").stat(), (tree / "second").stat())
    (tree / "second").write_bytes(b"two")
    (tree / "file").unlink()
    assert ((tree / "second").read_bytes(), (tree / "second").stat().st_nlink) == (b"two", 1)
    (tree / "link").symlink_to("second")
    (tree / "broken").symlink_to("/no/such/place")
    assert (tree / "link").read_bytes() == b"two"
    assert str((tree / "broken").readlink()) == "/no/such/place"
    assert not (tree / "broken").exists() and stat.S_ISLNK((tree / "broken").lstat().st_mode)


def test_directories(tree: Path) -> None:
    """Made, counted, and removed only when they are empty."""
    (tree / "sub").mkdir(mode=0o750)
    assert stat.S_IMODE((tree / "sub").stat().st_mode) == 0o750
    assert tree.stat().st_nlink == 3
    (tree / "sub" / "file").touch()
    for wrong, code in (((tree / "sub").rmdir, errno.ENOTEMPTY), ((tree / "sub").mkdir, errno.EEXIST)):
        with refused(code):
            wrong()
    with refused(errno.EISDIR):
        (tree / "sub").unlink()
    with refused(errno.ENOTDIR):
        (tree / "sub" / "file" / "below").touch()
    (tree / "sub" / "file").unlink()
    (tree / "sub").rmdir()
    assert list(tree.iterdir()) == []


def test_a_directory_of_thousands_is_listed_whole_while_it_changes(tree: Path) -> None:
    """Every name that stays is seen exactly once, with its own status."""
    names = {f"file-{number:04}" for number in range(1500)}
    for name in names:
        with opened(tree / name, os.O_CREAT | os.O_WRONLY):
            pass
    seen = []
    with os.scandir(tree) as entries:
        for entry in entries:
            seen.append(entry.name)
            assert entry.inode() == entry.stat().st_ino
            if len(seen) == 500:
                (tree / "another").touch()
    assert sorted(name for name in seen if name != "another") == sorted(names)
    assert len(list(tree.iterdir())) == 1501


def test_other_kinds_of_files(tree: Path) -> None:
    """A FIFO passes bytes and a socket can be connected, between programs of this machine."""
    os.mkfifo(tree / "fifo", 0o622)
    assert stat.S_IMODE((tree / "fifo").stat().st_mode) == 0o622 & ~os.umask(os.umask(0o022))
    with opened(tree / "fifo", os.O_RDWR) as descriptor:
        os.write(descriptor, b"through")
        assert os.read(descriptor, 10) == b"through"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "s"))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tree / "s"))
    os.mknod(tree / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    assert (tree / "null").stat().st_rdev == os.makedev(1, 3)


# --- attributes -----------------------------------------------------------------------------------


def test_times_and_modes_are_kept(tree: Path) -> None:
    """To the nanosecond; a change of the content changes the time."""
    file = tree / "file"
    file.write_bytes(b"x")
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    before = file.stat().st_ctime_ns
    file.chmod(0o640)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and file.stat().st_ctime_ns > before
    file.write_bytes(b"y")
    assert file.stat().st_mtime_ns > 2_000_000_002
    (tree / "link").symlink_to("file")
    os.utime(tree / "link", ns=(5, 6), follow_symlinks=False)
    assert (tree / "link").lstat().st_mtime_ns == 6


def test_extended_attributes(tree: Path) -> None:
    """Set, listed, read, replaced as asked, and taken away."""
    file = tree / "file"
    file.touch()
    os.setxattr(file, "user.one", b"1" * 3000)
    os.setxattr(file, "user.two", b"")
    assert sorted(os.listxattr(file)) == ["user.one", "user.two"]
    assert os.getxattr(file, "user.one") == b"1" * 3000
    with refused(errno.EEXIST):
        os.setxattr(file, "user.one", b"2", os.XATTR_CREATE)
    with refused(errno.ENODATA):
        os.setxattr(file, "user.three", b"3", os.XATTR_REPLACE)
    os.removexattr(file, "user.one")
    with refused(errno.ENODATA):
        os.getxattr(file, "user.one")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_files_are_of_who_makes_them_and_the_kernel_minds_it(tree: Path) -> None:
    """Owner, group, umask and permissions are those of the program; strangers are refused."""
    tree.chmod(0o777)
    tree.parent.chmod(0o755)
    subprocess.run([*AS_NOBODY, f"umask 027; cd {tree}; echo mine > mine; mkdir d; ln -s x l"], check=True)
    status = (tree / "mine").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, NOBODY, 0o640)
    assert [(tree / name).lstat().st_uid for name in ("d", "l")] == [NOBODY, NOBODY]
    (tree / "roots").write_bytes(b"secret")
    (tree / "roots").chmod(0o600)
    done = subprocess.run([*AS_NOBODY, f"cat {tree}/roots"], capture_output=True, text=True)
    assert "Permission denied" in done.stderr
    shared = tree / "shared"
    shared.mkdir()
    os.chown(shared, 0, 1234)
    shared.chmod(0o2777)
    subprocess.run([*AS_NOBODY, f"touch {shared}/file; mkdir {shared}/sub"], check=True)
    assert (shared / "file").stat().st_gid == 1234
    assert (shared / "sub").stat().st_mode & stat.S_ISGID


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_strangers_write_ends_set_user_id(tree: Path) -> None:
    """Also if it is passed through; and it cannot become set-user-ID unseen while one writes to it."""
    for above in (tree, tree.parent):
        above.chmod(0o755)
    file = tree / "program"
    file.write_bytes(b"#!/bin/sh\n")
    file.chmod(0o4777)
    assert file.stat().st_mode & stat.S_ISUID
    subprocess.run([*AS_NOBODY, f"echo evil >> {file}"], check=True)
    assert not file.stat().st_mode & stat.S_ISUID
    assert b"evil" in file.read_bytes()
    with opened(file, os.O_WRONLY) as descriptor:
        try:
            file.chmod(0o4777)
        except OSError as error:
            assert error.errno == errno.ETXTBSY
        else:
            os.seteuid(NOBODY)
            try:
                os.write(descriptor, b"x")
            finally:
                os.seteuid(0)
            assert not file.stat().st_mode & stat.S_ISUID


def test_room_is_that_of_the_disk(tree: Path) -> None:
    """statfs(2) tells what there is."""
    found = os.statvfs(tree)
    assert found.f_blocks > found.f_bavail > 0 and found.f_namemax == 255


def test_locks_exclude_programs_of_the_machine(tree: Path) -> None:
    """flock(2) and fcntl(2) locks of one mount exclude each other."""
    (tree / "lock").touch()
    with opened(tree / "lock", os.O_RDWR) as first, opened(tree / "lock", os.O_RDWR) as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        with refused(errno.EAGAIN):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(first, fcntl.LOCK_UN)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_real_programs_work_on_it(tree: Path) -> None:
    """`git` makes a repository and sees it clean; `tar` gives back what it took."""
    run = {"cwd": tree, "check": True, "capture_output": True, "text": True}
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(tree)}
    for number in range(40):
        (tree / f"dir{number % 4}").mkdir(exist_ok=True)
        (tree / f"dir{number % 4}" / f"file{number}").write_text(f"content {number}\n" * number)
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], env=environment, **run)
    status = subprocess.run(["git", "status", "--porcelain"], env=environment, **run)
    assert status.stdout == ""
    subprocess.run(["tar", "cf", "all.tar", "dir0", "dir1", "dir2", "dir3"], **run)
    (tree / "out").mkdir()
    subprocess.run(["tar", "xf", "all.tar", "-C", "out"], **run)
    for number in range(4):
        subprocess.run(["diff", "-r", f"dir{number}", f"out/dir{number}"], **run)
