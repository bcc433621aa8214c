"""A mistake on the command line is told in one line."""

from draftdiff.cli import main


def fails_in_one_line(capsys, *argv: object) -> str:
    assert main([str(arg) for arg in argv]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("draftdiff: error: ")]
    assert printed.out == "" and "Traceback" not in printed.err
    assert len(lines) == 1 and printed.err.splitlines()[-1] == lines[0]
    return lines[0]
