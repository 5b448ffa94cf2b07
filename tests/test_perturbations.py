import json
import pickle
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.io import savemat

from uap_dist.errors import ConfigError, PerturbationError, UapDistError
from uap_dist.method.norms import measure
from uap_dist.models.weights import write_weights
from uap_dist.models.weights_file import read_weights
from uap_dist.perturbations.files import Perturbation, load_perturbations, save_perturbation
from uap_dist.perturbations.reading import PERTURBATION_FILE

V = 20 * torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)) - 10


def save_own(folder, v=V, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"perturbation_sha256": sha256(v.numpy().tobytes()).hexdigest(), "norm": "linf", "radius": 10.0}
    save_perturbation(folder / PERTURBATION_FILE, v, provenance | changes)
    return str(folder)


def test_saved_perturbations_are_loaded_under_the_name_of_their_folder(tmp_path):
    folder = save_own(tmp_path / "squeezenet")
    for location, name in (
        (folder, "squeezenet"),
        (f"{folder}/perturbation.safetensors", "squeezenet"),
        (f"b={folder}", "b"),
    ):
        (found,) = load_perturbations([location])
        assert found.name == name and torch.equal(found.v, V) and found.provenance["radius"] == 10.0


def test_file_permissions_follow_the_umask(tmp_path):
    (tmp_path / "neighbour").touch()
    save_own(tmp_path)
    write_weights(tmp_path / "w.safetensors", torch.nn.Linear(1, 1), {})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_nothing_is_unpickled(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path(tmp_path / "harmed").touch, ())

    np.save(tmp_path / "v.npy", np.array([Harm()]), allow_pickle=True)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Harm()}, protocol=2))
    torch.save({"a": Harm()}, tmp_path / "v.pth")
    for load in (
        lambda: load_perturbations([f"{tmp_path}/v.npy:255"]),
        lambda: read_weights(f"{tmp_path}/v.pth"),
        lambda: read_weights(f"{tmp_path}/w.pth"),
    ):
        with pytest.raises(UapDistError):
            load()
    assert not (tmp_path / "harmed").exists()


def test_published_perturbations_are_the_same_in_any_layout_and_unit(tmp_path):
    pixels = V.numpy()
    np.save(tmp_path / "a.npy", pixels / 255)
    np.save(tmp_path / "b.npy", pixels.transpose(1, 2, 0)[None].astype(np.float64))
    savemat(tmp_path / "c.mat", {"r": pixels.transpose(1, 2, 0)})
    found = load_perturbations([f"{tmp_path}/a.npy:1", f"{tmp_path}/b.npy:255", f"x={tmp_path}/c.mat:255"])
    assert [p.name for p in found] == ["a", "b", "x"]
    assert all(torch.allclose(p.v, V, atol=1e-5) for p in found)


def test_from_s3(tmp_path, s3):
    from uap_dist.data.locations import locate

    filesystem, path = locate(f"s3://bucket/v.npy?{s3}")
    with filesystem.open_output_stream(path) as file:
        np.save(tmp_path / "v.npy", V.numpy())
        file.write((tmp_path / "v.npy").read_bytes())
    (found,) = load_perturbations([f"s3://bucket/v.npy:255?{s3}"])
    assert found.name == "v" and torch.equal(found.v, V)


def test_resizing_keeps_the_size_of_pixel_values():
    constant = Perturbation("c", torch.full((3, 8, 8), 7.0))
    assert torch.allclose(constant.resized((3, 20, 13)), torch.full((3, 20, 13), 7.0))
    assert measure(Perturbation("v", V).resized((3, 60, 50)), "linf") <= 10
    assert Perturbation("v", V).resized((3, 6, 5)) is V


