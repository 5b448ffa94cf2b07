"""Perturbations as others publish them: tensors in checkpoints, folders and zips."""

import re
import zipfile
from argparse import Namespace
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.io import savemat
from torch import nn

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.perturbations.files import load_perturbations
from uap_dist.perturbations.pool import PerturbationPool, load_members
from uap_dist.perturbations.transform import AddUniversalPerturbation

V = (20 * torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0)) - 10) / 255
EPSILON = 5 / 255
SHIFTED = np.full((3, 2, 2), 138, np.uint8)  # 128 + v
UNSIGNED = r"v\.\w+ holds uint8, which cannot be negative; subtract what was added"


def names_and_arrays(*specifications):
    return {each.name: each.v for each in load_perturbations(specifications)}


@pytest.mark.parametrize(
    ("file", "saved"),
    [
        ("sga.pth", V),
        ("batch.pt", V[None]),
        ("parameter.pth", nn.Parameter(V)),
        ("half.pth", V.half()),
        # as DF-UAP leaves it, with the state of its optimiser, which is as large
        ("checkpoint.pth.tar", {"arch": "vgg", "state_dict": {"uap": V}, "args": Namespace(epsilon=0.04),
                                "optimizer": {"state": {0: {"exp_avg": V}}, "param_groups": [{"lr": 0.1}]}}),
        ("network.pth", {"state_dict": {"generator.uap": V, "target.conv.weight": torch.ones(64, 3, 7, 7)}}),
    ],
)  # fmt: skip
def test_tensors_are_found_in_what_training_scripts_save(tmp_path, file, saved):
    torch.save(saved, tmp_path / file)
    (found,) = load_perturbations(f"{tmp_path}/{file}:1")
    assert found.name == file.partition(".")[0]
    torch.testing.assert_close(found.v, 255 * V, rtol=1e-3, atol=1e-2)


def test_a_file_of_several_names_them_by_their_keys_or_numbers(tmp_path):
    torch.save({"vgg16": V, "resnet": -V}, tmp_path / "named.pth")
    np.save(tmp_path / "stack.npy", torch.stack([V, -V]).numpy())
    found = names_and_arrays(f"{tmp_path}/named.pth:1", f"mine={tmp_path}/stack.npy:1")
    assert list(found) == ["named, vgg16", "named, resnet", "mine, 0", "mine, 1"]
    assert torch.equal(found["named, resnet"], found["mine, 1"])
    assert torch.equal(names_and_arrays(f"{tmp_path}/named.pth#vgg16:1")["named#vgg16"], found["mine, 0"])


