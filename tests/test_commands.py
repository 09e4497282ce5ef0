"""One grammar over all commands: the same options under the same names, the same exit codes, and docs made from the parsers."""

import errno
import importlib.util
import io
import logging
import os
import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nnssl.command import others_quiet, run_command
from nnssl.errors import NnsslError, UsageError
from nnssl.grammar import SHARED, CommandParser, pair, whole_numbers
from nnssl.streams import show

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("command_tables", ROOT / "tests" / "tools" / "command_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parsers(tables):
    return tables.parsers()


def test_the_page_is_current(tables):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page, "docs/commands.md is out of date: make tables"
    assert set(tables.made()) == set(__import__("re").findall(r"<!-- table: (\w+) -->", page))


def test_shared_options_have_one_meaning(parsers):
    """Whatever two commands have, takes the same kind of value into the same place."""
    seen = {}
    for command, parser in parsers.items():
        for action in parser.options():
            told = (tuple(action.option_strings), action.dest, action.metavar, action.nargs)
            if action.dest == "sources":
                told = (*told[:1], "dataset", *told[2:3], None)  # several datasets in place of one
            for name in action.option_strings:
                assert seen.setdefault(name, (told, command))[0] == told, f"{name}: {command} and {seen[name][1]}"
    assert len(seen) > 60


def test_every_command_has_the_general_options_and_no_command_states_a_shared_one_itself(parsers):
    spelt = {known.name: key for key, known in SHARED.items()}
    for command, parser in parsers.items():
        names = {name for action in parser.options() for name in action.option_strings}
        assert {"-h", "--version", "-v", "--verbose", "-q", "--quiet"} <= names, command
        for action in parser.options():
            for name in set(action.option_strings) & set(spelt):
                assert action.dest in (spelt[name], "sources"), f"{command} {name}"
        for action in (*parser.options(), *parser._positionals._group_actions):
            assert action.help, f"{command}: {action.option_strings or action.dest} says nothing"


def test_help_reads_like_help(parsers):
    for command, parser in parsers.items():
        text = parser.format_help()
        assert "%%" not in text and "SUPPRESS" not in text, command
        assert text.startswith(f"usage: {command} ")
        assert "Example: " in text
        assert not any(line.endswith("-") for line in text.splitlines()), f"{command} breaks within a name"


@pytest.mark.parametrize(
    ("command", "old", "new", "value"),
    [
        ("nnssl_label_efficiency", "--device", "-device", "cpu"),
        ("nnssl_label_efficiency", "-n", "--jobs", "2"),
        ("nnssl_label_efficiency", "-o", "--output", "there"),
        ("nnssl_probe", "-o", "--output", "there"),
        ("nnssl_transferability", "-o", "--output", "there"),
        ("nnssl_add_images", "-n", "--name", "Scans"),
        ("nnssl_pretrain", "--device", "-device", "mps"),
    ],
)
def test_old_spellings_work_and_tell_the_new_one(parsers, capsys, command, old, new, value):
    rest = {
        "nnssl_label_efficiency": ["x.yaml"],
        "nnssl_probe": ["-d", "1"],
        "nnssl_transferability": ["-d", "1", "x.pth"],
        "nnssl_add_images": ["-d", "1", "folder"],
        "nnssl_pretrain": [],
    }[command]
    before = parsers[command].parse_args([*rest, old, value])
    assert f"{old} is now called {new}" in capsys.readouterr().err
    assert vars(before) == vars(parsers[command].parse_args([*rest, new, value]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["nnssl_pretrain", "nnssl_plan", "nnssl_info"])
def test_an_unknown_option_is_refused_in_one_line(parsers, capsys, command):
    with pytest.raises(SystemExit) as stop:
        parsers[command].parse_args(["-d", "1", "--verbos"] if command != "nnssl_info" else ["x", "--verbos"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert f"--verbos is no option of {command}. Did you mean '--verbose'?" in err


def test_a_slip_is_told_before_what_is_missing(parsers, capsys):
    with pytest.raises(SystemExit) as stop:
        parsers["nnssl_label_efficiency"].parse_args(["--report"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--report is no option of nnssl_label_efficiency" in err and "required" not in err
    with pytest.raises(SystemExit):
        parsers["nnssl_plan"].parse_args(["--labels", "4"])
    assert "required: -d" in capsys.readouterr().err


def test_no_option_with_one_hyphen_is_abbreviated(parsers, capsys):
    """argparse would take ``-d`` for ``-device``, whose one meaning is a dataset."""
    with pytest.raises(SystemExit) as stop:
        parsers["nnssl_label_efficiency"].parse_args(["x.yaml", "-d", "cpu"])
    assert stop.value.code == 2
    assert "-d is no option of nnssl_label_efficiency. Did you mean" in capsys.readouterr().err
    args = parsers["nnssl_pretrain"].parse_args(["-d", "1", "-mmae", "-np", "2", "-device=cpu"])
    assert (args.method, args.processes, args.device) == ("mae", 2, "cpu")


def test_version(parsers, capsys):
    import nnunetv2  # noqa: F401  is installed

    from nnssl import __version__

    with pytest.raises(SystemExit) as stop:
        parsers["nnssl_plan"].parse_args(["--version"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"nnssl_plan: nnssl {__version__}, nnunetv2 2.")


def parser():
    p = CommandParser("tool", "[options]", "A tool.")
    p.share(p.group("what"), "device", "adapt")
    p.renamed("--device", "-device")
    return p


def test_quiet_and_verbose_change_the_terminal_only(capsys):
    log = logging.getLogger("nnssl")

    def body():
        log.debug("a detail")
        log.info("a line")
        log.warning("a warning")
        show("the result")

    for words, wanted in (
        ([], {"a line", "a warning", "the result"}),
        (["-q"], {"a warning", "the result"}),
        (["-v"], {"a detail", "a line", "a warning", "the result"}),
    ):
        assert run_command(body, parser().parse_args(words)) == 0
        assert set(capsys.readouterr().out.splitlines()) == wanted
    assert log.isEnabledFor(logging.DEBUG)  # for the log files of runs
    with pytest.raises(SystemExit):
        parser().parse_args(["-q", "-v"])


def test_exit_codes(capsys):
    def refuse(error):
        def body():
            raise error

        return body

    assert run_command(refuse(NnsslError("mend it"))) == 1
    assert run_command(refuse(UsageError("not so"))) == 2
    assert capsys.readouterr().err == "Error: mend it\nError: not so\n"
    assert run_command(refuse(NnsslError("mend it")), parser().parse_args(["-v"])) == 1
    assert "Traceback" in capsys.readouterr().err


SAYS = """
import logging, sys
from nnssl.command import run_command
from nnssl.streams import show
log = logging.getLogger("nnssl")
def body():
    for line in range(3000):
        log.info("line %d of a run, long enough to fill what a pipe holds", line)
    show("the r\\xe9sult")
    open(sys.argv[1], "w").write("whole")
sys.exit(run_command(body))
"""


def speak(shell, tmp_path, **environment):
    """Run :data:`SAYS` in a shell; returns whether the body came to its end, and what was shown."""
    file = tmp_path / "says.py"
    file.write_text(SAYS)
    end = tmp_path / f"end{len(list(tmp_path.iterdir()))}"
    command = shell.replace("SAYS", f"'{sys.executable}' '{file}' '{end}'")
    run = subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **environment}, check=False)
    assert b"Traceback" not in run.stderr and b"Exception ignored" not in run.stderr, run.stderr
    return end.is_file() and run.returncode == 0, run.stdout, run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a shell and /dev/full")
def test_nothing_that_becomes_of_the_terminal_ends_a_run(tmp_path):
    assert speak("SAYS", tmp_path)[0]
    assert speak("set -o pipefail; SAYS | head -1", tmp_path) == (
        True,
        b"line 0 of a run, long enough to fill what a pipe holds\n",
        b"",
    )
    whole, _, told = speak("SAYS > /dev/full", tmp_path)
    assert told == b"Warning: stdout cannot be written (No space left on device); nothing more is shown there.\n"
    assert whole
    assert speak("SAYS >&-", tmp_path) == (True, b"", b"")
    assert speak("SAYS <&- >&- 2>&-", tmp_path) == (True, b"", b"")
    whole, out, _ = speak("SAYS", tmp_path, PYTHONIOENCODING="ascii")
    assert whole and out.endswith(b"the r\\xe9sult\n")


def test_help_of_which_only_the_head_is_read(tmp_path):
    code = "from nnssl.plan_command import main; main(['--help'])"
    command = f"set -o pipefail; '{sys.executable}' -c \"{code}\" | (read line; echo $line)"
    run = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"") and run.stdout.startswith(b"usage: nnssl_plan")


def test_what_cannot_be_shown_is_an_error_where_it_was_asked_for(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert run_command(lambda: show("the table")) == 1
    assert capsys.readouterr().err == "Error: [Errno 28] No space left on device\n"


def test_numbers_in_the_environment_are_checked(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    monkeypatch.setenv("nnUNet_n_proc_DA", "")
    monkeypatch.setenv("WORLD_SIZE", " 1 ")
    assert run_command(lambda: 0) == 1
    assert capsys.readouterr().err == (
        "Error: environment: found 2 problems:\n  - OMP_NUM_THREADS is '4,2'; it must be a whole number\n"
        "  - nnUNet_n_proc_DA is ''; it must be a whole number\n"
        "Set it anew, or leave it out: unset OMP_NUM_THREADS nnUNet_n_proc_DA\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert run_command(lambda: 0) == 0


def test_no_command_imports_what_reads_nnunets_variables_before_they_are_checked():
    """``nnUNet_def_n_proc=abc nnssl_probe`` ended in nnU-Net's own traceback."""
    modules = sorted({e.module for e in entry_points(group="console_scripts") if e.module.partition(".")[0] == "nnssl"})
    assert len(modules) >= 8
    code = "import importlib, sys\nfor m in sys.argv[1:]:\n    importlib.import_module(m)\n"
    code += "    assert 'nnunetv2.configuration' not in sys.modules, m"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_warnings_of_other_packages_are_details(capfd):
    logger = logging.getLogger("nibabel.global")
    logger.addHandler(logging.StreamHandler(sys.stderr))

    def body(word="deprecated"):
        warnings.warn(f"it is {word}", FutureWarning, stacklevel=1)
        logger.warning("pixdim is odd")
        code = "import warnings; warnings.warn('of a child', FutureWarning)"
        subprocess.run([sys.executable, "-c", code], check=True)

    try:
        run_command(body)
        out, err = capfd.readouterr()
        assert "deprecated" not in out + err and "pixdim" not in out + err and "child" not in out + err
        assert "PYTHONWARNINGS" not in os.environ
        run_command(lambda: body("old"), parser().parse_args(["-v"]))
        out, err = capfd.readouterr()
        assert "FutureWarning: it is old" in out and "nibabel.global: pixdim is odd" in out and "of a child" in err
    finally:
        logger.handlers.clear()


def test_what_the_user_asked_of_warnings_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error::ResourceWarning")
    with others_quiet():
        assert os.environ["PYTHONWARNINGS"] == "error::ResourceWarning"
    assert os.environ["PYTHONWARNINGS"] == "error::ResourceWarning"


def test_values(capsys):
    assert whole_numbers("8,16,32") == whole_numbers("[8, 16, 32]") == whole_numbers("8x16x32") == (8, 16, 32)
    assert pair("a=b")("channels=repeat=x") == ("channels", "repeat=x")
    wrong = {
        "--adapt": ("channels", "'channels' is not of the form name=value"),
        "-device": ("gpu", "it can be cuda, cpu, mps."),
    }
    for option, (value, told) in wrong.items():
        with pytest.raises(SystemExit) as stop:
            parser().parse_args([option, value])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
