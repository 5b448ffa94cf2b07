import os
import stat

import pytest

from uap_dist.tracking.outputs import output_folder, writes_files


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.parametrize("name", ["../../x-seed0", "/x:build-seed0", "a\nb-seed0", "torchvision-resnet18-seed0"])
def test_a_default_folder_lies_in_outputs_however_the_model_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = output_folder(None, name)
    assert folder.parent == tmp_path / "outputs" and folder.name.isprintable()


def test_a_new_folder_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path, umask):
    (tmp_path / "mine").mkdir()
    save = writes_files(lambda folder: (folder / "result.json").write_text("{}"))
    for folder in ("mine", "new/out"):
        save(output_folder(tmp_path / folder, "x"))
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("mine", "new", "new/out", "new/out/result.json")
    ]
    assert modes == [0o755, 0o700, 0o700, 0o644]
