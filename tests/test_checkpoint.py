import io
import os
import re
import stat
import time
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_worker
from pyarrow import ArrowCapacityError, ArrowException, fs

from uap_dist.errors import ConfigError, ResumeError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.rounds.loop import compute
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import Checkpoint, JobRecord, check_identity
from uap_dist.tracking.checkpoint_store import CheckpointStore, _digest
from uap_dist.workers.local import LocalWorkers

JOB = JobRecord("a" * 32, {"seed": 1}, {"step_size": 5.0, "train_digest": "12"}, {"machines": ["CPU"]})


def checkpoint(rounds):
    v, momentum = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(rounds), dtype=torch.float64)
    history = [RoundRecord(n, 1000 + n, {"fooling_rate/round": n / 7}) for n in range(1, rounds + 1)]
    return Checkpoint(
        JOB, State(Iterate(v, momentum, scale=1 / rounds if rounds else inf), rounds, 10 * rounds, 20 * rounds), history
    )


def committed(location, count):
    with CheckpointStore(str(location)) as store:
        store.start(checkpoint(0))
        for rounds in range(1, count + 1):
            store.commit(checkpoint(rounds))
            store.wait()
    return store


def same(a, b):
    tensors = [(x.iterate.v, x.iterate.momentum) for x in (a.state, b.state)]
    counters = [(x.num_rounds, x.num_solves, x.num_evaluations) for x in (a.state, b.state)]
    bits = (
        all(torch.equal(x, y) for x, y in zip(*tensors, strict=True)) and a.state.iterate.scale == b.state.iterate.scale
    )
    return bits and counters[0] == counters[1] and a.job == b.job and list(a.history) == list(b.history)


def test_what_is_committed_comes_back_to_the_bit_and_three_are_kept(tmp_path):
    store = committed(tmp_path / "new" / "folder", 6)
    assert same(store.newest(), checkpoint(6))
    names = sorted(p.name for p in (tmp_path / "new/folder").iterdir())
    assert [name[:25] for name in names[:6]] == [f"history-0000000{n}-0000000{n}" for n in range(1, 7)]
    assert [name[:14] for name in names[6:]] == [f"round-0000000{n}" for n in (4, 5, 6)]


def test_other_users_of_the_machine_do_not_look_into_its_folder(tmp_path):
    old = os.umask(0o022)
    committed(tmp_path / "new" / "folder", 1)
    os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "new/folder")] == [0o700] * 2


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "gone"])
@pytest.mark.parametrize("what", ["round-*", "history-*"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, caplog, what, harm):
    store = committed(tmp_path, 4)
    newest = max(tmp_path.glob(what))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b"", "gone": b""}[harm])
    if harm == "gone":
        newest.unlink()
    assert same(store.newest(), checkpoint(3))
    said = re.search(r"checkpoint .*round-00000004-.*npz is damaged; using the previous one", caplog.text)
    assert said or (what, harm) == ("round-*", "gone")


def test_without_an_intact_checkpoint_there_is_nothing_to_resume(tmp_path):
    for path in ("absent", "."):
        with pytest.raises(ResumeError, match="no checkpoint in"):
            CheckpointStore(str(tmp_path / path)).newest()
        assert CheckpointStore(str(tmp_path / path)).find_newest() is None


def test_committing_the_same_again_never_leaves_less(tmp_path):
    """A resumed run begins so; a full disk or a kill at that moment must not destroy the only checkpoint."""
    store = committed(tmp_path, 0)
    (path,) = tmp_path.iterdir()
    path.chmod(0o444)
    inode = path.stat().st_ino
    store.start(checkpoint(0))
    (again,) = tmp_path.iterdir()
    assert again == path and again.stat().st_ino != inode  # another file took its place, whole
    assert same(store.newest(), checkpoint(0))


def test_commits_to_s3(s3):
    store = committed(f"s3://bucket/runs/one?{s3}", 5)
    assert same(store.newest(), checkpoint(5)) and len(store._files.names("round-")) == 3


def test_a_storage_that_cannot_be_written_to_is_known_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write checkpoints to .*file/under"):
        CheckpointStore(str(tmp_path / "file/under")).start(checkpoint(0))
    with pytest.raises(ConfigError, match="cannot reach nowhere://x"):
        CheckpointStore("nowhere://x")


def test_checking_a_storage_leaves_nothing(tmp_path, s3):
    CheckpointStore(str(tmp_path / "checkpoints/run")).prepare()
    assert not list(tmp_path.iterdir())
    store = CheckpointStore(f"s3://bucket/refused/run?{s3}")
    store.prepare()
    assert store._filesystem.get_file_info("bucket/refused/run").type == fs.FileType.NotFound
    with pytest.raises(ConfigError, match="cannot write checkpoints to /proc/run"):
        CheckpointStore("/proc/run").prepare()


def test_a_storage_that_fails_meanwhile_costs_only_its_commits(tmp_path, caplog):
    folder = tmp_path / "run"
    caplog.set_level("INFO", "uap_dist")
    with CheckpointStore(str(folder)) as store:
        store.start(checkpoint(0))
        folder.rename(tmp_path / "away")
        folder.touch()
        for rounds in (1, 2):
            store.commit(checkpoint(rounds))
            store.wait()
        folder.unlink()
        (tmp_path / "away").rename(folder)
        store.commit(checkpoint(3))
    assert caplog.text.count("could not be committed") == caplog.text.count("round 1 could not be committed to") == 1
    assert "round 3 is committed; the 2 commits before it failed" in caplog.text
    assert same(store.newest(), checkpoint(3))


