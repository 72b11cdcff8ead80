"""Event files are what TensorBoard reads."""

import json
import struct
import subprocess
from pathlib import Path

import pytest
from wavemill.jobs.lm.events import EventFile, crc32c

ORACLES = Path(__file__).resolve().parents[3] / ".venv-oracles" / "bin" / "python"


def write(folder: Path) -> None:
    with EventFile(folder, 1_700_000_000.0, from_step=None) as events:
        for step in (1, 2, 300):
            events.add(1_700_000_000.5 + step, step, {"train/loss": 1 / step, "held_out/loss": 0.25})
    with EventFile(folder, 1_700_000_900.0, from_step=2) as events:
        events.add(1_700_000_901.0, 3, {"train/loss": 0.5})


def records(path: Path) -> list[bytes]:
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        (masked,) = struct.unpack("<I", content[12 + length : 16 + length])
        unmasked = (masked - 0xA282EAD8) & 0xFFFFFFFF
        assert ((unmasked >> 17) | (unmasked << 15)) & 0xFFFFFFFF == crc32c(content[12 : 12 + length])
        found.append(content[12 : 12 + length])
        content = content[16 + length :]
    return found


def test_the_checksum_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_records_hold_steps_and_figures_as_the_messages_have_them(tmp_path: Path):
    write(tmp_path)
    first, second = sorted(tmp_path.iterdir())
    version, one, _, last = records(first)
    assert version == b"\x09" + struct.pack("<d", 1_700_000_000.0) + b"\x10\x00\x1a\x0dbrain.Event:2"
    assert one[9:11] == b"\x10\x01"
    assert b"\x0a\x0atrain/loss\x15" + struct.pack("<f", 1.0) in one
    assert last[9:12] == b"\x10\xac\x02"  # 300 as a varint
    assert records(second)[1].endswith(b"\x10\x03\x3a\x02\x08\x01")  # from step 3 on, a session begins


def test_a_run_that_begins_anew_hides_all_that_was_there(tmp_path: Path):
    write(tmp_path)
    with EventFile(tmp_path, 1_700_001_000.0, from_step=None) as events:
        events.add(1_700_001_001.0, 1, {"train/loss": 0.125})
    *_, last = sorted(tmp_path.iterdir())
    assert records(last)[1].endswith(b"\x10\x00\x3a\x02\x08\x01")  # from step 0 on
    assert not any(b"\x3a\x02\x08\x01" in record for record in records(sorted(tmp_path.iterdir())[0]))


@pytest.mark.oracles
def test_tensorboard_reads_them_and_hides_what_was_done_again(tmp_path: Path):
    if not ORACLES.exists():
        pytest.skip("needs .venv-oracles: make oracles")
    write(tmp_path)
    code = (
        "import json, sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E; "
        "e = E(sys.argv[1]).Reload(); "
        "print(json.dumps({t: [(s.step, s.value) for s in e.Scalars(t)] for t in e.Tags()['scalars']}))"
    )
    done = subprocess.run([ORACLES, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "train/loss": [[1, 1.0], [2, 0.5], [3, 0.5]],
        "held_out/loss": [[1, 0.25], [2, 0.25]],
    }
    with EventFile(tmp_path, 1_700_001_000.0, from_step=None) as events:
        events.add(1_700_001_001.0, 1, {"train/loss": 0.125})
    done = subprocess.run([ORACLES, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["train/loss"] == [[1, 0.125]]
