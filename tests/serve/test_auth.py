"""Who gets in, who does not, and that nothing that is said about it holds a key."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.auth import ApiKeys
from serve_app.errors import Unauthorized
from t2v_core.errors import InvalidRequest

ALICE, BOB, CAROL = "alice-0123456789abcdef", "b:b:0123456789abcdef==", "~carol!0123456789abcdef"
TEXT = f"alice:{ALICE}\nbob:{BOB}\n"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_is_its_owners_name() -> None:
    keys = ApiKeys.parse(TEXT)
    assert keys.owner_of(bearer(ALICE)) == "alice"
    assert keys.owner_of(bearer(BOB)) == "bob"
    assert keys.owner_of(f"bearer {BOB}") == keys.owner_of(f"BEARER {BOB}") == "bob"


@pytest.mark.parametrize("header", [None, "", "Bearer sk-whatever", "nonsense"])
def test_without_keys_all_are_local(header: str | None) -> None:
    assert ApiKeys.parse("").owner_of(header) == "local"
    assert ApiKeys.configured(None, None).owner_of(header) == "local"


def test_empty_lines_comments_and_spaces_around_do_not_count() -> None:
    keys = ApiKeys.parse(f"# team\r\n\r\n  alice : {ALICE}  \r\n\t# bob:{BOB}\r\n")
    assert keys.owner_of(bearer(ALICE)) == "alice"
    with pytest.raises(Unauthorized):
        keys.owner_of(bearer(BOB))


HEADERS = [
    None, "", " ", "Bearer", "Bearer ", "Bearer  ", ALICE, f" {bearer(ALICE)}", f"{bearer(ALICE)} ",
    f"Bearer  {ALICE}", f"bearer{ALICE}", f"Bearer\t{ALICE}", f"Bearer\u00a0{ALICE}",
    f"Basic {ALICE}", f"Bearer{ALICE}", f"Bearer: {ALICE}", f"Bearer alice:{ALICE}", f"Bearer {ALICE},{BOB}",
    f"Bearer {ALICE}\n", f"Bearer {ALICE}\0", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x", f"Bearer {ALICE.upper()}",
    f'Bearer "{ALICE}"', "Bearer é€\U0001f600", "Bearer \udcff\ud800", "\udcff", "Bearer " + "x" * 1_000_000,
    "x" * 1_000_000, "Bearer alice", "Bearer #",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: ascii(header)[:30])
def test_any_other_header_is_unauthorized(header: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        ApiKeys.parse(TEXT).owner_of(header)
    says_no_key(str(caught.value))


@given(st.text(st.characters(exclude_categories=[])))
def test_no_header_is_a_crash(header: str) -> None:
    for text in (header, bearer(header)):
        with pytest.raises(Unauthorized):
            ApiKeys.parse(TEXT).owner_of(text)


def says_no_key(message: str) -> None:
    for key in (ALICE, BOB, CAROL, "short-secret"):
        for part in (key, key[:6], key[-6:]):
            assert part not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALICE, "line 1: has no colon; write name:key"),
        (f"{TEXT}\n{CAROL}", "line 4: has no colon"),
        (f":{ALICE}", "line 1: a name is of 1-64 letters"),
        (f"{CAROL}:carol", "line 1: a name is of 1-64 letters"),
        (f"{'n' * 65}:{ALICE}", "line 1: a name is of 1-64 letters"),
        (f"a b:{ALICE}", "line 1: a name is of 1-64 letters"),
        ("alice:", "line 1: a key is of 16-512 visible ASCII characters, this one has 0"),
        ("alice:short-secret-12", None),
        ("alice:short-secret-1", None),
        ("alice:short-secret-", "this one has 13; make one with `openssl rand -hex 32`"),
        ("alice:short-secret-12345é", "visible ASCII characters"),
        ("alice:short-secret 1234567", "visible ASCII characters"),
        ("alice:" + "short-secret" * 50, "this one has 600"),
        (f"{TEXT}alice:{CAROL}", "line 3: this name was given before"),
        (f"{TEXT}carol:{ALICE}", "line 3: this key was given before"),
    ],
)
def test_a_line_that_is_wrong_is_told_by_its_number(text: str, message: str | None) -> None:
    if message is None:
        text = text.ljust(22, "x")
        assert ApiKeys.parse(text).owner_of(bearer(text.removeprefix("alice:"))) == "alice"
        return
    with pytest.raises(InvalidRequest) as caught:
        ApiKeys.parse(text)
    assert message in str(caught.value)
    says_no_key(str(caught.value))


def test_a_key_of_16_characters_is_long_enough() -> None:
    assert ApiKeys.parse("a:0123456789abcdef").owner_of("Bearer 0123456789abcdef") == "a"
    with pytest.raises(InvalidRequest, match="this one has 15"):
        ApiKeys.parse("a:0123456789abcde")


# Configured


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(TEXT)
    return path


def test_keys_of_the_file_and_of_the_text_both_count(file: Path) -> None:
    keys = ApiKeys.configured(file, f"carol:{CAROL}")
    assert [keys.owner_of(bearer(key)) for key in (ALICE, BOB, CAROL)] == ["alice", "bob", "carol"]
    with pytest.raises(InvalidRequest, match="line 1: this name was given before"):
        ApiKeys.configured(file, f"alice:{CAROL}")
    with pytest.raises(InvalidRequest, match="line 1: this key was given before"):
        ApiKeys.configured(file, f"carol:{ALICE}")


@pytest.mark.parametrize("text", ["", "\n", "# alice:none yet\n"])
def test_keys_that_are_configured_but_empty_do_not_open_the_service(file: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"keys\.keys: holds no keys"):
        ApiKeys.configured(None, text)
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=r"keys\.file .*keys\.txt: holds no keys"):
        ApiKeys.configured(file, None)
    with pytest.raises(InvalidRequest, match="holds no keys"):
        ApiKeys.configured(file, TEXT)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be read \(No such file or directory\)"):
        ApiKeys.configured(tmp_path / "nothing", None)
    with pytest.raises(InvalidRequest, match=r"cannot be read \(Is a directory\)"):
        ApiKeys.configured(tmp_path, None)
    file.write_bytes(TEXT.encode() + b"\xff")
    with pytest.raises(InvalidRequest, match="it is not UTF-8") as caught:
        ApiKeys.configured(file, None)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "a traceback would show what could not be decoded"


def test_a_byte_order_mark_is_not_part_of_the_first_name(file: Path) -> None:
    file.write_text(TEXT, "utf-8-sig")
    assert ApiKeys.configured(file, None).owner_of(bearer(ALICE)) == "alice"


def replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def rewrite(file: Path, text: str) -> None:
    before = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == before:  # a file system's clock may tick every few milliseconds only
        file.write_text(text)
        time.sleep(0.001)


def relink(file: Path, text: str) -> None:
    """As Kubernetes does it: the file is a link to a folder that is replaced as a whole."""
    new = file.parent / f"version-{time.monotonic_ns()}"
    new.write_text(text)
    os.utime(new, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    link = file.parent / "link"
    link.symlink_to(new)
    link.replace(file)


@pytest.mark.parametrize("change", [replace, rewrite, relink])
def test_a_changed_file_counts_at_the_next_call(file: Path, change: Callable[[Path, str], None]) -> None:
    keys = ApiKeys.configured(file, f"carol:{CAROL}")
    assert keys.owner_of(bearer(ALICE)) == "alice"
    change(file, TEXT.replace("alice", "alize", 1))  # of the same length
    assert keys.owner_of(bearer(ALICE)) == "alize"
    assert keys.owner_of(bearer(CAROL)) == "carol"
    change(file, f"alize:{ALICE}\n")
    with pytest.raises(Unauthorized):
        keys.owner_of(bearer(BOB))
    change(file, TEXT)
    assert keys.owner_of(bearer(BOB)) == "bob"
    assert keys.owner_of(f"bearer {BOB}") == keys.owner_of(f"BEARER {BOB}") == "bob"


@pytest.mark.parametrize(
    "broken",
    ["", "# none", f"alice{ALICE}", "alice:short-secret", f"{TEXT}carol:{ALICE}", f"dave:{CAROL}", None, b"\xff"],
)
def test_while_the_file_is_broken_the_keys_before_hold(
    file: Path, broken: str | bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """An editor that empties a file before it writes it must not open the service, nor close it."""
    caplog.set_level(logging.DEBUG)
    keys = ApiKeys.configured(file, f"carol:{CAROL}")
    if broken is None:
        file.unlink()
    elif isinstance(broken, bytes):
        file.write_bytes(broken)
    else:
        replace(file, broken)
    assert keys.owner_of(bearer(ALICE)) == "alice"
    for header in (None, "Bearer wrong-0123456789abcdef"):
        with pytest.raises(Unauthorized):
            keys.owner_of(header)
    assert caplog.text.count("the old ones hold") == 1
    says_no_key(caplog.text)
    replace(file, f"new:{ALICE}")
    assert keys.owner_of(bearer(ALICE)) == "new"


def test_nothing_that_can_be_printed_holds_a_key(file: Path) -> None:
    keys = ApiKeys.configured(file, f"carol:{CAROL}")
    says_no_key(
        f"{keys!r} {vars(keys)!r} {[vars(part) for part in vars(keys).values() if hasattr(part, '__dict__')]!r}"
    )
