"""Files of JSON lines."""

import multiprocessing
from pathlib import Path

from nnssl.journal import append_line, read_lines


def test_lines_come_back_in_order_and_damaged_ones_are_passed_over(tmp_path):
    file = tmp_path / "j.jsonl"
    assert list(read_lines(file, dict)) == []
    append_line(file, {"n": 1})
    with open(file, "ab") as out:
        out.write(b'\n\xff\xfe{"n": 2')  # killed while it wrote
    append_line(file, {"n": 3, "name": "caf\xe9 \udcff"})
    append_line(file, {"other": 4})
    assert list(read_lines(file, lambda row: row["n"])) == [1, 3]  # the last one has no n
    assert list(read_lines(file, lambda row: row["name"])) == ["caf\xe9 \udcff"]


def test_a_file_that_ends_without_a_newline_is_gone_on_with(tmp_path):
    file = tmp_path / "j.jsonl"
    file.write_text('{"n": 1}')
    append_line(file, {"n": 2})
    assert file.read_text() == '{"n": 1}\n{"n": 2}\n'


def _write(file: str, who: int) -> None:
    for i in range(50):
        append_line(file, {"who": who, "i": i, "text": "x" * 500})


def test_processes_share_a_file(tmp_path):
    file = tmp_path / "j.jsonl"
    context = multiprocessing.get_context("fork" if Path("/proc").is_dir() else "spawn")
    processes = [context.Process(target=_write, args=(str(file), who)) for who in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = list(read_lines(file, dict))
    assert len(rows) == 150 and {r["who"] for r in rows} == {0, 1, 2}
