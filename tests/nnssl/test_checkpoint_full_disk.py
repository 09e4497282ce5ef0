import errno
import os

import pytest
import torch

from nnssl import checkpoint


class Full:
    """A file on a disk that has room for 20 kB."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, data):
        if self.file.tell() + len(bytes(data)) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_what_the_disk_said_is_not_hidden_by_torch(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, {"network_weights": {"encoder.stem.convs.0.conv.weight": torch.ones(10)}})
    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: Full(real(handle, mode)))
    with pytest.raises(OSError, match="No space left") as error:
        checkpoint.save(path, {"network_weights": {"encoder.stem.convs.0.conv.weight": torch.ones(100_000)}})
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert checkpoint.load(path).weights["encoder.stem.convs.0.conv.weight"].shape == (10,)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]