@pytest.fixture(params=["folder", "zip"])
def zoo(tmp_path, request):
    """As XTransferBench's networks lie on the hub: a folder for each, with its limit in config.json."""
    folder = tmp_path / "zoo"
    for name, v in (("linf_a", V), ("linf_b", -V)):
        (folder / name).mkdir(parents=True)
        save_file({"delta": v[None]}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(f'{{"epsilon": {EPSILON}, "image_size": 8}}')
        (folder / name / "README.md").write_text("text")
    (folder / "l2_c").mkdir()
    save_file({"delta_param": torch.atanh(V)[None]}, folder / "l2_c/model.safetensors")
    (folder / ".cache.pth").write_text("hidden")
    if request.param == "folder":
        return str(folder)
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    return str(tmp_path / "zoo.zip")


def test_a_zoo_is_a_folder_or_a_zip_of_them(zoo, tmp_path):
    found = names_and_arrays(f"{zoo}:1")
    assert list(found) == ["zoo, l2_c", "zoo, linf_a", "zoo, linf_b"]
    torch.testing.assert_close(found["zoo, l2_c"], 255 * V, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["zoo, linf_b"], (-255 * V).clip(-5, 5))
    pool = PerturbationPool.load(f"{zoo}:1")
    assert [member["name"] for member in pool.members] == ["l2_c", "linf_a", "linf_b"]
    assert pool.shared["radius"] == pytest.approx(float(255 * V.abs().max()))
    assert AddUniversalPerturbation(pool, 1.0)(torch.zeros(3, 8, 6)).any()
    assert [each.name for each in load_members([f"{zoo}:1"], ["linf_a"])] == [f"zoo, {m['name']}" for m in pool.members]
    assert [each.name for each in load_members([f"a={zoo}:1"], [])][0] == "a, l2_c"
    pool.save(tmp_path / "saved")
    with pytest.raises(
        PerturbationError, match="is a pool of jobs/compute.py and knows its unit; leave that out, and give"
    ):
        PerturbationPool.load(f"{tmp_path}/saved:255")
    assert torch.equal(PerturbationPool.load(tmp_path / "saved").perturbations, pool.perturbations)
    with pytest.raises(PerturbationError, match="does not say for which network it was computed"):
        pool.check_classifier("0" * 64)


def test_values_that_are_all_positive_are_warned_of(tmp_path, caplog):
    np.save(tmp_path / "v.npy", SHIFTED.astype(np.float32))
    (found,) = load_perturbations(f"{tmp_path}/v.npy:255")
    assert (found.v == 138).all() and "v.npy has positive values only; if 128 was added to them" in caplog.text


def test_files_of_one_name_are_refused_and_others_are_counted(tmp_path, caplog):
    folder = tmp_path / "v"
    folder.mkdir()
    for name in ("a.npy", "B.NPY"):
        np.save(folder / "x.npy", V.numpy())
        (folder / "x.npy").rename(folder / name)
    (folder / "c.png").touch()
    assert list(names_and_arrays(f"{folder}:1", f"alone={folder}/B.NPY:1")) == ["v, B", "v, a", "alone"]
    assert "/v: left out 1 files that are not of a perturbation's kind: c.png" in caplog.text
    torch.save(V, folder / "a.pth")
    with pytest.raises(PerturbationError, match="a.pth has the name a, as another file there; rename one of them"):
        load_perturbations(f"{folder}:1")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for _ in range(2):
            archive.write(folder / "a.npy", "a.npy")
    with pytest.raises(PerturbationError, match="v.zip cannot be unpacked: it holds a.npy more than once"):
        load_perturbations(f"{tmp_path}/v.zip:1")


def test_a_zoo_in_object_storage(tmp_path, s3):
    from uap_dist.data.locations import locate

    torch.save(V, tmp_path / "v.pth")
    for name in ("zoo/a.pth", "zoo/b/model.pth"):
        filesystem, path = locate(f"s3://bucket/{name}?{s3}")
        with filesystem.open_output_stream(path) as file:
            file.write((tmp_path / "v.pth").read_bytes())
    assert list(names_and_arrays(f"s3://bucket/zoo:1?{s3}")) == ["zoo, a", "zoo, b"]


class Own:
    def __reduce__(self):
        return print, ("unpickled!",)


@pytest.mark.parametrize(
    ("file", "save", "message"),
    [
        ("v.pth:1", {"v": Fraction(1, 2)}, "v.pth holds objects of fractions.Fraction, .* save its tensors alone"),
        ("v.pth:1", {"v": V, "own": Own()}, r"v.pth holds objects of \S*print"),
        ("v.pth:1", {"uap": V, "delta": V, "x": V[0]}, "holds several that could be meant: uap, delta; choose one by its key, as"),
        ("v.pth", V, "give the unit of its values: .*v.pth:255 for pixels"),
        ("v.pth:25", V, "v.pth:25: give the unit of its values: .*v.pth:255"),
        ("v.pth:255", V, r"v.pth reaches ±0.0\d+ pixels of 255; is its unit right"),
        ("v.pth:1", b"<html>", "v.pth is a web page"),
        ("v.npy:1", b"<html>", "v.npy cannot be read: it is not what numpy.save writes, it begins with b'<html>'"),
        ("v.npy:255", SHIFTED, UNSIGNED),
        ("v.mat:255", SHIFTED, UNSIGNED),
        ("v.pth:255", {"v": torch.tensor(SHIFTED)}, UNSIGNED),
        ("v.safetensors:255", {"v": torch.tensor(SHIFTED)}, UNSIGNED),
        ("v.npy:1", np.full((3, 2, 2), 0.1 + 0.1j), r"v.npy must hold one array of numbers, .* but holds complex128 \(3, 2, 2\)"),
        ("v.npy:1", np.full((3, 2, 2), 1e300), "v.npy holds values that are not finite"),
        ("v.pth:1", {"a/b": V, "a-b": V}, "v.pth has keys that differ by / and - only: a/b, a-b"),
        ("v.pth:1", {"v": V.to("meta")}, "v.pth holds a tensor that is no array: .*; save the perturbation's tensor"),
        ("v.npy:1", np.zeros((3, 2, 2)), "v.npy holds zeros only"),
        ("v.npy:1", np.full((3, 2, 2), np.inf), "v.npy holds values that are not finite"),
        ("v.pth#w:1", {"v": V}, "v.pth has nothing under 'w'; its keys: v"),
        ("b.npy:255", None, "cannot read .*/b.npy: there is no such file"),
        ("none", None, "there is no such file or folder; files of others need the unit of their values, :255 or :1"),
        ("v.zip:1", b"<html>", "v.zip cannot be unpacked: File is not a zip file"),
        ("v.safetensors", {"delta": V}, r"is not a perturbation written by jobs/compute.py: .*; give others with the unit"),
        ("none:1", None, "none is no folder, and no file of a kind that holds perturbations"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, capsys, file, save, message):
    path = tmp_path / re.split("[:#]", file)[0]
    if path.suffix == ".mat":
        savemat(path, {"v": save})
    elif isinstance(save, np.ndarray):
        np.save(path, save)
    elif isinstance(save, bytes):
        path.write_bytes(save)
    elif path.suffix == ".safetensors":
        save_file(save, path)
    elif save is not None:
        torch.save(save, path)
    with pytest.raises(PerturbationError, match=message) as refusal:
        load_perturbations(f"{tmp_path}/{file}")
    assert str(refusal.value).isprintable() and "unpickled!" not in capsys.readouterr().out


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_refused_in_one_line(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "v.zip", "w", compression) as archive:
        archive.writestr("v.npy", V.numpy().tobytes())
    data = bytearray((tmp_path / "v.zip").read_bytes())
    data[50:150] = b"\xff" * 100
    (tmp_path / "v.zip").write_bytes(data)
    with pytest.raises(PerturbationError, match=r"v.zip cannot be unpacked: \w+"):
        load_perturbations(f"{tmp_path}/v.zip:1")


def test_a_member_that_cannot_be_read_is_named(zoo, tmp_path):
    if zoo.endswith(".zip"):
        with zipfile.ZipFile(zoo, "a") as archive:
            archive.writestr("bad/model.safetensors", b"<html>")
    else:
        (tmp_path / "zoo/bad.pth").write_bytes(b"<html>")
    with pytest.raises(PerturbationError, match=r"zoo(.zip)?, bad\S* is a web page"):
        load_perturbations(f"{zoo}:1")
    with pytest.raises(ConfigError, match="given twice"):
        load_perturbations([f"{zoo}:1", f"again={zoo}:1"])
