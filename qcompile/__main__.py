"""`python -m qcompile` is `qcompile`."""

from qcompile.cli import main

main()