def test_invalid_perturbation_files_are_errors_of_one_line(tmp_path):
    np.save(tmp_path / "grey.npy", np.zeros((5, 5)))
    np.save(tmp_path / "cube.npy", np.ones((3, 3, 3)))
    np.save(tmp_path / "unit.npy", 255 * V.numpy())
    np.save(tmp_path / "small.npy", V.numpy() / 255)
    np.save(tmp_path / "nan.npy", np.full((3, 4, 4), np.nan))
    savemat(tmp_path / "two.mat", {"r": V.numpy(), "s": V.numpy()})
    (tmp_path / "text.mat").write_text("nothing")
    save_file({"other": V}, tmp_path / "other.safetensors")
    damaged = save_own(tmp_path / "damaged", perturbation_sha256="0" * 64)
    for location, message in (
        ("absent", r"cannot read .*absent/perturbation.safetensors"),
        ("grey.npy:255", r"3×H×W or H×W×3, but holds float64 \(5, 5\)"),
        ("cube.npy:255", r"3×H×W or H×W×3"),
        ("unit.npy:255", r"reaches ±2\d\d\d.* pixels of 255; is its unit right\?"),
        ("small.npy:255", r"reaches ±0.03\d* pixels of 255; is its unit right\?"),
        ("unit.npy", r"give the unit of its values: .*unit.npy:255 for pixels of 0..255, or :1 for 0..1"),
        ("unit.npy:2", r"give the unit of its values"),
        ("nan.npy:1", "holds values that are not finite"),
        ("two.mat#t:255", "two.mat has nothing under 't'; its keys: "),
        ("text.mat:255", "cannot be read"),
        ("other.safetensors", "is not a perturbation written by jobs/compute.py"),
    ):
        with pytest.raises(PerturbationError, match=message):
            load_perturbations([f"{tmp_path}/{location}"])
    for wrong in ({"radius": "10"}, {"norm": "l7"}, {"radius": None}):
        with pytest.raises(PerturbationError, match=r"odd/perturbation.safetensors is not a perturbation written by"):
            load_perturbations([save_own(tmp_path / "odd", **wrong)])
    for header in (b'{"__metadata__":null}', b'{"__metadata__":7}', b"[1]"):
        (tmp_path / "null.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(PerturbationError, match="null.safetensors is not a perturbation written by"):
            load_perturbations([f"{tmp_path}/null.safetensors"])
    for nothing in ("", "old=", " "):
        with pytest.raises(ConfigError, match=f"no file or folder is given by '{nothing}'"):
            load_perturbations([nothing])
    with pytest.raises(PerturbationError, match="is damaged: its values do not match its digest"):
        load_perturbations([damaged])
    with pytest.raises(PerturbationError, match="has linf norm 10, more than its radius 9"):
        load_perturbations([save_own(tmp_path / "large", V / V.abs().max() * 10, radius=9.0)])


def test_names_are_the_given_ones_or_as_much_of_the_path_as_it_takes(tmp_path):
    one, two, three = (save_own(tmp_path / name) for name in ("run-1/seed-0", "run-2/seed-0", "run-2/seed-1"))
    np.save(tmp_path / "run-2/signs.npy", V.numpy())

    def names(*specifications, taken=()):
        return [perturbation.name for perturbation in load_perturbations(specifications, taken)]

    assert names(one, three, f"{tmp_path}/run-2/signs.npy:255") == ["seed-0", "seed-1", "signs"]
    assert names(one, f"{two}/perturbation.safetensors", three) == ["run-1/seed-0", "run-2/seed-0", "seed-1"]
    assert names(f"seed-0={one}", two) == ["seed-0", "run-2/seed-0"]
    assert names(three, taken=["seed-1"]) == ["run-2/seed-1"]
    assert [perturbation.name for perturbation in load_perturbations(str(one))] == ["seed-0"]
    with pytest.raises(ConfigError, match=r"perturbation .*run-1/seed-0 is given twice"):
        names(one, f"again={one}/perturbation.safetensors")
    for twin in ((f"a={one}", f"a={two}"), (f"a={one}",)):
        with pytest.raises(ConfigError, match="two perturbations are named 'a'; give them other names, as NAME="):
            names(*twin, taken=["a"] if len(twin) == 1 else ())


def test_perturbations_published_by_the_authors_of_the_paper(shared):
    folder = shared / "reference"
    files = [f"{path}:255" for path in sorted((folder / "lts4").iterdir())]
    files += [f"{path}:1" for path in sorted((folder / "sgd-uap").iterdir())]
    found = load_perturbations(files)
    assert len(found) == 9 and {tuple(p.v.shape) for p in found} == {(3, 224, 224)}
    assert all(measure(p.v, "linf") == pytest.approx(10, rel=1e-5) for p in found)


def test_metadata_is_what_safetensors_itself_reads(tmp_path):
    from safetensors import safe_open

    with safe_open(f"{save_own(tmp_path / 'v')}/perturbation.safetensors", "pt") as file:
        assert json.loads(file.metadata()["provenance"])["norm"] == "linf"