def test_a_commit_may_fail_in_any_way(tmp_path, caplog):
    """As with the errors of Google's store for which pyarrow has none of the operating system."""
    errors = [ArrowCapacityError("too many requests"), ArrowException("an unknown error")]
    caplog.set_level("INFO", "uap_dist")
    with CheckpointStore(str(tmp_path)) as store:
        write = store._write

        def fail_first(checkpoint):
            if errors:
                raise errors.pop(0)
            write(checkpoint)

        store._write = fail_first
        with pytest.raises(ConfigError, match=f"cannot write checkpoints to {tmp_path}: too many requests"):
            store.start(checkpoint(0))
        for rounds in (1, 2):
            store.commit(checkpoint(rounds))
            while not store._last.done():
                time.sleep(0.01)
    assert f"round 1 could not be committed to {tmp_path}: an unknown error; the job continues" in caplog.text
    assert "round 2 is committed; the 1 commits before it failed" in caplog.text
    assert same(store.newest(), checkpoint(2))


def test_a_commit_does_not_make_the_next_round_wait(tmp_path):
    with CheckpointStore(str(tmp_path)) as store:
        write, store._write = store._write, lambda c: (time.sleep(1), write(c))
        started = time.monotonic()
        store.commit(checkpoint(1))
        assert time.monotonic() - started < 0.5
    assert same(store.newest(), checkpoint(1))


def test_commits_are_skipped_while_one_is_under_way_or_it_is_not_time_and_the_newest_is_written_at_the_end(tmp_path):
    with CheckpointStore(str(tmp_path / "slow")) as slow:
        write, slow._write = slow._write, lambda c: (time.sleep(0.5), write(c))
        for rounds in range(1, 100):
            slow.commit(checkpoint(rounds))
    with CheckpointStore(str(tmp_path / "rare"), every_s=1000) as rare:
        for rounds in range(1, 100):
            rare.commit(checkpoint(rounds))
            rare.wait()
    for store in (slow, rare):
        names = [p.name[:25] for p in sorted(Path(store.location).iterdir())]
        assert names[:2] == ["history-00000001-00000001", "history-00000002-00000099"] and len(names) == 4
        assert same(store.newest(), checkpoint(99))


def test_what_is_written_grows_with_the_rounds_and_resumed_runs_go_on_from_the_segments(tmp_path):
    """Also where a killed job has left a segment without its state."""
    first = committed(tmp_path, 20)
    second = CheckpointStore(str(tmp_path))
    found = first.newest()
    second._files.put("history-00000021-00000022", "jsonl", b"of a job that was killed before it wrote the state")
    with second:
        second.start(found)
        second.commit(replace(checkpoint(40), segment=""))
    assert same(second.newest(), checkpoint(40))
    lines = [len(path.read_text().splitlines()) - 1 for path in sorted(tmp_path.glob("history-*"))]
    assert lines == [1] * 20 + [0] + [20]


@pytest.mark.parametrize("version", [None, 99])
def test_a_checkpoint_of_another_version_is_refused(tmp_path, version):
    store = committed(tmp_path, 1)
    (path,) = tmp_path.glob("round-00000001-*.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "format"}
    arrays |= {} if version is None else {"format": np.asarray(version)}
    path.unlink()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.with_name(f"round-00000001-{_digest(buffer.getvalue())}.npz").write_bytes(buffer.getvalue())
    with pytest.raises(
        ResumeError, match=rf"is of another version of uap_dist \(its format is {version or 1}, this version reads"
    ):
        store.newest()


def test_what_decides_the_bits_must_be_the_same_and_is_named(caplog):
    other = JobRecord(JOB.run_id, {}, {"step_size": 0.5, "train_digest": "12", "new": 1}, {"machines": ["GPU"]})
    with pytest.raises(ResumeError, match=r"new was None, is 1; step_size was 5.0, is 0.5"):
        check_identity(JOB, other)
    check_identity(JOB, JobRecord(JOB.run_id, {"seed": 2}, JOB.identity, {"machines": ["GPU"]}))
    assert "the bits may differ" in caplog.text and "machines was ['CPU'], is ['GPU']" in caplog.text


@pytest.mark.parametrize(("rule", "norm"), [("log-odds", "linf"), ("log-odds", "l2"), ("paper", "linf")])
def test_resuming_after_any_round_gives_the_bits_of_the_uninterrupted_run(tiny_data, rule, norm):
    config = ComputeConfig(rule=rule, norm=norm, radius=20.0, round_size=10, block_size=5, max_passes=2)
    reports = list(compute(LocalWorkers(tiny_worker()), *tiny_data, config))
    for report in reports[:-1]:
        data = Checkpoint(JOB, report.state, [RoundRecord.of(report, {})]).to_bytes()
        state = Checkpoint.from_bytes(data).state
        rest = list(compute(LocalWorkers(tiny_worker()), *tiny_data, config, state))
        assert [r.round_number for r in rest] == list(range(report.round_number + 1, len(reports)))
        assert torch.equal(rest[-1].perturbation, reports[-1].perturbation)
        assert rest[-1].num_evaluations == reports[-1].num_evaluations and rest[-1].is_last
        assert np.array_equal(rest[-1].evaluation.val_predictions.labels, reports[-1].evaluation.val_predictions.labels)
