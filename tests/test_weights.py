"""Weights files as training scripts leave them."""

import gzip
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from uap_dist.errors import ClassifierError
from uap_dist.models.loading import load_classifier

NETWORK = load_classifier(TINY).network
for _, parameter in NETWORK.named_parameters():
    parameter.data = (parameter.data * 8).round() / 8 + 0.5  # which half precision holds as well
STATE = NETWORK.state_dict()
MOMENTUM = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


def under(prefix):
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    "saved",
    [
        STATE,
        {"state_dict": under("module."), "epoch": 7},
        {"model": STATE, "optimizer": MOMENTUM, "epoch": 7},
        {"model_state_dict": under("_orig_mod.")},
        {"net": under("module._orig_mod."), "acc": 0.5},
        {"state_dict": under("model."), "hyper_parameters": {"lr": 0.1}},
        {"checkpoint": {"model": under("network.")}},
        {"n_averaged": torch.tensor(3)} | under("module."),
        STATE | {"epoch": 3},
        {"model": STATE, "args": Namespace(lr=0.1, output=Path("runs/1")), "epoch": 7},
        {"model": STATE, "criterion": {"weight": torch.ones(4)}},
        {key: value.half() for key, value in STATE.items()},
        {key: value.to(torch.bfloat16) for key, value in STATE.items()},
        {key: value.double() for key, value in STATE.items()},
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_weights_are_found_in_what_training_scripts_save(tmp_path, saved, is_new):
    torch.save(STATE, tmp_path / "alone.pth")
    torch.save(saved, tmp_path / "saved.pth", _use_new_zipfile_serialization=is_new)
    alone, found = (load_classifier(TINY, str(tmp_path / name)) for name in ("alone.pth", "saved.pth"))
    assert found.weights_digest == alone.weights_digest != load_classifier(TINY).weights_digest


def test_the_format_is_recognised_by_the_content_and_not_the_name(tmp_path):
    save_file(STATE, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "w.safetensors")
    assert len({load_classifier(TINY, str(tmp_path / n)).weights_digest for n in ("w.pth", "w.safetensors")}) == 1


class Own:
    def __reduce__(self):
        return print, ("unpickled!",)


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            {"model": STATE, "args": Fraction(1, 2)},
            r"holds objects of fractions.Fraction, .*\['KEY'\], 'weights.pth'\)",
        ),
        ({"model": STATE, "own": Own()}, r"holds objects of \S*print,"),
        (
            {"state_dict": STATE, "state_dict_ema": under("module.")},
            "holds several that could be meant: state_dict, state_dict_ema; choose one by its key, as .*#state_dict_ema",
        ),
        (
            {"model": {"other.weight": torch.ones(2)}},
            r"\(model\) does not fit the network: keys 4 missing .* 1 unexpected",
        ),
        (
            {key: value.to(torch.int8) for key, value in STATE.items()},
            "does not fit the network: keys 4 of integers, as quantised",
        ),
        (
            {key: value.to_sparse() for key, value in STATE.items()},
            "does not fit the network: keys 4 of tensors that are sparse, nested or without values",
        ),
        (
            {key: value.to("meta") for key, value in STATE.items()},
            "does not fit the network: keys 4 of tensors that are sparse, nested or without values",
        ),
        ({"epoch": 3}, "holds no dictionary of tensors; save its tensors alone"),
        ([STATE], "holds no dictionary of tensors"),
        ({}, "holds no dictionary of tensors"),
        (torch.nn.Linear(2, 2), "holds a whole pickled network, .* save its tensors alone"),
    ],
)
def test_files_without_a_single_state_are_rejected_in_one_line(tmp_path, capsys, saved, message, is_new):
    torch.save(saved, tmp_path / "saved.pth", _use_new_zipfile_serialization=is_new)
    with pytest.raises(ClassifierError, match=f"saved.pth {message}") as refusal:
        load_classifier(TINY, str(tmp_path / "saved.pth"))
    assert str(refusal.value).isprintable() and "unpickled!" not in capsys.readouterr().out


def saved_bytes(tmp_path, save):
    save(STATE, tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: b"", "is empty"),
        (lambda folder: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (lambda folder: b"\n<!DOCTYPE html><html>", "is a web page"),
        (lambda folder: gzip.compress(saved_bytes(folder, torch.save)), "is compressed"),
        (lambda folder: saved_bytes(folder, torch.save)[:2000], "is truncated or damaged; fetch it again"),
        (lambda folder: saved_bytes(folder, save_file)[:2000], "is a truncated or damaged safetensors file"),
        (lambda folder: b"no weights", "is not a readable .safetensors or weights-only .pth file"),
    ],
)
def test_other_kinds_of_files_are_named_in_the_error(tmp_path, make, message):
    (tmp_path / "w.pth").write_bytes(make(tmp_path))
    with pytest.raises(ClassifierError, match=f"w.pth {message}") as refusal:
        load_classifier(TINY, str(tmp_path / "w.pth"))
    assert str(refusal.value).isprintable()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_damaged_value_is_warned_of(tmp_path, caplog):
    torch.save(STATE, tmp_path / "w.pth")
    load_classifier(TINY, str(tmp_path / "w.pth"))
    assert not caplog.text
    data = bytearray((tmp_path / "w.pth").read_bytes())
    data[data.index(STATE["head.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    load_classifier(TINY, str(tmp_path / "w.pth"))
    assert "w.pth: w/data/" in caplog.text and "does not match its checksum" in caplog.text


def test_a_torchscript_archive_is_named_in_the_error(tmp_path):
    torch.jit.save(torch.jit.trace(NETWORK, torch.rand(1, 3, 16, 16)), tmp_path / "w.pth")
    with pytest.raises(ClassifierError, match="is a TorchScript archive"):
        load_classifier(TINY, str(tmp_path / "w.pth"))
