import os
import socket
import stat
import sys
import zipfile

import pytest
import torch
from data.pictures import decoded, png, write_archive, write_folder

from gencore.data import DataError, load
from gencore.data.images import ImageSettings, load_images

posix = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and bytes in names are those of POSIX")


def refused(path, message, split="train"):
    with pytest.raises(DataError, match=message) as info:
        load_images(path, split)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_other_files_are_left_out_and_counted(make):
    others = (
        *("a/.2.png", ".cache/1.png", ".cache/a/2.png", "__MACOSX/a/1.png"),
        *("notes.txt", "a/x", "b/Thumbs.db", "b/desktop.ini", "b/more.TXT"),
        "b/a sentence. And one more",
    )
    data = load_images(make({"a/1.png": png(), "b/1.PNG": png(), **dict.fromkeys(others, b"")}), "train")
    assert len(data) == 2
    hidden, others = data.notes
    assert hidden == "skipped 3 hidden files and folders"
    what, _, kinds = others.partition(": ")
    assert what == "skipped 6 files without an image suffix"
    assert sorted(kinds.split(", ")) == [".db 1", ".ini 1", ".txt 2", "no suffix 1", "other suffixes 1"]


def test_other_paths(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_images(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_bytes(b"hello")
    with pytest.raises(DataError, match="file is neither a folder nor a zip archive"):
        load_images(tmp_path / "file", "train")
    with pytest.raises(DataError, match="file/inside does not exist"):
        load_images(tmp_path / "file" / "inside", "train")
    with pytest.raises(DataError, match="needs a path"):
        load("images", "train")


def test_a_folder_called_like_an_image_is_a_folder(make):
    data = load_images(make({f"{name}/{i}.png": png() for name in ("cat.png", "dog") for i in "12"}), "train")
    assert data.spec.class_names == ("cat.png", "dog")


@posix
def test_names_that_are_no_utf8(tmp_path):
    write_folder(tmp_path, {f"{i}/{i}.png": png() for i in range(3)})
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.rename(os.fsencode(tmp_path / "0"), folder)
    os.rename(os.path.join(folder, b"0.png"), os.path.join(folder, b"\xff\n.png"))
    data = load_images(tmp_path, "train")
    assert data.spec.class_names == ("1", "2", r"caf\udce9")
    assert len(data) == 3
    with open(os.path.join(folder, b"\xff\n.png"), "wb") as file:
        file.write(b"no image")
    assert r"caf\udce9/\udcff\n.png (no image" in refused(tmp_path, "1 of 3 images cannot be read")


@posix
@pytest.mark.parametrize("link", ["val", "test"])
def test_a_link_from_one_split_to_the_other_gives_both(tmp_path, link):
    write_folder(tmp_path, {f"train/{name}/{i}.png": png() for name in ("cat", "dog") for i in range(3)})
    (tmp_path / link).symlink_to("train")
    train, test = load_images(tmp_path, "train"), load_images(tmp_path, "test")
    assert torch.equal(train.images, test.images)
    assert len(train) == 6


@posix
def test_links_to_folders_are_followed_but_not_for_ever(tmp_path):
    write_folder(tmp_path, {"store/cats/1.png": png(), "data/dogs/1.png": png()})
    (tmp_path / "data/cats").symlink_to(tmp_path / "store/cats")
    (tmp_path / "data/dogs/loop").symlink_to(tmp_path / "data")
    data = load_images(tmp_path / "data", "train")
    assert data.spec.class_names == ("cats", "dogs")
    assert data.notes == ("skipped 1 link to a folder above: dogs/loop",)


@posix
def test_folders_that_all_link_to_each_other_are_refused(tmp_path):
    names = [str(i) for i in range(12)]
    write_folder(tmp_path, {f"{name}/1.png": png() for name in names})
    for name in names:
        for other in names:
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    refused(tmp_path, "more than 100 ways lead to the folder")


@posix
def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {f"{name}/{i}.png": png() for name in ("cat", "secret", "locked") for i in "12"})
    scandir = os.scandir

    def closed(path):  # root may open all
        if path.name in ("secret", "locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert refused(tmp_path, "cannot read").count("(Permission denied)") == 2
    with pytest.raises(DataError) as info:
        load_images(tmp_path, "train")
    assert sorted(info.value.files) == ["locked", "secret"]


@posix
def test_links_to_nothing(tmp_path):
    write_folder(tmp_path, {"cat/1.png": png(), "cat/2.png": png()})
    (tmp_path / "cat/list.txt").symlink_to("gone")
    assert load_images(tmp_path, "train").notes == ("skipped 1 file without an image suffix: .txt 1",)
    (tmp_path / "cat/3.png").symlink_to("gone")
    refused(tmp_path, r"1 of 3 images cannot be read: cat/3.png \(a link to what does not exist\)")
    (tmp_path / "dog").symlink_to("/nowhere/dog")  # a disk that is not there
    refused(tmp_path, r"cannot read dog \(a link to what does not exist\)")


@posix
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    write_folder(tmp_path, {"cat/1.png": png(), "cat/2.png": png()})
    for name in ("cat/0.png", "other", "archive.zip"):
        if kind == "pipe":
            os.mkfifo(name)
        else:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
    refused(tmp_path, rf"1 of 3 images cannot be read: cat/0.png \(a {kind}\)")
    assert len(load_images(tmp_path, "train", ImageSettings(skip_bad=True))) == 1
    refused(tmp_path / "archive.zip", f"is a {kind}, neither a folder nor a zip archive")


@posix
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {"cat/1.png": png(), "cat/2.png": png()})
    (tmp_path / "cat/3.png").symlink_to("/proc/self/mem")
    refused(tmp_path, r"1 of 3 images cannot be read: cat/3.png \(\w")


@pytest.mark.parametrize(
    "name",
    [
        "train\\cat\\1.png",
        "/train/cat/1.png",
        "../../train/cat/1.png",
        "./train//cat/1.png",
        "train/dog/../cat/1.png",
        "C:\\pictures\\train\\cat\\1.png",
    ],
)
def test_ways_to_name_members_of_archives(tmp_path, name):
    files = {
        name.replace("train", split).replace("1.png", f"{i}.png"): png() for split in ("train", "val") for i in "12"
    }
    path = write_archive(tmp_path / "x.zip", {**files, name.replace("cat", "ape"): png()})
    train, test = load_images(path, "train"), load_images(path, "test")
    assert train.spec.class_names == test.spec.class_names == ("ape", "cat")
    assert (len(train), len(test)) == (3, 2)


def test_names_that_are_utf8_without_saying_so(tmp_path):
    path = write_archive(tmp_path / "x.zip", {f"{name}/{i}.png": png() for name in ("été", "hiver") for i in "12"})
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + place + 1] &= ~0x08
            at = content.find(signature, at + 1)
    path.write_bytes(content)
    assert load_images(path, "train").spec.class_names == ("hiver", "été")


