"""Trackers are given what metrics.jsonl holds."""

import sys
import types

import pytest

from jlora.train.track import make_tracker


def test_tensorboard_holds_the_figures(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format read below is what it writes)

    tracker = make_tracker(("tensorboard",), tmp_path, {"rank": 8})
    tracker.write("train", 3, {"loss": 2.5, "note": "text", "bad": float("nan")})
    tracker.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found, begun, at = path.read_bytes(), [], [], 0
    while at < len(data):  # length u64, its checksum u32, the event, its checksum u32
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        begun += [event.step] if event.session_log.status == SessionLog.START else []
        at += 16 + size
    assert (3, "train/loss", 2.5) in found and not any("bad" in tag or "note" in tag for _, tag, _ in found)
    assert begun == [0]  # which hides the events of an earlier run


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_trackers_with_a_run(package, tmp_path, monkeypatch):
    said = []
    fake = types.SimpleNamespace(
        init=lambda **options: said.append(options),
        log=lambda figures, step: said.append((figures, step)),
        finish=lambda: said.append("end"),
    )
    monkeypatch.setitem(sys.modules, package, fake)
    tracker = make_tracker((package,), tmp_path, {"rank": 8, "output": "gs://bucket/run"})
    tracker.write("eval", 10, {"loss": 1.0})
    tracker.close()
    assert said[0]["config"]["rank"] == 8
    assert said[1:] == [({"eval/loss": 1.0}, 10), "end"]
    for step in (10, 0):
        make_tracker((package,), tmp_path, {"output": "gs://bucket/run"}, step)
    first, resumed, other = ((one["name"], one.get("id")) for one in said if isinstance(one, dict))
    assert first == resumed != other and all(name.startswith("run") for name, _ in (first, other))


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tracker 'tensorbord' is not known: tensorboard, wandb"):
        make_tracker(("tensorbord",), tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="--track wandb needs wandb: pip install wandb"):
        make_tracker(("wandb",), tmp_path, {})
