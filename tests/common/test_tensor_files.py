"""Tensors on the disk: what was altered is refused, whichever bit it is."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.tensor_files import Altered, content_sha256, read_tensors, write_tensors

TENSORS = {
    "step": np.array(3),
    "optimizer.exp_avg": np.arange(6, dtype=np.float32).reshape(2, 3),
}


def same(ours, theirs):
    return sorted(ours) == sorted(theirs) and all(
        ours[key].dtype == theirs[key].dtype and np.array_equal(ours[key], theirs[key])
        for key in ours
    )


def test_tensors_come_back_and_every_reader_can_read_them(tmp_path):
    file = tmp_path / "x.safetensors"
    transposed = {**TENSORS, "t": np.arange(6.0).reshape(2, 3).T}
    write_tensors(file, transposed)
    assert same(read_tensors(file), transposed)
    assert same(load_file(file), transposed)
    write_tensors(file, {})
    assert read_tensors(file) == {}


def test_any_flipped_bit_is_refused(tmp_path):
    """A bit of every byte of the file: length, header, digest and values."""
    file = tmp_path / "state-00001.safetensors"
    write_tensors(file, TENSORS)
    content = file.read_bytes()
    accepted = []
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            read_tensors(file)
            accepted.append(place)
        except Altered as error:
            line = str(error)
    assert accepted == []
    assert line.startswith("state-00001.safetensors is damaged")
    assert str(tmp_path) not in line
    assert "\n" not in line


@pytest.mark.parametrize("kind", ["no digest", "cut", "empty", "longer", "absent"])
def test_what_carries_no_digest_or_is_not_whole_is_refused(tmp_path, kind):
    file = tmp_path / "x.safetensors"
    write_tensors(file, TENSORS)
    content = file.read_bytes()
    if kind == "no digest":  # as an earlier FedRx wrote it
        save_file(TENSORS, file)
    elif kind == "absent":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"\0"}[kind])
    with pytest.raises(Altered, match="fix: "):
        read_tensors(file)


def test_the_digest_sees_what_b_s_hash_does_not():
    """Unlike the hash of B it sees the dtype, and whole numbers beyond fp32."""
    base = content_sha256({"step": np.array(2**24)})
    assert base != content_sha256({"step": np.array(2**24 + 1)})
    assert base != content_sha256({"step": np.array(2**24, np.int32)})
    assert base != content_sha256({"step": np.array([2**24])})
    assert base != content_sha256({"stop": np.array(2**24)})
