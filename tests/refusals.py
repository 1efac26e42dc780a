"""What a mistake on the command line must come to: one clear error, and nothing changed."""


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(main, words, output, *parts, lines=1):
    """Expect one error (of one line, but for the layout grammar) with these parts, and no change under `output`."""
    before = tree(output) if output.exists() else None
    status, error = main(words)
    assert status == 1, error
    assert error.startswith("train.py: error: ") and error.count("\n") == lines
    for part in parts:
        assert part in error
    assert (tree(output) if output.exists() else None) == before
