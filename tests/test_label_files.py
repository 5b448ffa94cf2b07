"""Labels of a tar of images in a text file, as people and spreadsheets write them."""

import codecs
import logging
import unicodedata
from pathlib import Path

import pytest
from conftest import pack

from uap_dist.data.sources.imagenet import list_ilsvrc_val
from uap_dist.errors import ShardError

NAMES = [f"val_{i:02d}.png" for i in range(12)]


@pytest.fixture
def labelled(tmp_path):
    """Class indices and names of the twelve images of a tar for a label file with this content."""
    tar = Path(pack(tmp_path / "val.tar", [(name, b"x") for name in NAMES]))

    def read(content):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "labels.txt").write_bytes(data)
        images, names = list_ilsvrc_val(tar, tmp_path / "labels.txt")
        return [image.label for image in images], names

    return read


def lines(labels, names=NAMES):
    return "".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_encodings_of_editors_are_read(labelled, encoding, end):
    for text in (lines(range(12)), "".join(f"{i}\n" for i in range(12))):
        assert labelled(text.replace("\n", end).encode(encoding)) == (list(range(12)), [str(i) for i in range(12)])


def test_other_encodings_are_refused(labelled):
    text = lines(["cat"] * 11 + ["café"])
    assert codecs.BOM_UTF16_LE not in text.encode("utf-16-le")
    for data in (text.encode("latin-1"), text.encode("utf-16-le")):
        with pytest.raises(ShardError, match="labels.txt is not in UTF-8.*; save it as UTF-8"):
            labelled(data)


def test_an_image_that_is_not_known_has_no_label_and_renumbers_no_other(labelled, caplog):
    assert labelled(lines([*range(11), -1]))[0] == [*range(11), None]
    assert "1 of 12 images have no label (-1)" in caplog.text
    assert labelled(lines(["ant", "-1", *["bee"] * 10])) == ([0, None, *[1] * 10], ["ant", "bee"])
    assert labelled(lines([-1] * 12)) == ([None] * 12, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            lines([*range(11), "cat"]),
            "line 12: the label is 'cat', but '0' in .*line 1; labels are class indices, or names",
        ),
        (lines(["3.0", *range(11)]), "line 1: the label is '3.0'; class indices are whole numbers"),
        ("\n" + lines([*range(11), "-2"]), "line 13: the label is '-2'; class indices are whole numbers"),
        (lines([*range(11), "99999999999"]), "line 12: the label is '99999999999'; class indices are whole numbers"),
        (lines([f"{i}.0" for i in range(12)]), "line 1: the label is '0.0'; class indices are"),
        (
            lines(range(12)).replace(" ", ","),
            "line 1: 'val_00.png,0' has no place for commas; separate name and label with",
        ),
        (lines(range(12)).replace(" ", ", "), "line 1: 'val_00.png, 0' has no place for commas"),
        (lines(range(12)).replace("\n", ",\n"), "line 1: 'val_00.png 0,' has no place for commas"),
        ("\n\n", "labels.txt has no labels"),
    ],
)
def test_lines_that_are_no_labels_are_refused_by_their_number(labelled, text, message):
    with pytest.raises(ShardError, match=message):
        labelled(text)


def test_labels_that_may_count_from_one_are_pointed_out(labelled, caplog):
    caplog.set_level(logging.WARNING)
    assert labelled(lines(range(12)))[0] == list(range(12)) and not caplog.text
    assert labelled(lines(range(1, 13)))[0] == list(range(1, 13))
    assert "the smallest label is 1; networks count classes from 0" in caplog.text


def test_names_of_files_match_however_their_accents_are_composed(tmp_path):
    decomposed = [unicodedata.normalize("NFD", name) for name in ("café.png", "thé.png")]
    tar = Path(pack(tmp_path / "val.tar", [(name, b"x") for name in decomposed]))
    (tmp_path / "labels.txt").write_text("café.png 1\nthé.png 0\n", encoding="utf-8")
    assert [image.label for image in list_ilsvrc_val(tar, tmp_path / "labels.txt")[0]] == [1, 0]
    (tmp_path / "labels.txt").write_text(lines([1, 0], decomposed), encoding="utf-8")
    assert [image.label for image in list_ilsvrc_val(tar, tmp_path / "labels.txt")[0]] == [1, 0]