def test_names_in_the_character_set_of_dos(tmp_path):
    path = write_archive(tmp_path / "x.zip", {f"{name}/{i}.png": png() for name in ("caf@", "the") for i in "12"})
    path.write_bytes(path.read_bytes().replace(b"caf@", b"caf\x82"))
    assert load_images(path, "train").spec.class_names == ("café", "the")


def test_members_of_one_name(tmp_path):
    old, new = png(), png()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/1.png", old)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/1.png", new)
    data = load_images(tmp_path / "x.zip", "train")
    assert torch.equal(data.images, decoded(new)[None])
    assert data.notes == ("skipped 1 file of the archive: a later one has the same name: cat/1.png",)


def test_links_in_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("cat/1.png", "cat/2.png"):
            archive.writestr(name, png())
        link = zipfile.ZipInfo("cat/3.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "1.png")
    refused(tmp_path / "x.zip", r"1 of 3 images cannot be read: cat/3.png \(a link, which is not followed")
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        link = zipfile.ZipInfo("dog")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "cat")
    refused(tmp_path / "x.zip", r"cannot read dog \(a link, which is not followed")


def test_archives_inside_are_left_out(make, tmp_path):
    inner = write_archive(tmp_path / "inner.zip", {"1.png": png()}).read_bytes()
    with pytest.raises(DataError, match=r"has no images; skipped 1 file without an image suffix: \.zip 1"):
        load_images(make({"cat/inner.zip": inner}), "train")


def test_a_plain_picture_in_an_archive_may_be_packed_well(tmp_path):
    from data.pictures import encoded
    from PIL import Image

    path = write_archive(
        tmp_path / "x.zip", {f"{i}.bmp": encoded(Image.new("RGB", (600, 600), "white"), "BMP") for i in "12"}
    )
    assert path.stat().st_size < 20000
    assert load_images(path, "train").spec.image_shape == (3, 600, 600)


def test_an_archive_that_unpacks_too_large(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", png())
        archive.writestr("a/2.png", b"")
    path = tmp_path / "x.zip"
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2")
    path.write_bytes(content[: at + 24] + (1 << 30).to_bytes(4, "little") + content[at + 28 :])
    refused(
        path, r"1 of 2 images cannot be read: a/2.png \(1073741824 bytes, over the 536870912 that an image may have\)"
    )


def encrypted(content):
    return content.replace(b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1").replace(
        b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"
    )


def unknown_method(content):
    return content.replace(b"PK\1\2\x14\3\x14\0\0\0\x08\0", b"PK\1\2\x14\3\x14\0\0\0\x61\0")


def wrong_name(content):
    said = content.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\0\x08")
    return said.replace(b"a/1.png", b"\xff/1.png")


def wrong_sum(content):
    changed = bytearray(content)
    changed[200] ^= 0xFF
    return bytes(changed)


def hidden_entry(content):
    """The first entry of the archive's list says that its comment is as long as the second entry."""
    first = content.index(b"PK\1\2")
    changed = bytearray(content)
    changed[first + 32] = content.index(b"PK\5\6") - content.index(b"PK\1\2", first + 1)
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (encrypted, r"2 of 2 images cannot be read: a/1.png \(encrypted\), b/1.png \(encrypted\)"),
        (unknown_method, r"2 of 2 images cannot be read: a/1.png \(\D*compression"),
        (wrong_sum, r"1 of 2 images cannot be read: a/1.png \(.*(CRC|decompress)"),
        (lambda content: content[: len(content) // 2], "is a truncated zip archive"),
        (lambda content: content.replace(b"PK\1\2", b"PK\0\0"), "is a damaged zip archive: "),
        (hidden_entry, "is a damaged zip archive: 1 of 2 files are listed in it"),
        (wrong_name, "is a damaged zip archive: .*utf-8"),
    ],
    ids=["encrypted", "method", "sum", "truncated", "directory", "hidden", "names"],
)  # fmt: skip
def test_damaged_archives(tmp_path, damage, message):
    path = write_archive(tmp_path / "bad.zip", {f"{name}/1.png": png(size=(40, 30)) for name in "ab"})
    path.write_bytes(damage(path.read_bytes()))
    refused(path, message)


def test_a_folder_with_content_in_an_archive_is_a_file(tmp_path):
    path = write_archive(tmp_path / "x.zip", {"cat/1.png": png(), "cat/2.png": png(), "dog/": b"", "cow/": png()})
    assert load_images(path, "train").notes == (
        "skipped 1 file without an image suffix: no suffix 1",
        "1 folder holds no image: dog",
    )
