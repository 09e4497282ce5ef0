"""What ``--c`` means for a run that ended early, or whose folder somebody has damaged."""

import pytest
import torch

from nnssl.errors import NnsslError

pytestmark = pytest.mark.usefixtures("no_drawing")


# ---- what --c means --------------------------------------------------------------------------------------------------------


def end(engine):
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [b"", b"garbage" * 999, None], ids=["empty", "garbage", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, damage, caplog, go, same_weights):
    caplog.set_level("INFO", "nnssl")
    latest = stopped / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-999] if damage is None else damage)
    again = go(name="broken", continue_run=True)
    assert "Going on from the checkpoint before it" in caplog.text and "Continuing after step 2 of 6" in caplog.text
    assert same_weights(go(name="straight"), again)
    assert (stopped / "checkpoint_damaged.pth").is_file() and not (stopped / "checkpoint_previous.pth").exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts(small_target, caplog, go, same_weights):
    caplog.set_level("INFO", "nnssl")
    with pytest.raises(NnsslError, match="nothing to continue in"):
        go(name="broken", continue_run=True)
    with pytest.raises(NnsslError, match="nothing to continue in"):  # asking has left nothing behind
        go(name="broken", continue_run=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from nnssl.pretrain import api

        patch.setattr(api, "prepare_sources", lambda *args, **options: end(None))
        go(name="broken")
    assert same_weights(go(name="straight"), go(name="broken", continue_run=True))
    assert "starts from the beginning" in caplog.text


def test_the_crop_of_a_continued_run_is_that_of_the_run(stopped, caplog, go):
    caplog.set_level("INFO", "nnssl")
    go(name="broken", continue_run=True)
    assert "as in the run that is continued" in caplog.text and "as asked for" not in caplog.text


def test_what_was_accepted_and_chosen_at_first_is_kept(free, tmp_path, go, after_two):
    left_out = tmp_path / "left_out.txt"
    left_out.write_text("case_001\n")
    info = free.parent / "dataset.json"
    info.write_text(info.read_text().replace('"MR"', '"T2"'))
    with pytest.raises(NnsslError, match="--allow-mismatch"):
        go(902)
    with pytest.raises(KeyboardInterrupt):
        go(902, allow_mismatch=True, exclude=left_out, hooks=[after_two(end)])
    assert go(902, continue_run=True).finished


def test_a_checkpoint_of_another_run_is_refused(stopped, go):
    other = go(name="other", seed=5)
    (stopped / "checkpoint_latest.pth").write_bytes((other.folder / "checkpoint_latest.pth").read_bytes())
    with pytest.raises(NnsslError, match=r"another configuration.*\n.*seed: 5 in the checkpoint, 0 now"):
        go(name="broken", continue_run=True)


@pytest.mark.parametrize("part", ["stepper", "rng", "history", "step", "method"])
def test_a_checkpoint_without_a_part_is_refused_by_the_part(stopped, part, go):
    file = stopped / "checkpoint_latest.pth"
    content = torch.load(file, weights_only=True)
    del content["nnssl_training"][part]
    torch.save(content, file)
    with pytest.raises(NnsslError, match=f"checkpoint_latest.pth cannot be continued: its part '{part}' is missing"):
        go(name="broken", continue_run=True)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"\xff\xfe\x00"])
def test_a_damaged_list_of_the_images_of_a_run(stopped, content, go, same_weights):
    (stopped / "images.json").write_bytes(content)
    with pytest.raises(NnsslError, match="images.json cannot be read: .*Remove it, and the images are not compared"):
        go(name="broken", continue_run=True)
    (stopped / "images.json").unlink()
    assert same_weights(go(name="straight"), go(name="broken", continue_run=True))
    assert (stopped / "images.json").is_file()
